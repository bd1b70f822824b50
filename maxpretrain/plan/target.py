"""Which devices to plan for: those here, or those of a name such as h200, h200-8, v5p-128."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import jax

from maxpretrain.errors import UserError, nearest
from maxpretrain.monitor.flops import ACCELERATORS, Accelerator, find_accelerator, peak_flops


@dataclasses.dataclass(frozen=True)
class PlannedDevice:
    """Stands for a device that is not here, wherever only its kind and number matter."""

    id: int
    platform: str
    device_kind: str
    memory: int | None
    process_index: int = 0

    def memory_stats(self) -> dict[str, int]:
        return {} if self.memory is None else {"bytes_limit": self.memory}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
        kind: their kind, to show.
        devices: `jax.Device`s, or stand-ins where they are not here.
        memory: bytes of one; None where it is not known.
        peak_flops: FLOP/s of one.
        peak_source: where that number is from.
    """

    kind: str
    devices: tuple[Any, ...]
    memory: int | None
    peak_flops: float
    peak_source: str


def _stand_ins(count: int, platform: str, kind: str, memory: int | None) -> tuple[PlannedDevice, ...]:
    return tuple(PlannedDevice(i, platform, kind, memory) for i in range(count))


def _memory(device: Any) -> int | None:
    """Bytes that a device which is here may use."""
    if device.platform == "cpu":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        return pages // jax.local_device_count("cpu") or None
    return (device.memory_stats() or {}).get("bytes_limit")


def _here(platform: str | None, count: int | None) -> Target:
    devices = tuple(jax.devices(platform))
    device = devices[0]
    memory, (peak, source) = _memory(device), peak_flops(device)
    if count is not None and count != len(devices):
        devices = _stand_ins(count, device.platform, device.device_kind, memory)
    return Target(device.device_kind, devices, memory, peak, source)


def _split(name: str) -> tuple[Accelerator | None, int | None]:
    """`v5p-128` -> (TPU v5p, 128); `rtx-4090` -> (RTX 4090, None)."""
    parts = re.fullmatch(r"(.+)-(\d+)", name)
    if parts and (found := find_accelerator(parts[1])):
        return found, int(parts[2])
    return find_accelerator(name), None


def find_target(name: str | None, count: int | None) -> Target:
    """The devices of a plan.

    Args:
        name: None for the devices here; `cpu`; a name from the table of accelerators, with or without a number: of GPUs, or
            as in the name of a TPU slice (v4 and v5p count two cores a device).
        count: number of devices; None: the name's number, or those here, or one.

    Raises:
        UserError: no such accelerator, or a number that contradicts `count` or its kind.
    """
    if name is None or name.lower() == "cpu":
        return _here(name and name.lower(), count)
    found, units = _split(name)
    if found is None:
        known = sorted(
            a.name.lower().removeprefix("nvidia ").removeprefix("tpu ").replace(" ", "-") for a in ACCELERATORS
        )
        # Compared without the number: v6p-64 is near v6e, not near v5p-64.
        raise UserError(f'no accelerator "{name}" is known{nearest(re.sub(r"-[0-9]+$", "", name.lower()), known)}')
    if units is not None:
        if units % found.slice_units or not units:
            raise UserError(f"{name} names no slice: the number counts cores, {found.slice_units} a device")
        if count is not None and count != units // found.slice_units:
            raise UserError(
                f"{name} has {units // found.slice_units} devices, not {count}; leave out one of the two numbers"
            )
        count = units // found.slice_units
    memory = int(found.memory * 2**30)
    platform = "tpu" if found.name.startswith("TPU") else "gpu"
    return Target(
        found.name,
        _stand_ins(count or 1, platform, found.name, memory),
        memory,
        found.flops,
        f"{found.name}, {found.note}",
    )
