"""Prefix language modelling: read the beginning of a document in both directions, predict the rest."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.objectives.base import Fields, Loss, Objective, Work

if TYPE_CHECKING:  # pragma: no cover
    import jax
    import numpy as np

    from maxpretrain.config import ModelConfig, Run
else:
    np = lazy("numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM(Objective):
    """L = −Σ_{t > c} log p(x[t] | x[<t]): each document of a row is cut at a uniform point c, neither part empty.

    A decoder's tokens x[≤c] see each other in both directions. An encoder-decoder's encoder reads them, with eos at
    their end where the vocabulary has one, and its decoder reads the start token and then the rest. Rows are the same
    for both: with shapes that may not depend on c, either stack has to be as long as the row.

    A document that goes on beyond the row has no eos in the rest, unlike T5's, whose targets all end with one.

    Reference: Raffel et al. 2020, arXiv:1910.10683, §3.2.1, §3.2.3 and §3.3.1.
    """

    label_smoothing: float = 0.0  # share of the target spread evenly over the vocabulary
    z_loss: float = 0.0  # weight of log²Z, which keeps the normalizer near 1; 1e-4 is usual

    architectures: ClassVar[tuple[str, ...]] = ("decoder", "encoder-decoder")
    perplexity: ClassVar[bool] = True
    both_ways: ClassVar[bool] = True

    def validate(self, run: Run) -> None:
        super().validate(run)
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"objective.label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        if self.z_loss < 0:
            raise UserError(f"objective.z_loss is {self.z_loss}; it must be at least 0")
        if run.batch.length < 2:
            raise UserError(
                f"batch.length is {run.batch.length}; a prefix and something to predict need at least 2 tokens"
            )
        if run.model.architecture == "encoder-decoder" and run.model.decoder_start_id is None:
            raise UserError(
                "model.decoder_start_id is None; set it to the id that the decoder begins with, such as 0 (T5) or that "
                "of eos (BART)"
            )

    def raw_length(self, length: int) -> int:
        return length

    def fields(self, length: int) -> Fields:
        numbers = dict.fromkeys(("tokens", "labels", "segments", "positions"), ((length,), "int32"))
        return {**numbers, "weights": ((length,), "float32"), "prefix": ((length,), "bool")}

    def work(self, model: ModelConfig, length: int) -> list[Work]:
        return [Work(model, length, length if model.architecture == "encoder-decoder" else 0, length)]

    def example(
        self, tokens: np.ndarray, rng: np.random.Generator, segments: np.ndarray | None = None, **more: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The row itself, with each token's label where that is part of a rest.

        Args:
            tokens: integer [n], n ≥ 1.
            rng: draws one number a document.
            segments: int32 [n], 1, 2, … by document, 0 for padding at the end; None: one document.

        Returns:
            The arrays of `fields(n)`. A document of m tokens has a prefix of c, 1 ≤ c < m; the label of its token t is
            token t + 1, with weight 1 from t = c − 1 on, but for the last. One token alone is a prefix.
        """
        tokens = tokens.astype(np.int32)
        segments = np.ones_like(tokens) if segments is None else segments.astype(np.int32)
        real = segments > 0
        begins = np.ones(len(tokens), bool)
        begins[1:] = segments[1:] != segments[:-1]
        starts = np.flatnonzero(begins)
        document = np.cumsum(begins) - 1
        sizes = np.diff(starts, append=len(tokens))
        cut = rng.integers(1, np.maximum(sizes, 2))
        positions = (np.arange(len(tokens)) - starts[document]).astype(np.int32)
        prefix = (positions < cut[document]) & real
        predicted = np.zeros(len(tokens), bool)
        predicted[:-1] = (real & ~prefix & ~begins)[1:]
        return {
            "tokens": np.where(real, tokens, 0),
            "labels": np.where(predicted, np.roll(tokens, -1), 0),
            "weights": predicted.astype(np.float32),
            "segments": segments,
            "positions": np.where(real, positions, 0),
            "prefix": prefix,
        }

    def measured(self) -> PrefixLM:
        return self.replace(label_smoothing=0.0, z_loss=0.0)

    def loss(self, model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Loss:
        from maxpretrain.objectives.cross_entropy import label_loss

        given = {name: batch[name] for name in ("tokens", "positions", "segments", "prefix")}
        if model.config.architecture == "encoder-decoder":
            eos = None if self.bound is None else self.bound.eos_id
            given = encoder_decoder(batch, start_id=model.config.decoder_start_id, eos_id=eos)
        output = model.apply(params, key=key, **given)
        return label_loss(model, params, output, batch, label_smoothing=self.label_smoothing, z_loss=self.z_loss)


def shift_right(tokens: jax.Array, segments: jax.Array, start_id: int) -> jax.Array:
    """What a decoder reads so as to predict `tokens`: those before, and the start token where a segment begins.

    Args:
        tokens, segments: int32 [B, T]; segment 0 is padding.

    Returns:
        int32 [B, T], 0 in the padding.

    Reference: Raffel et al. 2020, arXiv:1910.10683 (released code), for packed rows.
    """
    import jax.numpy as jnp

    before = lambda x: jnp.pad(x, [(0, 0), (1, 0)])[:, :-1]  # noqa: E731
    shifted = jnp.where(segments == before(segments), before(tokens), start_id)
    return jnp.where(segments > 0, shifted, 0)


def encoder_decoder(batch: dict[str, jax.Array], *, start_id: int, eos_id: int | None) -> dict[str, jax.Array]:
    """The rows [B, T] of `PrefixLM` as what an encoder-decoder reads: each token stays at its place, in one of the two.

    Returns:
        "tokens", "segments", "positions" of the encoder: prefixes, with eos in the place of the first token after it;
        "decoder_tokens", "decoder_segments", "decoder_positions": those that predict, each document's from position 0.
    """
    import jax
    import jax.numpy as jnp

    segments, prefix = batch["segments"], batch["prefix"]
    before = lambda x: jnp.pad(x, [(0, 0), (1, 0)])[:, :-1]  # noqa: E731
    rest = jnp.logical_not(prefix) & (segments > 0)
    predicts = jnp.pad(rest, [(0, 0), (0, 1)])[:, 1:] & (jnp.pad(segments, [(0, 0), (0, 1)])[:, 1:] == segments)
    after = rest & before(prefix)
    tokens = jnp.where(prefix, batch["tokens"], 0)
    if eos_id is not None:
        tokens, prefix = jnp.where(after, eos_id, tokens), jnp.logical_or(prefix, after)
    decoder_segments = jnp.where(predicts, segments, 0)
    begins = decoder_segments != before(decoder_segments)
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    return {
        "tokens": tokens,
        "segments": jnp.where(prefix, segments, 0),
        "positions": jnp.where(prefix, batch["positions"], 0),
        "decoder_tokens": shift_right(batch["labels"], decoder_segments, start_id),
        "decoder_segments": decoder_segments,
        "decoder_positions": jnp.where(predicts, index - first, 0),
    }
