"""Eight CPU devices and strict numpy rules, before anything imports jax."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.pop("MAXPRETRAIN_CACHE", None)  # it goes before the caches that the tests ask for
# The suite compiles hundreds of programs that run for milliseconds: unoptimized code takes a third of the time to make.
FLAGS = {
    "xla_force_host_platform_device_count": "8",
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
}
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(f"--{k}={v}" for k, v in FLAGS.items() if k not in given)]).strip()

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
