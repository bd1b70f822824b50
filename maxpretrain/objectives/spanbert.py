"""SpanBERT: predict hidden spans token by token, from their context and again from their two outer neighbours."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.objectives import masking
from maxpretrain.objectives.base import Fields, Loss
from maxpretrain.objectives.masking import Masked

if TYPE_CHECKING:  # pragma: no cover
    import jax
    import numpy as np

    from maxpretrain.config import Run
else:
    np = lazy("numpy")

SPAN_POSITIONS = 200  # rows of the head's table of places: `models.heads.SPAN_POSITIONS`, which would import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanBERT(Masked):
    """L = mean MLM + w · mean SBO, the span boundary objective: token i of the span s … e from h[s−1], h[e+1] and i.

    Spans have l words, P(l) ∝ p(1 − p)^(l−1) for l up to `max_span`, begin where a word does, and are drawn until
    ⌈rate·n⌉ tokens of n are hidden; the last one ends there. Those that touch are one. `mask_share` and `random_share`
    are drawn once a span.

    Reference: Joshi et al. 2019, arXiv:1907.10529, §3 and the released code. There a packed row is one document.
    """

    geometric: float = 0.2  # p of the geometric distribution of a span's words
    max_span: int = 10  # words of a span at most
    max_targets: int = 15  # tokens of a span that its boundary predicts at most, the first ones
    boundary_weight: float = 1.0  # of the span boundary objective in the loss; 0: spans are masked, and that is all

    @property
    def heads(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("lm", "span_boundary") if self.boundary_weight else ("lm",)

    def validate(self, run: Run) -> None:
        super().validate(run)
        if not 0 < self.geometric < 1:
            raise UserError(f"objective.geometric is {self.geometric}; it must be between 0 and 1")
        if self.max_span < 1:
            raise UserError(f"objective.max_span is {self.max_span}; it must be at least 1")
        if not 1 <= self.max_targets <= SPAN_POSITIONS:
            raise UserError(
                f"objective.max_targets is {self.max_targets}; it must be between 1 and {SPAN_POSITIONS}, the places "
                "that the head span_boundary knows"
            )
        if self.boundary_weight < 0:
            raise UserError(f"objective.boundary_weight is {self.boundary_weight}; it must be at least 0")

    def budget(self, length: int) -> int:
        """Tokens that are hidden in a row of `length`: ⌈rate·length⌉, special tokens counted."""
        return math.ceil(self.rate * length)

    def fields(self, length: int) -> Fields:
        size = max(1, self.budget(length))
        fields = masking.row_fields(length) | masking.prediction_fields(size)
        fields |= dict.fromkeys(("left", "right", "span_places"), ((size,), "int32"))
        return fields | {"span_weights": ((size,), "float32")}

    def example(
        self, tokens: np.ndarray, rng: np.random.Generator, segments: np.ndarray | None = None, **more: np.ndarray
    ) -> dict[str, np.ndarray]:
        """A row with spans of its tokens hidden.

        Args:
            tokens: integer [n], n ≥ 1.
            segments: int32 [n], 1, 2, … by document; None: one document.

        Returns:
            As MLM's, and of each place "left" and "right", where the two neighbours of its span are, "span_places", its
            own number in the span from 0, int32 [M]; "span_weights" float32 [M], 1 where that is below `max_targets`.
        """
        vocabulary = self.vocabulary
        row = masking.framed(tokens, segments, vocabulary, mask_documents=self.mask_documents)
        whole = row["tokens"]
        places = np.flatnonzero(self.hidden(whole, row["segments"], rng))
        row |= masking.predictions(whole, places)
        opens = np.diff(places, prepend=-2) > 1
        span = np.cumsum(opens) - 1
        first = places[opens]
        last = places[np.append(opens[1:], True)] if len(places) else first
        inside = places - first[span]
        row |= {
            "left": first[span] - 1,
            "right": last[span] + 1,
            "span_places": np.minimum(inside, self.max_targets - 1),
            "span_weights": (inside < self.max_targets).astype(np.float32),
        }
        shares = {"mask_share": self.mask_share, "random_share": self.random_share}
        row["tokens"] = masking.corrupted(whole, places, rng, vocabulary, groups=span, **shares)
        return masking.filled(row, self.fields(len(tokens) - self.raw_length(0)))

    def hidden(self, tokens: np.ndarray, segments: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Which tokens of a row are hidden, bool [T]: no special ones, and neither the first nor the last of a segment,
        so that both neighbours of every span are there, in the same segment.

        Args:
            tokens, segments: int32 [T], without padding.
        """
        within = segments[1:] == segments[:-1]
        allowed = ~self.vocabulary.is_special[tokens]
        allowed[1:] &= within
        allowed[:-1] &= within
        allowed[:1] = allowed[-1:] = False
        words = masking.words_of(tokens, segments, allowed, self.vocabulary)
        lengths = words.ends - words.starts
        anchors = masking.tokens_of(words.starts, words.ends)
        left = min(self.budget(len(tokens)), len(anchors))
        anchors, word_of = anchors.tolist(), np.repeat(np.arange(len(lengths)), lengths).tolist()
        starts, ends, joined = words.starts.tolist(), words.ends.tolist(), words.joined.tolist()
        taken = bytearray(len(tokens))
        while left:
            for drawn, size in self._draws(len(anchors), rng):
                if taken[anchors[drawn]]:
                    continue  # another anchor, and another length
                word = word_of[drawn]
                for number in range(size):
                    if number and not joined[word + number - 1]:
                        break
                    for place in range(starts[word + number], ends[word + number]):
                        if left and not taken[place]:
                            taken[place] = 1
                            left -= 1
                if not left:
                    break
        return np.frombuffer(taken, bool)

    def span_shares(self) -> np.ndarray:
        """How often a span of 1 … max_span words is drawn: float64 [max_span]."""
        weights = self.geometric * (1 - self.geometric) ** np.arange(self.max_span)
        return weights / weights.sum()

    def _draws(self, anchors: int, rng: np.random.Generator, count: int = 64) -> zip[tuple[int, int]]:
        """Numbers of tokens to begin at, and words to go on for."""
        sizes = 1 + np.searchsorted(np.cumsum(self.span_shares())[:-1], rng.random(count), "right")
        return zip(rng.integers(anchors, size=count).tolist(), sizes.tolist(), strict=True)

    def normalized(self, batch: dict[str, jax.Array], step: jax.Array | None = None) -> dict[str, jax.Array]:
        return batch | {"span_scale": masking.scale(batch["weights"], batch["span_weights"])}

    def combined(self, means: dict[str, float]) -> float:
        # A text without any span has no mean of either.
        return means["mlm_loss"] + (self.boundary_weight * means["span_boundary_loss"] if self.boundary_weight else 0.0)

    def loss(self, model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Loss:
        from maxpretrain.objectives.cross_entropy import gathered, token_cross_entropy

        output = model.apply(params, batch["tokens"], batch["positions"], batch["segments"], key)
        hidden = gathered(output.hidden, batch["places"])
        total, sums = token_cross_entropy(model, params, hidden, batch["labels"], batch["weights"])
        weight = batch["weights"].sum()
        metrics = {"accuracy": (sums["correct"].sum(), weight), "mlm_loss": (total, weight)}
        if not self.boundary_weight:
            return Loss(total, weight, metrics, output.aux)
        batch = batch if "span_scale" in batch else self.normalized(batch)
        of_spans, sums = boundary_cross_entropy(model, params, output.hidden, batch)
        targets = batch["span_weights"].sum()
        metrics |= {
            "span_boundary_loss": (of_spans, targets),
            "span_boundary_accuracy": (sums["correct"].sum(), targets),
        }
        total = total + self.boundary_weight * batch["span_scale"].max() * of_spans
        return Loss(total, weight, metrics, output.aux)


def boundary_cross_entropy(
    model: Any, params: Any, hidden: jax.Array, batch: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy of the tokens of spans, each from the states of its span's two outer neighbours and its place.

    Args:
        model: with the head "span_boundary".
        hidden: [B, T, D], read at "left" and "right" alone.
        batch: the fields of `SpanBERT.example`, with a leading axis B.

    Returns:
        As `token_cross_entropy`.
    """
    import jax.numpy as jnp

    from maxpretrain.objectives.cross_entropy import chunked_cross_entropy, gathered

    def scores(head: Any, sides: jax.Array, places: jax.Array) -> jax.Array:
        left, right = jnp.split(sides, 2, -1)
        return model.span_logits(head, left, right, places)

    head = {"embed": params["embed"], "heads": {"span_boundary": params["heads"]["span_boundary"]}}
    sides = jnp.concatenate([gathered(hidden, batch[side]) for side in ("left", "right")], -1)
    labels, weights, places = (batch[name] for name in ("labels", "span_weights", "span_places"))
    return chunked_cross_entropy(scores, head, sides, labels, weights, places, chunk_tokens=model.execution.loss_chunk)
