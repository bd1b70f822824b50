"""What predicts the tokens after the next one: heads side by side on one trunk, or modules one after another."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maxpretrain.config import ModelConfig
from maxpretrain.models import Model, Params
from maxpretrain.models.network import Output
from maxpretrain.nn import base
from maxpretrain.nn import init as inits
from maxpretrain.nn.attend import Context
from maxpretrain.nn.linear import Linear
from maxpretrain.nn.norm import RMSNorm, make_norm
from maxpretrain.nn.stack import REMAT_POLICIES, Block, Execution, Kind, Statistics

NAME = "multi_token"  # of the parameters


def layer_config(config: ModelConfig) -> ModelConfig:
    """A network of one layer, which is like the last of `config`: what each further token adds."""
    last = config.num_layers - 1
    moe = config.moe
    if last in moe.dense_layers:
        moe = dataclasses.replace(moe, num_experts=0)
    return dataclasses.replace(
        config,
        num_layers=1,
        moe=dataclasses.replace(moe, dense_layers=()),
        layer_pattern=("local" if config.is_local(last) else "global",),
        layer_groups=None,
    )


class Join(base.Module):
    """W·[norm(embedding); norm(hidden)], the token before the state of all before it, as in the released weights.

    Reference: DeepSeek-AI 2024, arXiv:2412.19437, eq. 21, which has the two in the other order.
    """

    def __init__(self, config: ModelConfig):
        inputs = config.embed_width + config.model_dim
        self.token_norm = RMSNorm(config.embed_width, config.norm_eps)
        self.hidden_norm = RMSNorm(config.model_dim, config.norm_eps)
        initializer = inits.matrix(config, inputs, config.model_dim)
        self.project = Linear({"embedded": inputs}, {"embed": config.model_dim}, initializer, bias=False)

    def __call__(self, tokens: jax.Array, hidden: jax.Array) -> jax.Array:
        """[B, T, E] and [B, T, D] -> [B, T, D]."""
        return self.project(jnp.concatenate([self.token_norm(tokens), self.hidden_norm(hidden)], -1))


class Layers(base.Module):
    """One block for each further token, under the name that a stack has for its kind."""

    def __init__(self, config: ModelConfig):
        self.kind = Kind(experts=layer_config(config).moe.num_experts > 0)
        setattr(self, self.kind.name, Block(config, self.kind))

    @property
    def layer(self) -> Block:
        return getattr(self, self.kind.name)


class Further(base.Module):
    """`depth` blocks, and what else the form has; all parameters are stacked."""

    def __init__(self, config: ModelConfig, execution: Execution, *, sequential: bool, depth: int):
        with base.stacked(depth):
            self.stack = Layers(config)
            self.join = Join(config) if sequential else None
            self.norm = make_norm(config) if sequential and config.final_norm else None
        self.config, self.execution, self.depth = config, execution, depth

    def __call__(
        self, hidden: jax.Array, tokens: jax.Array | None, context: Context, key: jax.Array | None
    ) -> tuple[jax.Array, Statistics]:
        """[B, T, D] -> [depth, B, T, D], before the final norm where the form has none of its own.

        Args:
            tokens: [depth, B, T, E], vectors of the tokens k = 1 … depth places on; None in the parallel form.
        """
        local = self.config.is_local(self.config.num_layers - 1)

        def body(further: Further, hidden: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            vectors, key = inputs
            x = hidden if further.join is None else further.join(vectors, hidden)
            x, _, statistics = further.stack.layer(x, context, key=key, local=local)
            y = x if further.norm is None else further.norm(x)
            return hidden if further.join is None else x, (y, statistics)

        remat = self.execution.remat
        keys = None if key is None else jax.random.split(key, self.depth)
        return base.scan(
            self,
            body,
            hidden,
            (tokens, keys),
            loop=self.execution.scan,
            remat=remat != "none",
            checkpoint_policy=REMAT_POLICIES.get(remat),
        )[1]


class MultiTokenModel(Model):
    """A decoder, with what predicts `depth` further tokens in `params["multi_token"]`.

    parallel      z = what goes into the last layer; the last layer is the head of the next token, and a further one of
                  its own is that of each further token: h_k = norm(layer_k(z)), with the decoder's final norm.
    sequential    x_0 = the decoder's hidden states (after its final norm, as the released model hands them on);
                  x_k = layer_k(W_k·[norm(embedding of the token k places on); norm(x_{k−1})]); h_k = norm_k(x_k).

    Both then unembed h_k with the decoder's unembedding. Everything else is that of `Model`, which leaves these aside.

    References: Gloeckle et al. 2024, arXiv:2404.19737, §2; DeepSeek-AI 2024, arXiv:2412.19437, §2.2, and the released
    weights, whose output head has a norm of its own in each module.
    """

    def __init__(self, config: ModelConfig, execution: Execution, *, form: str, depth: int):
        super().__init__(config, execution)
        self.sequential = form == "sequential"
        self._further = base.Template(Further(config, execution, sequential=self.sequential, depth=depth))
        self.abstract = self.abstract | {NAME: self._further.abstract}

    def predict(
        self,
        params: Params,
        tokens: jax.Array,
        further_tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Output, jax.Array]:
        """What `apply` returns, the experts of the further layers after its own; and hidden states [depth, B, T, D].

        Args:
            tokens, positions, segments, key: see `Model.apply`.
            further_tokens: int32 [B, depth, T], the tokens k = 1 … depth places after each; any where there is none.
                The parallel form does not look at them.
        """
        network, further = self._bind(params), self._further.bind(params[NAME])
        parallel = not self.sequential
        output, _ = network(tokens, positions=positions, segments=segments, key=key, penultimate=parallel)
        start = output.penultimate if parallel else output.hidden
        vectors = None
        if self.sequential:
            vectors = jnp.stack([network.look_up(further_tokens[:, k]) for k in range(further_tokens.shape[1])])
        context = network.trunk.context(start, positions, segments)
        with jax.named_scope(NAME):
            # The decoder's own dropout is that of the same network without further tokens.
            hidden, statistics = further(start, vectors, context, None if key is None else jax.random.fold_in(key, 1))
            if parallel and network.trunk.norm is not None:
                hidden = network.trunk.norm(hidden)
        aux = output.aux
        if statistics:
            join = lambda a, b: jnp.concatenate([a, b])  # noqa: E731
            aux = jax.tree.map(join, aux, statistics) if aux else statistics
        return output._replace(aux=aux), hidden
