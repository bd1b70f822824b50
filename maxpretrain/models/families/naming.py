"""How the tensors of a published file and our parameters are the same numbers: names and layouts, as data.

A family lists `Name`s. `{layer}` in a name runs over the layers that have the parameter, `{expert}` over experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

Form = Literal["linear", "conv1d", "heads", "plain", "row"]


@dataclasses.dataclass(frozen=True)
class Name:
    """One kind of tensor in the file.

    Attributes:
        theirs: its name there.
        ours: slash-separated path of the parameter; of several, the tensor holds all of them, one after the other.
        form: how a matrix lies there: "linear" [out, in], "conv1d" [in, out], "heads" [H, parts, K] rows of [out, in]
            (queries, keys and values of a head together), "plain" as ours, "row" a vector as [1, N]. A vector is
            plain under "linear" and "conv1d".
    """

    theirs: str
    ours: tuple[str, ...]
    form: Form = "linear"


def name(theirs: str, *ours: str, form: Form = "linear") -> Name:
    return Name(theirs, ours, form)


def linear(theirs: str, *ours: str, bias: bool, form: Form = "linear") -> list[Name]:
    """Kernel and bias of a linear layer: `theirs`.weight and .bias, `ours`/kernel and /bias."""
    names = [Name(f"{theirs}.weight", tuple(f"{o}/kernel" for o in ours), form)]
    if bias:
        names.append(Name(f"{theirs}.bias", tuple(f"{o}/bias" for o in ours), form))
    return names


def norm(theirs: str, ours: str, *, bias: bool) -> list[Name]:
    """Scale and bias of a norm."""
    names = [Name(f"{theirs}.weight", (f"{ours}/scale",))]
    return [*names, Name(f"{theirs}.bias", (f"{ours}/bias",))] if bias else names


def under(prefix: str, names: Iterable[Name], ours: str = "") -> list[Name]:
    """The names with a prefix of theirs and one of ours."""
    return [Name(prefix + n.theirs, tuple(ours + o for o in n.ours), n.form) for n in names]


def without(names: Iterable[Name], *paths: str) -> list[Name]:
    """The names but those of parameters below `paths`."""
    return [n for n in names if not any(o == p or o.startswith(f"{p}/") for o in n.ours for p in paths)]


def embedding(theirs: str, ours: str = "embed") -> Name:
    """A table [V, D], which lies there as here."""
    return Name(theirs, (f"{ours}/table",), "plain")


Names = Sequence[Name]
