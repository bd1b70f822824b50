"""Two encoders trained together: a generator that fills masks, and a discriminator that finds what it filled in wrongly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from maxpretrain.config import ModelConfig
from maxpretrain.fingerprint import named_leaves, nested
from maxpretrain.models import Model, Params
from maxpretrain.nn import init as inits
from maxpretrain.nn.stack import Execution

# What two networks can share of their input: the vectors of tokens, of positions, and of token types.
TABLES = ("embed/table", "encoder/input/positions/table", "encoder/input/token_types/table")


class Paired(Model):
    """A discriminator, which is the network as all others see it, with a generator in `params["generator"]`.

    Sharing of the tables E of the input, of those that both networks have:
        "shared"        one table for both: gradients of both networks reach it, and the generator's parameters lack it.
        "none"          each has its own.
        "disentangled"  the generator's is E_G; the discriminator's is stop_gradient(E_G) + E_Δ. In its place `params` holds
                        E_Δ, zero at first: what the discriminator learns does not pull on the generator's table.

    Attributes:
        generator: its network as functions of `generator_params(params)`.
        tables: names of what is shared.

    References: Clark et al. 2020, arXiv:2003.10555, §3.2; disentangled: He et al. 2021, arXiv:2111.09543, §3.3.
    """

    def __init__(self, config: ModelConfig, generator: ModelConfig, execution: Execution, *, sharing: str = "shared"):
        super().__init__(config, execution)
        self.generator = Model(generator, execution)
        self.sharing = sharing
        ours, theirs = named_leaves(self.abstract), named_leaves(self.generator.abstract)
        self.tables = tuple(name for name in TABLES if sharing != "none" and name in ours and name in theirs)
        for name in self.tables:
            if ours[name].shape != theirs[name].shape:
                raise ValueError(f"{name} has shape {ours[name].shape} and, in the generator, {theirs[name].shape}")
        if sharing == "shared":
            theirs = {name: spec for name, spec in theirs.items() if name not in self.tables}
        if sharing == "disentangled":
            ours |= {name: dataclasses.replace(ours[name], init=inits.zeros) for name in self.tables}
        self.abstract = nested(ours) | {"generator": nested(theirs)}

    def plain(self, params: Params) -> Params:
        """The discriminator's parameters, its tables added up."""
        if "generator" not in params:
            return params  # they are already, or those of a head alone
        own: dict[str, Any] = {name: params[name] for name in self._template.abstract}
        if self.sharing != "disentangled":
            return own
        ours, theirs = named_leaves(own), named_leaves(params["generator"])
        return nested(ours | {name: jax.lax.stop_gradient(theirs[name]) + ours[name] for name in self.tables})

    def generator_params(self, params: Params) -> Params:
        """The generator's parameters, with the tables that it shares."""
        if self.sharing != "shared":
            return params["generator"]
        ours, theirs = named_leaves(params), named_leaves(params["generator"])
        return nested(theirs | {name: ours[name] for name in self.tables})

    def networks(self, params: Params) -> dict[str, tuple[ModelConfig, Params]]:
        return super().networks(params) | {"generator": (self.generator.config, self.generator_params(params))}

    @property
    def speaking(self) -> tuple[ModelConfig, Callable[[Params], Params]]:
        return self.generator.config, self.generator_params

    def keeps_like(self, other: Model) -> bool:
        return super().keeps_like(other) and isinstance(other, Paired) and self.sharing == other.sharing

    def adopted(self, plain: Params, fresh: Params) -> Params:
        """`fresh` with a plain network as its discriminator; its generator is beside it, or stays as it is.

        With "disentangled" the tables hold by what those of the discriminator differ from the generator's.
        """
        params = super().adopted(plain, fresh)
        if self.sharing != "disentangled":
            return params
        ours, theirs = named_leaves(params), named_leaves(params["generator"])
        return nested(ours | {name: ours[name] - theirs[name] for name in self.tables})
