"""How a network declares parameters, and how plain dicts of arrays become a network. The only file that touches flax.nnx.

A module's constructor declares parameters (`param`) without allocating them. `Template` turns the tree of modules into
one nested dict of `Spec`, from which initialization, sharding, checkpoints, counts and name maps are derived, and binds
a dict of arrays of the same structure back to the modules for a forward pass.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Module = nnx.Module
Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]
# A "buffer" is stored and sharded like a parameter, but no gradient reaches it, and it does not count as one.
ROLES = ("matrix", "embedding", "position", "bias", "norm", "buffer")

# Parameters declared inside `stacked(n)` get a leading axis of n layers.
_stack: contextvars.ContextVar[int | None] = contextvars.ContextVar("stack", default=None)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A declared parameter.

    Attributes:
        shape: with the leading axis of layers where `stacked`.
        axes: logical axis of each dimension; None is never sharded. `mesh.py` resolves them.
        init: (key, shape of one layer) -> float32 array.
        role: one of ROLES; weight decay and update rules go by it.
        stacked: the first axis counts layers, each initialized from a key of its own.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    role: str
    dtype: str = "float32"
    stacked: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"shape {self.shape} has {len(self.shape)} dimensions, but {len(self.axes)} logical axes {self.axes}"
            )
        if self.role not in ROLES:
            raise ValueError(f'role "{self.role}" is none of {ROLES}')

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))


def is_spec(leaf: Any) -> bool:
    return isinstance(leaf, Spec)


def param(shape: tuple[int, ...], axes: tuple[str | None, ...], init: Initializer, role: str) -> nnx.Param:
    """Declares a parameter; inside `stacked(n)` there are n of it. Read it in a forward pass as `self.name[...]`."""
    layers = _stack.get()
    if layers is None:
        return nnx.Param(Spec(shape, axes, init, role))
    return nnx.Param(Spec((layers, *shape), ("layers", *axes), init, role, stacked=True))


@contextlib.contextmanager
def stacked(layers: int) -> Iterator[None]:
    """Modules constructed inside stand for `layers` of themselves, their parameters stacked; run them with `scan`."""
    token = _stack.set(layers)
    try:
        yield
    finally:
        _stack.reset(token)


class Template:
    """A tree of modules with its parameters taken out."""

    def __init__(self, module: Module):
        self._graph, self._state = nnx.split(module)
        self.abstract: dict[str, Any] = nnx.to_pure_dict(self._state)

    def bind(self, params: dict[str, Any]) -> Any:
        """The module holding `params`; a leaf missing from `params` stays a Spec, which fails where it is used.

        What the network has no use for, such as parameters that an objective added, is left aside.
        """
        params = {name: params[name] for name in self.abstract if name in params}
        # tree.map makes fresh Variables: binding twice at once (value and gradient) must not share them.
        state = jax.tree.map(lambda spec: spec, self._state, is_leaf=is_spec)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)


def init(abstract: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """Parameters drawn as declared. A leaf's key comes from its path, so adding a parameter changes no other."""

    def leaf(path: Any, spec: Spec) -> jax.Array:
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        if not spec.stacked:
            return spec.init(own, spec.shape).astype(spec.dtype)
        keys = jax.random.split(own, spec.shape[0])
        return jax.vmap(lambda k: spec.init(k, spec.shape[1:]))(keys).astype(spec.dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract, is_leaf=is_spec)


@jax.custom_vjp
def _unstack(stacked_array: jax.Array) -> list[jax.Array]:
    return [stacked_array[i] for i in range(stacked_array.shape[0])]


# The transpose of indexing adds L padded arrays of the full size; stacking the parts writes each once.
_unstack.defvjp(lambda x: (_unstack(x), None), lambda _, parts: (jnp.stack(parts),))


def scan(
    module: Module,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    *,
    loop: bool,
    layers: Sequence[int] | None = None,
    checkpoint_policy: Callable[..., Any] | None = None,
    remat: bool = False,
) -> tuple[Any, Any]:
    """Runs `body(layer, carry, x) -> (carry, y)` over the layers of a stacked module, as `jax.lax.scan` would.

    Args:
        module: made inside `stacked(n)` and bound to arrays.
        xs: pytree of arrays with a leading axis of as many as there are passes, or None leaves.
        loop: one compiled loop (compiles fast) or n copies (runs faster on CPU). Same values either way.
        layers: which layer's parameters each pass has, some perhaps several times; None: each once, in order.
        remat: recompute the layer in the backward pass, but for what `checkpoint_policy` saves.
    """
    graph, state = nnx.split(module)
    step = lambda carry, inputs: body(nnx.merge(graph, inputs[0]), carry, inputs[1])  # noqa: E731
    if remat:
        # Inside a scan CSE cannot merge the recomputation with the forward pass; unrolled it would, undoing the remat.
        step = jax.checkpoint(step, policy=checkpoint_policy, prevent_cse=not loop)
    if layers is not None:
        low, high = min(layers), max(layers) + 1
        if high - low < _leading(state):  # a gradient is then of these alone, until it is padded once
            state, layers = jax.tree.map(lambda a: a[low:high], state), [i - low for i in layers]
    if loop and layers is not None and len(set(layers)) < len(layers):
        # Shared by several passes, parameters stay where they are; only the number of the layer goes through the loop.
        taken = jnp.asarray(layers, jnp.int32)
        return jax.lax.scan(lambda c, i: step(c, (jax.tree.map(lambda a: a[i[0]], state), i[1])), carry, (taken, xs))
    if loop:  # in a row: other layers come between runs
        return jax.lax.scan(step, carry, (state, xs))
    order = range(_leading(state)) if layers is None else layers
    parts, structure = jax.tree.flatten(state)
    columns = [_unstack(leaf) for leaf in parts]
    rows = [jax.tree.unflatten(structure, [column[i] for column in columns]) for i in order]
    ys = []
    for i, row in enumerate(rows):
        carry, y = step(carry, (row, jax.tree.map(lambda a: a[i], xs)))  # noqa: B023
        ys.append(y)
    return carry, jax.tree.map(lambda *arrays: jnp.stack(arrays), *ys)


def _leading(state: Any) -> int:
    return jax.tree.leaves(state)[0].shape[0]
