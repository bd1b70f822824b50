"""The device mesh, and the rules by which logical axes land on it. The only file that knows mesh axis names."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maxpretrain.config import MeshConfig
from maxpretrain.errors import UserError, nearest

AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")  # outermost (slowest links) first

# Logical axis -> the mesh axes that shard it. () is never sharded.
RULES: Mapping[str, tuple[str, ...]] = {
    # of activations and batches
    "batch": ("data", "fsdp", "expert"),  # outside the experts, devices that hold different ones share the work
    "length": (),
    # of both
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    # of parameters
    "embed": ("fsdp",),
    "expert": ("expert",),
    "width": (),  # vectors of model width: norms, output biases
    "head_dim": (),
    "latent": (),  # of latent attention
    "embedded": (),  # width of an embedding narrower than the model
    "position": (),
    "layers": (),
}

# What a user changes when a logical axis does not divide.
_FIELDS = {
    "batch": "batch.size",
    "vocab": "model.vocab_size",
    "mlp": "model.mlp_dim",
    "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads",
    "embed": "model.model_dim",
    "expert": "model.moe.num_experts",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh of devices and the rules that place arrays on it."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: RULES, hash=False)

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    def extent(self, logical: str | None) -> int:
        """Into how many parts a logical axis is cut."""
        return math.prod(self.mesh.shape[a] for a in self._mesh_axes(logical))

    def _mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        if logical is None:
            return ()
        if logical not in self.rules:
            raise ValueError(f'no rule for the logical axis "{logical}"{nearest(logical, self.rules)}')
        return self.rules[logical]

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Partition of an array whose dimensions have these logical axes.

        Raises:
            ValueError: an unknown logical axis, or two dimensions that land on one mesh axis.
        """
        parts = [self._mesh_axes(axis) for axis in axes]
        used = [a for part in parts for a in part]
        for axis in set(used):
            if used.count(axis) > 1 and self.mesh.shape[axis] > 1:
                raise ValueError(
                    f"the logical axes {tuple(axes)} put two dimensions on the mesh axis {axis}; change the rules"
                )
        used_once: set[str] = set()
        entries: list[tuple[str, ...] | None] = []
        for part in parts:
            kept = tuple(a for a in part if a not in used_once)
            used_once.update(kept)
            entries.append(kept or None)
        return PartitionSpec(*entries)

    def sharding(self, axes: Sequence[str | None], rank: int | None = None) -> NamedSharding:
        """Placement of an array; `rank`, where given, must be the number of axes.

        Raises:
            ValueError: as `spec`, and on a rank mismatch.
        """
        if rank is not None and rank != len(axes):
            raise ValueError(f"an array of rank {rank} was given {len(axes)} logical axes {tuple(axes)}")
        return NamedSharding(self.mesh, self.spec(axes))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def batch_sharding(self) -> NamedSharding:
        """Placement of a batch: its first dimension over `batch`."""
        return self.sharding(("batch",))

    def param_shardings(self, abstract: Any) -> Any:
        """Tree of placements for a tree of `nn.base.Spec`."""
        return jax.tree.map(
            lambda spec: self.sharding(spec.axes, len(spec.shape)), abstract, is_leaf=lambda x: hasattr(x, "axes")
        )

    def local_rows(self, batch_size: int) -> range:
        """The rows of a global batch that this process must make."""
        indices = self.batch_sharding().addressable_devices_indices_map((batch_size,)).values()
        bounds = [index[0].indices(batch_size) for index in indices]
        rows = range(min(b[0] for b in bounds), max(b[1] for b in bounds))
        if len(rows) != len(set().union(*(range(b[0], b[1]) for b in bounds))):
            raise UserError(
                "this process would hold rows of the batch that are not next to each other; order the mesh so that data and "
                "fsdp go across processes before tensor"
            )
        return rows

    def global_batch(self, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """Puts this process's rows (numpy, [rows, …]) on its devices as parts of global arrays [batch_size, …]."""
        sharding = self.batch_sharding()
        return {
            name: jax.make_array_from_process_local_data(sharding, value, (batch_size, *value.shape[1:]))
            for name, value in batch.items()
        }

    def describe(self) -> str:
        """`data 4 × tensor 2`, or `one device`."""
        parts = [f"{axis} {size}" for axis, size in self.sizes.items() if size > 1]
        return " × ".join(parts) or "one device"

    def check(self, abstract: Any, batch_size: int, microbatches: int = 1) -> None:
        """Refuses what the mesh cannot cut evenly, and a mesh axis that cuts nothing.

        Args:
            abstract: tree of `nn.base.Spec`.
            batch_size: sequences in a global batch.

        Raises:
            UserError: says which numbers would do.
        """
        self._divides("batch", batch_size, batch_size // microbatches, microbatches)
        leaves = jax.tree.leaves(abstract, is_leaf=lambda x: hasattr(x, "axes"))
        # The batch goes over this axis too, but without experts that is what `data` is for.
        cut = set(self._mesh_axes("batch")) - set(self._mesh_axes("expert"))
        for leaf in leaves:
            for axis, size in zip(leaf.axes, leaf.shape, strict=True):
                cut.update(self._mesh_axes(axis))
                self._divides(axis, size, size)
        idle = [axis for axis, size in self.sizes.items() if size > 1 and axis not in cut]
        if idle:
            raise UserError(
                f"mesh.{idle[0]} is {self.sizes[idle[0]]}, but it would shard nothing in this run; set it to 1"
            )

    def _divides(self, axis: str | None, shown: int, size: int, microbatches: int = 1) -> None:
        parts = self.extent(axis)
        if size % parts == 0:
            return
        assert axis is not None
        names = "×".join(a for a in self._mesh_axes(axis) if self.mesh.shape[a] > 1)
        step = parts * microbatches
        below = shown // step * step
        ways = " or ".join(str(n) for n in (below, below + step) if n)
        split = f" in {microbatches} microbatches" if microbatches > 1 else ""
        raise UserError(
            f"{_FIELDS.get(axis, axis)} {shown}{split} is not divisible by mesh {names} = {parts}; use {ways}"
        )


def make_layout(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The mesh of a config over all devices, -1 taking what the other axes leave.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(n for n in sizes.values() if n != -1)
    wild = [axis for axis, n in sizes.items() if n == -1]
    asked = " × ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "mesh of 1"
    if wild:
        if len(devices) % fixed:
            raise UserError(
                f"mesh {asked} = {fixed} does not divide the {len(devices)} devices here; use axes whose product divides {len(devices)}"
                + (f", or --compute.cpu-devices {fixed}" if devices[0].platform == "cpu" else "")
            )
        sizes[wild[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise UserError(
            f"mesh {asked} needs {fixed} devices, but {len(devices)} are here; set one axis to -1 to take them all, "
            "or on a CPU give --compute.cpu-devices"
        )
    shape = tuple(sizes.values())
    axis_types = (AxisType.Auto,) * len(AXES)
    if devices == list(jax.devices()):
        return Layout(jax.make_mesh(shape, AXES, axis_types=axis_types))  # orders devices by the network's topology
    return Layout(Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=axis_types))


_current: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use(layout: Layout) -> Iterator[Layout]:
    """What is traced inside has its activations placed by `layout`."""
    token = _current.set(layout)
    try:
        with jax.set_mesh(layout.mesh):
            yield layout
    finally:
        _current.reset(token)


def parts(logical: str) -> int:
    """Into how many parts the layout in use cuts a logical axis; 1 outside `use`."""
    layout = _current.get()
    return 1 if layout is None else layout.extent(logical)


def batch_parts() -> int:
    """Into how many parts the layout in use cuts the batch; 1 outside `use`."""
    return parts("batch")


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Places an activation whose dimensions have these logical axes; nothing happens on one device or outside `use`."""
    layout = _current.get()
    if layout is None or layout.num_devices == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.ndim))


def per_device(
    f: Callable[..., jax.Array], in_axes: Sequence[Sequence[str | None]], out_axes: Sequence[str | None]
) -> Any:
    """`f` run by every device on its own parts of the arrays; `f` itself on one device or outside `use`.

    Inside `f`, the functions below move data between devices; where the layout cuts nothing they do nothing.

    Args:
        f: (array, …) -> array, of the parts that one device holds.
        in_axes: logical axes of each argument, which is brought to that placement first. A gradient is summed over the
            devices that hold the same part.
        out_axes: logical axes of the result.
    """
    layout = _current.get()
    if layout is None or layout.num_devices == 1:
        return f
    specs = tuple(layout.spec(axes) for axes in in_axes)
    # Unchecked: what a loop carries, and what a function with a gradient of its own returns, is not typed by device.
    return jax.shard_map(f, mesh=layout.mesh, in_specs=specs, out_specs=layout.spec(out_axes), check_vma=False)


def _cut(logical: str) -> tuple[str, ...]:
    """The mesh axes that cut a logical axis in the layout in use."""
    layout = _current.get()
    return () if layout is None else tuple(a for a in layout._mesh_axes(logical) if layout.mesh.shape[a] > 1)


def part(logical: str) -> jax.Array | int:
    """In `per_device`: the number of this device's part of a logical axis."""
    names = _cut(logical)
    return jax.lax.axis_index(names) if names else 0


def gather(x: jax.Array, logical: str, axis: int) -> jax.Array:
    """In `per_device`: the parts of all devices along a logical axis, joined at `axis`."""
    names = _cut(logical)
    return jax.lax.all_gather(x, names, axis=axis, tiled=True) if names else x


def scatter_sum(x: jax.Array, logical: str, axis: int) -> jax.Array:
    """In `per_device`: this device's part, along `axis`, of the sum over the devices along a logical axis."""
    names = _cut(logical)
    return jax.lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True) if names else x


def exchange(x: jax.Array, logical: str, split: int, join: int) -> jax.Array:
    """In `per_device`: part n along `split` goes to device n of a logical axis, and what arrives is joined at `join`."""
    names = _cut(logical)
    return jax.lax.all_to_all(x, names, split, join, tiled=True) if names else x
