"""Between the tensors of a published file and our parameters, by the names that a family gives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from maxpretrain.errors import UserError
from maxpretrain.fingerprint import named_leaves, nested
from maxpretrain.models import Model
from maxpretrain.models.families.naming import Form, Name
from maxpretrain.nn.base import Spec

Read = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        theirs: its name.
        ours: the parameters it holds.
        index: where in them: () or (layer,) or (expert,) or (layer, expert), numbers along their leading axes.
        form: how it lies there.
    """

    theirs: str
    ours: tuple[str, ...]
    index: tuple[int, ...]
    form: Form


class Mapping:
    """The tensors of a model's file, each with the parameters it holds.

    Args:
        model: of which `abstract` says the shapes.
        names: of its family.

    Raises:
        ValueError: a parameter that no name holds, or two do; a name without a parameter: a mistake in the family's file.
    """

    def __init__(self, model: Model, names: Sequence[Name]):
        self.specs: dict[str, Spec] = named_leaves(model.abstract)
        self.tensors = [tensor for name in names for tensor in self._expanded(model, name)]
        held = [(ours, tensor.index) for tensor in self.tensors for ours in tensor.ours]
        if len(set(held)) < len(held):
            raise ValueError(f"parameters held by two tensors: {sorted({h for h in held if held.count(h) > 1})[:5]}")
        missing = set(self.specs) - {ours for ours, _ in held}
        if missing:
            raise ValueError(f"parameters that no tensor holds: {sorted(missing)}")

    def _expanded(self, model: Model, name: Name) -> Iterator[Tensor]:
        unknown = [ours for ours in name.ours if ours not in self.specs]
        if unknown:
            raise ValueError(f"{name.theirs} is said to hold {unknown[0]}, which this model has not")
        spec = self.specs[name.ours[0]]
        layers: list[int | None] = [None]
        if "{layer}" in name.theirs:
            network, _, kind = name.ours[0].split("/")[:3]
            layers = list(model.stacks[network].layers_of(kind))
        experts: list[int | None] = list(range(model.config.moe.num_experts)) if "{expert}" in name.theirs else [None]
        for at, layer in enumerate(layers):
            for expert in experts:
                index = (() if layer is None else (at,)) + (() if expert is None else (expert,))
                theirs = name.theirs.format(layer=layer, expert=expert)
                assert spec.stacked == (layer is not None), name
                yield Tensor(theirs, name.ours, index, name.form)

    def shapes(self, tensor: Tensor) -> list[tuple[int, ...]]:
        """Shapes of the parts of our parameters that a tensor holds."""
        return [self.specs[ours].shape[len(tensor.index) :] for ours in tensor.ours]

    def their_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Shape of a tensor in the file."""
        return _to_theirs([np.broadcast_to(np.float32(0), shape) for shape in self.shapes(tensor)], tensor).shape

    def load(self, read: Read, where: str) -> Iterator[tuple[str, np.ndarray]]:
        """Our parameters one by one, as (name, float32 array), each tensor read when its parameter is made.

        Args:
            read: a tensor of the file by name.
            where: the directory, for errors.

        Raises:
            UserError: a tensor has another shape than this model needs.
        """
        holding: dict[str, list[tuple[Tensor, int]]] = {}
        for tensor in self.tensors:
            for place, ours in enumerate(tensor.ours):
                holding.setdefault(ours, []).append((tensor, place))
        for ours, tensors in holding.items():
            whole = np.empty(self.specs[ours].shape, np.float32)
            for tensor, place in tensors:
                value, expected = read(tensor.theirs), self.their_shape(tensor)
                if value.shape != expected:
                    raise UserError(
                        f"{where}: {tensor.theirs} has shape {list(value.shape)}, and the config.json beside it makes "
                        f"{list(expected)}; take both from the same model"
                    )
                whole[tensor.index] = _to_ours(value, tensor, self.shapes(tensor))[place].astype(np.float32)
            yield ours, whole

    def store(self, params: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
        """The tensors of a file one by one: name, shape, and a function that makes it, float32, when it is written."""
        leaves = named_leaves(params)

        def make(tensor: Tensor) -> np.ndarray:
            parts = [np.asarray(leaves[ours][tensor.index], np.float32) for ours in tensor.ours]
            return np.ascontiguousarray(_to_theirs(parts, tensor))

        for tensor in self.tensors:
            yield tensor.theirs, self.their_shape(tensor), lambda tensor=tensor: make(tensor)


def as_tree(leaves: dict[str, Any]) -> dict[str, Any]:
    """Parameters by name as a nested dict."""
    return nested(leaves)


def _matrix(tensor: Tensor) -> bool:
    return tensor.form not in ("plain", "row") and tensor.ours[0].endswith("/kernel")


def _split(shape: tuple[int, ...], path: str) -> tuple[int, int]:
    """Inputs and outputs of a kernel: an output projection sums over heads and their width, all others over one axis."""
    inputs = len(shape) - 1 if path.endswith("/out/kernel") else 1
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def _to_theirs(parts: list[np.ndarray], tensor: Tensor) -> np.ndarray:
    """Ours, as [..., out]-last kernels or vectors, to one tensor of the file."""
    if tensor.form in ("plain", "row"):
        return parts[0] if tensor.form == "plain" else parts[0][None]
    if _matrix(tensor):
        rows = [p.reshape(_split(p.shape, o)).T for p, o in zip(parts, tensor.ours, strict=True)]
    else:
        rows = [p.reshape(-1) for p in parts]
    if tensor.form == "heads":
        heads = parts[0].shape[-2]
        rows = [np.stack([r.reshape(heads, -1, *r.shape[1:]) for r in rows], 1)]
        rows = [rows[0].reshape(-1, *rows[0].shape[3:])]
    joined = rows[0] if len(rows) == 1 else np.concatenate(rows)
    return joined.T if tensor.form == "conv1d" and _matrix(tensor) else joined


def _to_ours(value: np.ndarray, tensor: Tensor, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """One tensor of the file to the parameters it holds."""
    if tensor.form in ("plain", "row"):
        return [value.reshape(shapes[0])]
    matrix = _matrix(tensor)
    if tensor.form == "conv1d" and matrix:
        value = value.T
    sizes = [_split(s, o)[1] if matrix else math.prod(s) for s, o in zip(shapes, tensor.ours, strict=True)]
    if tensor.form == "heads":
        heads = shapes[0][-2]
        grouped = value.reshape(heads, len(shapes), -1, *value.shape[1:])
        rows = [grouped[:, i].reshape(-1, *value.shape[1:]) for i in range(len(shapes))]
    else:
        rows = np.split(value, np.cumsum(sizes)[:-1])
    return [(r.T if matrix else r).reshape(shape) for r, shape in zip(rows, shapes, strict=True)]
