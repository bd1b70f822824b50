"""The process and the machine around a run: what must be set before jax is imported, and what environment.json says."""

from __future__ import annotations

import ctypes
import glob
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from maxpretrain.config import Run

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


def prepare_process(run: Run | None = None) -> None:
    """Sets what is read once, at jax's import or at the first allocation. A second call, or one after jax was imported, is harmless.

    Args:
        run: the run to be trained; None for commands that use one device.
    """
    if accelerator() is None:
        count = 1 if run is None else cpu_device_count(run, available_cores())
        keep_freed_memory(one_heap=run is not None and step_bytes(run, count) > 64 * 2**20)
        flags = os.environ.get("XLA_FLAGS", "")
        if "jax" not in sys.modules and count > 1 and _DEVICE_COUNT_FLAG not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {_DEVICE_COUNT_FLAG}={count}".strip()
    else:
        # Not on CPU: there XLA refuses its own entries on some processors (openxla/xla#44565), and one written on another
        # machine can end in SIGILL (a cache in a home directory is shared).
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_directory(run) / "xla"))


def accelerator() -> str | None:
    """What jax will use other than the CPU, as far as can be told without importing it: "tpu", "cuda", or what JAX_PLATFORMS names."""
    asked = os.environ.get("JAX_PLATFORMS", "").split(",")[0].strip()
    if asked:
        return None if asked == "cpu" else asked
    if _installed("libtpu") and has_tpu():
        return "tpu"
    if has_nvidia_gpu() and (_installed("jax_cuda13_plugin") or _installed("jax_cuda12_plugin")):
        return "cuda"
    return None


def has_tpu() -> bool:
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def has_nvidia_gpu() -> bool:
    """Whether this process may see one; under WSL the device is /dev/dxg."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and bool(glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/dxg"))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def keep_freed_memory(*, one_heap: bool = False) -> bool:
    """Tells glibc to keep what is freed. XLA's CPU client frees a step's temporaries and asks for them again; returned to the
    system in between, they cost a page fault for every 4 KiB (a third of a small model's step).

    Args:
        one_heap: for all threads. A thread's own heap ends at 64 MiB, and what does not fit is mapped and given back each
            time, whatever else is set; but below that its own is faster.

    Returns:
        Whether it took; no on other C libraries, and where the user tuned malloc in the environment.
    """
    tuned = "malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or tuned:
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # the M_ constants of malloc.h
    settings = {mmap_max: 0, trim_threshold: -1, top_pad: 64 * 2**20} | ({arena_max: 1} if one_heap else {})
    return {libc.mallopt(name, value) for name, value in settings.items()} == {1}


def step_bytes(run: Run, devices: int) -> int:
    """Memory that a step takes and frees on each of so many devices: what the blocks keep, and gradients; a rough count."""
    model, batch = run.model, run.batch
    tokens = batch.size * batch.length // (batch.microbatches * devices)
    kept = tokens * (20 * model.model_dim + model.num_heads * batch.length)
    return 4 * model.num_layers * (kept + 12 * model.model_dim**2)


def cpu_device_count(run: Run, cores: int) -> int:
    """Devices that the CPU is split into: `compute.cpu_devices`, or one a core as far as mesh and batch allow.

    One device with a thread pool leaves most of the second core idle; two devices under data parallelism use it.
    """
    if run.compute.cpu_devices:
        return run.compute.cpu_devices
    mesh = run.mesh
    axes = (mesh.data, mesh.fsdp, mesh.tensor, mesh.context, mesh.expert, mesh.stage)
    fixed = math.prod(n for n in axes if n != -1)
    if mesh.data != -1 and mesh.fsdp != -1:
        # More devices than cores are never made unasked: mesh.py will say what is missing.
        return fixed if fixed <= cores else 1
    rows = run.batch.size // run.batch.microbatches
    inner = mesh.tensor * mesh.context * mesh.expert * mesh.stage
    most = min(cores, 8)
    if mesh.data == -1:  # each holds all parameters, gradients and moments, which half of the memory must hold
        most = min(most, max(1, (memory_bytes() or 2**40) // 2 // _state_bytes(run)) * fixed)
    fits = [n for n in range(1, most + 1) if n % fixed == 0 and rows % (n // inner) == 0]
    return max(fits, default=1)


def _state_bytes(run: Run) -> int:
    """About 16 bytes a parameter; counted from the matrices alone, since jax is not to be imported yet."""
    from maxpretrain import modelsize

    model = run.model
    table = (model.vocab_size or run.tokenizer.vocab_size) * model.embed_width
    matrices = modelsize.stack_matrices(model, active=False) + table * (1 if model.tie_embeddings else 2)
    if model.architecture == "encoder-decoder":
        matrices += modelsize.stack_matrices(model, active=False, decoder=True)
    return 16 * matrices


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_directory(run: Run | None = None) -> Path:
    """Where prepared data and compiled programs are kept: $MAXPRETRAIN_CACHE, or the config's `data.cache`."""
    return Path(os.environ.get("MAXPRETRAIN_CACHE") or (run or Run()).data.cache).expanduser()


def describe() -> dict[str, Any]:
    """The contents of environment.json. Imports jax and starts its backend."""
    import jax

    devices = jax.devices()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": available_cores(),
        "memory_bytes": memory_bytes(),
        "processes": jax.process_count(),
        "devices": {"count": len(devices), "kind": devices[0].device_kind, "platform": devices[0].platform},
        "versions": {"maxpretrain": maxpretrain_version(), "python": platform.python_version()} | versions(PACKAGES),
        "git": git_state(),
    }


def maxpretrain_version() -> str:
    import maxpretrain

    return maxpretrain.__version__


def versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Distribution name -> installed version, or None; imports none of them."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def memory_bytes() -> int | None:
    """The machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no such name on this system
        return None


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that maxpretrain runs from and whether files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    # Only the checkout's own repository: site-packages may lie inside one that has nothing to do with maxpretrain.
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no commit yet, another owner's repository, a slow disk
        return None
