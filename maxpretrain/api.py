"""A trained network in Python: `maxpretrain.load`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from maxpretrain.config import Run
from maxpretrain.errors import UserError
from maxpretrain.rundir import RunDirectory

if TYPE_CHECKING:  # pragma: no cover
    from maxpretrain.data.tokenizer import Tokenizer
    from maxpretrain.generate import Generator, Stream
    from maxpretrain.models import Model

Array = Any  # of numpy, of jax, or what numpy makes one of


def load(path: str | os.PathLike[str], step: int | None = None) -> LoadedRun:
    """A run's network with its parameters, ready to use.

    Args:
        path: a run directory, or a run's name under runs/.
        step: of the checkpoint; None: the last one.

    Raises:
        UserError: there is no such run.
        StorageError: there is no such checkpoint, or it is damaged.
    """
    directory = RunDirectory.open(path)
    step = directory.step(step)
    return LoadedRun(directory, step, directory.params(step), directory.tokenizer)


@dataclasses.dataclass
class LoadedRun:
    """What `load` returns.

    Attributes:
        directory: where it is from.
        step: of the checkpoint.
        params: nested dict of jax.Array.
        tokenizer: as it was trained with.
    """

    directory: RunDirectory
    step: int
    params: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def config(self) -> Run:
        return self.directory.config

    @cached_property
    def model(self) -> Model:
        """The network as functions of `params`."""
        return self.directory.model(scan=True)

    def logits(self, tokens: Array, mask: Array | None = None) -> np.ndarray:
        """Scores of every next token.

        Args:
            tokens: int [B, T], of numpy or jax.
            mask: [B, T], 1 for real tokens and 0 for padding, on either side. Positions count real tokens only, and what stands
                at padding has no influence on them. None: all are real.

        Returns:
            float32 [B, T, V]; nothing is said about the values at padding.

        Raises:
            UserError: a shape, an id or a length does not fit the model.
        """
        return self.outputs(tokens, mask)["logits"]

    def outputs(
        self, tokens: Array, mask: Array | None = None, token_types: Array | None = None
    ) -> dict[str, np.ndarray]:
        """Everything that the network says about a batch.

        Args:
            tokens, mask: as in `logits`.
            token_types: for networks that have them; a decoder has none.

        Returns:
            "hidden", float32 [B, T, D] after the last norm, and "logits", float32 [B, T, V].
        """
        if token_types is not None:
            raise UserError(f"token_types were given, and a {self.config.model.architecture} has none; leave them out")
        ids, real = self._checked(tokens, mask)
        return jax.device_get(self._forward(self.params, ids, real))

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 50,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stream: Stream | None = None,
    ) -> list[str]:
        """Continuations of texts, without the texts; see `maxpretrain.generate.Generator`."""
        if isinstance(prompts, str):
            raise UserError("prompts is one text; give a list of them, such as run.generate([text])")
        return self._generator(
            self.params,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stream=stream,
        )

    @cached_property
    def _generator(self) -> Generator:
        from maxpretrain.generate import Generator

        return Generator(self.model, self.tokenizer)

    @cached_property
    def _forward(self) -> Callable[[Any, np.ndarray, np.ndarray | None], dict[str, jax.Array]]:
        model = self.model

        def forward(params: Any, tokens: jax.Array, real: jax.Array | None) -> dict[str, jax.Array]:
            positions = segments = None
            if real is not None:
                segments = real.astype(jnp.int32)
                positions = jnp.maximum(jnp.cumsum(segments, axis=1, dtype=jnp.int32) - 1, 0)
            hidden = model.apply(params, tokens, positions, segments).hidden
            return {"hidden": hidden.astype(jnp.float32), "logits": model.logits(params, hidden)}

        return jax.jit(forward)

    def _checked(self, tokens: Array, mask: Array | None) -> tuple[np.ndarray, np.ndarray | None]:
        """int32 [B, T] and bool [B, T], or one sentence that says what is wrong with them."""
        ids, config = np.asarray(tokens), self.config.model
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"tokens are {ids.dtype} of shape {ids.shape}; give integers of shape [batch, length]")
        for wrong in ids[(ids < 0) | (ids >= config.vocab_size)][:1]:
            raise UserError(f"tokens hold the id {wrong}; the model's vocabulary is 0 to {config.vocab_size - 1}")
        real = None
        if mask is not None:
            given = np.asarray(mask)
            if given.shape != ids.shape or not np.isin(given, (0, 1)).all():
                raise UserError(
                    f"the mask has shape {given.shape} and tokens {ids.shape}; give 1 for each real token and 0 for padding"
                )
            real = given.astype(bool)
        longest = int((np.ones_like(ids) if real is None else real).sum(axis=1).max(initial=0))
        if config.position == "learned" and longest > config.max_length:
            raise UserError(
                f"{longest} tokens in a row are more than the {config.max_length} positions that the model learned; cut them"
            )
        return ids.astype(np.int32), real
