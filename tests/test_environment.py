"""What is set before jax starts, and what environment.json says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maxpretrain import environment
from maxpretrain.config import BatchConfig, ComputeConfig, DataConfig, MeshConfig, ModelConfig, Run

ROOT = Path(__file__).resolve().parent.parent


def child(code, **env):
    """Runs Python on the CPU, without what this process's environment says about XLA and malloc."""
    base = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("XLA_", "JAX_", "MALLOC_", "GLIBC_", "MAXPRETRAIN_"))
    }
    env = base | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | env
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("run", "cores", "count"),
    [
        (Run(), 1, 1),
        (Run(), 2, 2),  # data takes what is there
        (Run(), 64, 8),
        (Run(batch=BatchConfig(size=12)), 8, 6),
        (Run(batch=BatchConfig(size=7)), 4, 1),
        (Run(batch=BatchConfig(size=12, microbatches=4)), 8, 3),
        (Run(compute=ComputeConfig(cpu_devices=8)), 2, 8),
        (Run(mesh=MeshConfig(tensor=2)), 5, 4),
        (Run(mesh=MeshConfig(data=2, fsdp=2)), 4, 4),
        (Run(mesh=MeshConfig(data=2, fsdp=4)), 4, 1),  # not simulated unasked: mesh.py says what is missing
        (Run(mesh=MeshConfig(data=1)), 4, 1),
        (Run(mesh=MeshConfig(data=1, tensor=-1)), 4, 1),
        (Run(mesh=MeshConfig(data=1, fsdp=-1)), 4, 4),
    ],
)
def test_how_many_devices_the_cpu_is_split_into(run, cores, count):
    assert environment.cpu_device_count(run, cores) == count


SPLIT = """
from maxpretrain import environment
from maxpretrain.config import Run, ComputeConfig
environment.prepare_process(Run(compute=ComputeConfig(cpu_devices=3)))
import jax
print(len(jax.devices()))
"""


def test_the_cpu_is_split_before_jax_starts_unless_the_user_did():
    assert child(SPLIT) == "3"
    assert child(SPLIT, XLA_FLAGS="--xla_cpu_enable_fast_math=false") == "3"
    assert child(SPLIT, XLA_FLAGS="--xla_force_host_platform_device_count=5") == "5"


def test_a_command_on_one_device_leaves_the_flags_alone():
    code = "from maxpretrain import environment; environment.prepare_process(); import os; print(os.environ.get('XLA_FLAGS'), os.environ.get('JAX_COMPILATION_CACHE_DIR'))"
    assert child(code) == "None None"


def test_compiled_programs_are_cached_on_accelerators_only(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setenv("MAXPRETRAIN_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    environment.prepare_process()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    environment.prepare_process()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


FREED = """
import ctypes
from maxpretrain import environment
took = TOOK
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
block = libc.malloc(ctypes.c_size_t(2**28))
heap = next((line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]")), ["0", "0"])
print(took, int(heap[0], 16) <= block < int(heap[1], 16))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""),
    reason="glibc only",
)
def test_freed_memory_is_kept():
    """256 MB come from the heap, which keeps what is freed, and not from a mapping of their own, which is given back."""
    prepared = FREED.replace("TOOK", "environment.keep_freed_memory()")
    assert child(FREED.replace("TOOK", "None")) == "None False"
    assert child(prepared) == "True True"
    assert child(prepared, MALLOC_ARENA_MAX="2") == "False False"  # the user tuned it


ANOTHER_THREAD = """
import ctypes, threading
from maxpretrain import environment
from maxpretrain.config import BatchConfig, ModelConfig, Run
environment.prepare_process(Run(model=ModelConfig(num_layers=LAYERS, model_dim=256, num_heads=4), batch=BatchConfig(size=8)))
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = []
thread = threading.Thread(target=lambda: blocks.append(libc.malloc(ctypes.c_size_t(2**28))))
thread.start()
thread.join()
heap = next(line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]"))
print(int(heap[0], 16) <= blocks[0] < int(heap[1], 16))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""),
    reason="glibc only",
)
def test_threads_share_a_heap_where_a_step_is_large():
    assert child(ANOTHER_THREAD.replace("LAYERS", "6")) == "True"
    assert child(ANOTHER_THREAD.replace("LAYERS", "1")) == "False"


def test_step_bytes():
    run = Run(
        model=ModelConfig(num_layers=6, model_dim=384, num_heads=6),
        batch=BatchConfig(size=16, length=256, microbatches=2),
    )
    # 16 × 256 / 2 / 2 tokens of 20 · 384 + 6 · 256 numbers, and 12 · 384² weights, in 6 layers
    assert environment.step_bytes(run, devices=2) == 4 * 6 * (1024 * 9216 + 1769472)


@pytest.mark.parametrize(
    ("platforms", "found"), [("cpu", None), ("cpu,tpu", None), ("tpu", "tpu"), ("cuda,cpu", "cuda")]
)
def test_jax_platforms_decides(platforms, found, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert environment.accelerator() == found


def test_a_gpu_counts_only_with_its_plugin(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(environment, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(environment, "has_tpu", lambda: True)
    for installed, found in [
        ((), None),
        (("jax_cuda13_plugin",), "cuda"),
        (("jax_cuda12_plugin",), "cuda"),
        (("libtpu",), "tpu"),
    ]:
        monkeypatch.setattr(environment, "_installed", lambda name, there=installed: name in there)
        assert environment.accelerator() == found


def test_the_cache_is_the_configs_or_the_environments(monkeypatch):
    monkeypatch.delenv("MAXPRETRAIN_CACHE", raising=False)
    assert environment.cache_directory() == Path.home() / ".cache" / "maxpretrain"
    assert environment.cache_directory(Run(data=DataConfig(cache="/a"))) == Path("/a")
    monkeypatch.setenv("MAXPRETRAIN_CACHE", "/b")
    assert environment.cache_directory(Run(data=DataConfig(cache="/a"))) == Path("/b")


def test_describe(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["maxpretrain", "train", "x"])
    found = json.loads(json.dumps(environment.describe()))
    assert list(found) == [
        "time",
        "command",
        "host",
        "platform",
        "cores",
        "memory_bytes",
        "processes",
        "devices",
        "versions",
        "git",
    ]
    assert found["command"] == ["maxpretrain", "train", "x"]
    assert found["devices"]["platform"] in ("cpu", "gpu", "tpu")
    assert found["devices"]["count"] >= 1
    assert list(found["versions"]) == [
        "maxpretrain",
        "python",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
    ]
    assert all(found["versions"].values())
    assert found["memory_bytes"] > 2**28


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_the_checkouts_own(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "maxpretrain"
    package.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))

    def git(*arguments, at):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, "-C", str(at), *arguments], check=True, capture_output=True)

    git("init", at=tmp_path)  # a repository around the package that is not its checkout
    assert environment.git_state() is None
    git("init", at=package.parent)
    assert environment.git_state() is None  # no commit yet
    (package / "a.py").write_text("1")
    git("add", ".", at=package.parent)
    git("commit", "-m", "a", at=package.parent)
    state = environment.git_state()
    assert (len(state["commit"]), state["dirty"]) == (40, False)
    (package / "a.py").write_text("2")
    assert environment.git_state() == {"commit": state["commit"], "dirty": True}


def test_versions_of_what_is_not_there():
    assert environment.versions(("no-such-package-at-all",)) == {"no-such-package-at-all": None}


def test_replicas_of_a_large_model_must_fit_in_memory(monkeypatch):
    from maxpretrain.config import BatchConfig, ModelConfig, Run

    monkeypatch.setattr(environment, "memory_bytes", lambda: 24 * 2**30)
    small, large = (
        ModelConfig(num_layers=2, model_dim=64, num_heads=2),
        ModelConfig(num_layers=24, model_dim=1024, num_heads=16),
    )
    batch = BatchConfig(size=8, length=64)
    assert environment.cpu_device_count(Run(model=small, batch=batch), 4) == 4
    assert environment.cpu_device_count(Run(model=large, batch=batch), 4) == 2  # 306 M parameters, 4.9 GB each
