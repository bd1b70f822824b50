"""`maxpretrain doctor`: is this machine ready, and if not, what is missing; in a form to paste into a bug report."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

from maxpretrain import environment

# What the base install needs, and the modules behind each extra of pyproject.toml.
REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "clu", "sentencepiece", "tokenizers")
REQUIRED += (
    "tensorflow-datasets",
    "pyarrow",
    "zstandard",
    "safetensors",
    "ml-dtypes",
    "protobuf",
    "numpy",
    "tyro",
    "rich",
    "matplotlib",
    "tensorboardX",
)
EXTRAS = {
    "tpu": ("libtpu",),
    "cuda": ("jax-cuda13-plugin",),
    "eval": ("lm-eval",),
    "track": ("wandb", "trackio"),
    "kernels": ("tokamax",),
    "quant": ("qwix",),
    "parity": ("torch", "transformers"),
    "test": ("pytest", "pytest-xdist", "ruff"),
}
BROKEN_PAIRS = {("0.11.1", "0.12.8"), ("0.11.2", "0.12.9")}  # (jax, flax) whose flax.nnx fails on import

_FREE_BYTES = 2 * 10**9  # a quickstart run with its data and checkpoints needs far less; a token store more

Status = Literal["ok", "warning", "error"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the diagnosis; an error means that training cannot work here."""

    name: str
    status: Status
    detail: str


def diagnose() -> dict[str, Any]:
    """Looks at the installation, the devices and the disk. Imports jax and runs one small program on it.

    Returns:
        JSON-ready: usable (bool), versions, extras, machine, devices, kernels, environment (variables), checks.
    """
    versions = environment.versions(REQUIRED)
    checks = _packages(versions)
    devices: list[dict[str, Any]] = []
    kernels: dict[str, str] = {}
    if not any(check.status == "error" for check in checks):
        checks += [_guarded("flax", _flax), _guarded("jax", lambda: _devices(devices))]
        if devices:
            kernels = _kernels()
            checks += [_guarded("matmul", _matmul)]
            checks += [_guarded("cudnn attention", _cudnn_attention)] if kernels["attention"] == "cudnn" else []
            checks += _unused_accelerators(devices[0]["platform"])
    checks += [_cache(), _disk()]
    return {
        "usable": all(check.status != "error" for check in checks),
        "versions": {"maxpretrain": environment.maxpretrain_version(), "python": platform.python_version()} | versions,
        "extras": {extra: environment.versions(packages) for extra, packages in EXTRAS.items()},
        "machine": {
            "platform": platform.platform(),
            "cores": environment.available_cores(),
            "memory_bytes": environment.memory_bytes(),
            "git": environment.git_state(),
        },
        "devices": devices,
        "kernels": kernels,
        "environment": {name: value for name, value in sorted(os.environ.items()) if _matters(name)},
        "checks": [dataclasses.asdict(check) for check in checks],
    }


def render(report: dict[str, Any]) -> str:
    """The diagnosis as plain text, the same on every terminal and in a bug report."""
    machine = report["machine"]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else "unknown memory"
    lines = [
        f"maxpretrain {report['versions']['maxpretrain']}, Python {report['versions']['python']}, {machine['platform']}"
    ]
    lines += [f"{machine['cores']} cores, {memory}"]
    if machine["git"]:
        lines.append(
            f"checkout {machine['git']['commit'][:12]}{' with local changes' if machine['git']['dirty'] else ''}"
        )
    lines += _section(
        "devices", [(f"{d['count']} × {d['kind']}", d["platform"] + d["memory"]) for d in report["devices"]]
    )
    lines += _section("kernels", report["kernels"].items())
    packages = [(name, version or "missing") for name, version in report["versions"].items()]
    lines += _section("packages", packages[2:])
    lines += _section("extras", [(name, _extra(name, found)) for name, found in report["extras"].items()])
    lines += _section("environment", report["environment"].items())
    marks = {"ok": "ok", "warning": "warning", "error": "ERROR"}
    lines += _section(
        "checks", [(check["name"], f"{marks[check['status']]}: {check['detail']}") for check in report["checks"]]
    )
    problems = sum(check["status"] == "error" for check in report["checks"])
    lines += [
        "",
        "ready to train" if report["usable"] else f"not usable: {problems} error{'s' if problems > 1 else ''} above",
    ]
    return "\n".join(lines)


def _section(title: str, rows: Any) -> list[str]:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return ["", title, *(f"  {name.ljust(width)}  {text}".rstrip() for name, text in rows)] if rows else []


def _extra(name: str, found: dict[str, str | None]) -> str:
    missing = [package for package, version in found.items() if version is None]
    have = ", ".join(f"{package} {version}" for package, version in found.items() if version is not None)
    need = f"{', '.join(missing)} not installed (pip install 'maxpretrain[{name}]')" if missing else ""
    return "; ".join(filter(None, (have, need)))


def _matters(name: str) -> bool:
    return name.startswith(("JAX_", "XLA_", "LIBTPU_", "TPU_", "MAXPRETRAIN_")) or name in (
        "CUDA_VISIBLE_DEVICES",
        "GLIBC_TUNABLES",
    )


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except Exception as error:  # any library may fail in any way on import or start: that is what is being asked
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return Check(name, "error", f"{type(error).__name__}: {first[:300]}")


def _packages(versions: dict[str, str | None]) -> list[Check]:
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return [Check("packages", "error", f"{', '.join(missing)} not installed; pip install maxpretrain")]
    checks = [Check("packages", "ok", "all there")]
    jax, jaxlib, flax = versions["jax"], versions["jaxlib"], versions["flax"]
    if (jax, flax) in BROKEN_PAIRS:
        checks.append(
            Check(
                "jax and flax",
                "error",
                f"flax {flax} fails on import with jax {jax}; pip install --upgrade maxpretrain flax jax",
            )
        )
    if jax.split(".")[:3] != jaxlib.split(".")[:3]:
        checks.append(
            Check(
                "jax and jaxlib",
                "warning",
                f"jax {jax} with jaxlib {jaxlib}; pip install jax=={jax} brings the jaxlib that belongs to it",
            )
        )
    return checks


def _flax() -> Check:
    from flax import nnx

    return Check("flax", "ok", f"flax.nnx imports ({nnx.__name__})")


def _devices(found: list[dict[str, Any]]) -> Check:
    import jax

    started = time.perf_counter()
    devices = jax.devices()
    for kind in dict.fromkeys(device.device_kind for device in devices):
        same = [device for device in devices if device.device_kind == kind]
        limit = (same[0].memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB each" if limit else ""
        found.append({"count": len(same), "kind": kind, "platform": same[0].platform, "memory": memory})
    return Check(
        "jax",
        "ok",
        f"found {len(devices)} device{'s' if len(devices) > 1 else ''} in {time.perf_counter() - started:.1f} s",
    )


def _matmul() -> Check:
    import jax
    import numpy as np

    started = time.perf_counter()
    ones = np.ones((256, 256), np.float32)
    product = jax.jit(lambda a: a @ a)(ones)
    if not np.array_equal(np.asarray(product), np.full((256, 256), 256.0, np.float32)):
        return Check("matmul", "error", "a 256×256 product of ones is not 256 everywhere; this device computes wrongly")
    return Check("matmul", "ok", f"compiled and right in {time.perf_counter() - started:.1f} s")


def _kernels() -> dict[str, str]:
    """What `auto` means on these devices, by the rule table."""
    import jax

    from maxpretrain import hardware

    rule = hardware.rule_for(jax.devices()[0])
    return {"attention": rule.attention, "matrix products": rule.dtype}


def _cudnn_attention() -> Check:
    import jax
    import jax.numpy as jnp

    query = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    out = jax.nn.dot_product_attention(query, query, query, is_causal=True, implementation="cudnn")
    right = bool((abs(out - 1) < 0.01).all())  # a mean of ones
    return Check(
        "cudnn attention", "ok" if right else "error", "right" if right else "wrong; train with --compute.attention xla"
    )


def _unused_accelerators(device_platform: str) -> list[Check]:
    if device_platform != "cpu" or os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if environment.has_nvidia_gpu():
        return [
            Check("gpu", "warning", "an NVIDIA GPU is there, but jax uses the CPU; pip install 'maxpretrain[cuda]'")
        ]
    if environment.has_tpu():
        return [
            Check(
                "tpu",
                "warning",
                "a TPU seems to be there, but jax uses the CPU; pip install 'maxpretrain[tpu]', or another process holds it",
            )
        ]
    return []


def _cache() -> Check:
    folder = environment.cache_directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Check("cache", "ok", f"{folder} can be written")
    except OSError as error:
        return Check(
            "cache",
            "error",
            f"{folder} cannot be written ({error.strerror}); set MAXPRETRAIN_CACHE to a folder that can",
        )


def _disk() -> Check:
    places = {"the cache": environment.cache_directory(), "this folder": "."}
    free = {}
    for name, place in places.items():
        try:
            free[name] = shutil.disk_usage(place).free
        except OSError:  # the check above said why
            continue
    if not free:
        return Check("disk", "warning", "free space unknown")
    detail = ", ".join(f"{n / 1e9:.1f} GB free for {name}" for name, n in free.items())
    return Check("disk", "warning" if min(free.values()) < _FREE_BYTES else "ok", detail)
