"""Masked language modelling: predict hidden tokens from both sides; with or without a decision on a pair of texts."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.objectives import masking
from maxpretrain.objectives.base import Fields, Loss
from maxpretrain.objectives.masking import Masked

if TYPE_CHECKING:  # pragma: no cover
    import jax
    import numpy as np

    from maxpretrain.config import Run
    from maxpretrain.objectives import pairs
    from maxpretrain.vocabulary import Vocabulary
else:
    np, pairs = lazy("numpy"), lazy("maxpretrain.objectives.pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLM(Masked):
    """L = −mean log p(x[i] | corrupted x) over the masked places i, plus the mean cross entropy of the pairs, if any.

    The default is BERT's. RoBERTa: count="roberta". ALBERT: ngram=3, whole_word=True, pair="sop". ModernBERT: rate=0.3.
    NeoBERT: rate=0.2, mask_share=1.0, random_share=0.0.

    References: Devlin et al. 2018, arXiv:1810.04805, §3.1; Liu et al. 2019, arXiv:1907.11692, §4; Lan et al. 2019,
    arXiv:1909.11942, §3.1 and §4.1.
    """

    # How many of n tokens (special ones count): "exact" max(1, rate·n) rounded half to even (BERT), "roberta" rate·n
    # rounded up or down at random, so that the mean is exact, "bernoulli" each by itself (the Hugging Face collator).
    count: Literal["exact", "roberta", "bernoulli"] = "exact"  # how many tokens of a row are predicted
    max_predictions: int | None = None  # at most so many a row; None: no limit
    whole_word: bool = False  # all pieces of a word or none; a word that would be too much is passed over
    ngram: int = 1  # 1 to so many neighbours at once, n as often as 1/n: tokens, or words with whole_word (ALBERT: 3)
    pair: Literal["none", "nsp", "sop"] = "none"  # besides: does the second text follow (nsp); are both swapped (sop)
    short_share: float = 0.1  # of the pairs, the share that is cut to a random length

    @property
    def partner(self) -> bool:  # type: ignore[override]
        return self.pair == "nsp"

    @property
    def heads(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("lm",) if self.pair == "none" else ("lm", "pooler", "pair")

    def validate(self, run: Run) -> None:
        super().validate(run)
        if self.ngram < 1:
            raise UserError(f"objective.ngram is {self.ngram}; it must be at least 1")
        if self.max_predictions is not None and self.max_predictions < 1:
            raise UserError(f"objective.max_predictions is {self.max_predictions}; it must be at least 1, or None")
        if self.count == "bernoulli" and self.max_predictions is not None:
            raise UserError(
                f'objective.max_predictions is {self.max_predictions}, and objective.count "bernoulli" has no limit; '
                'use None, or count "exact" or "roberta"'
            )
        if self.count == "bernoulli" and self.ngram > 1:
            raise UserError(
                f'objective.ngram is {self.ngram}, and objective.count "bernoulli" masks each by itself; use "exact" '
                'or "roberta"'
            )
        if not 0 <= self.short_share <= 1:
            raise UserError(f"objective.short_share is {self.short_share}; it must be in [0, 1]")
        if self.pair != "none":
            self._validate_pairs(run)

    def _validate_pairs(self, run: Run) -> None:
        if run.model.token_types < 2:
            raise UserError(
                f'objective.pair "{self.pair}" tells two texts apart by their token type; model.token_types is '
                f"{run.model.token_types}, use 2"
            )
        if not self.mask_documents:
            raise UserError(
                f'objective.pair "{self.pair}" fills the rest of a row with other documents, which the pair must not '
                "see; leave objective.mask_documents on"
            )
        if run.batch.length < 5:
            raise UserError(
                f'batch.length is {run.batch.length}; objective.pair "{self.pair}" needs at least 5: two texts of one '
                "token, and bos and eos around them"
            )

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        super().check_vocabulary(vocabulary)
        missing = [name for name in ("bos", "eos") if getattr(vocabulary, f"{name}_id") is None]
        if self.pair != "none" and missing:
            raise UserError(
                f'objective.pair "{self.pair}" puts bos and eos around its texts, and the tokenizer has no {missing[0]}'
                "; use one that has, or leave tokenizer.path out and let the run train its own"
            )

    def raw_length(self, length: int) -> int:
        return super().raw_length(length) - (self.pair != "none")  # one more eos

    def budget(self, length: int) -> int:
        """The most predictions that a row of `length` tokens can have."""
        if self.count == "bernoulli":
            return length
        if self.count == "exact":
            return masking.exact_count(self.rate, length, self.max_predictions)
        most = math.ceil(self.rate * length)
        return most if self.max_predictions is None else min(most, self.max_predictions)

    def fields(self, length: int) -> Fields:
        fields = masking.row_fields(length) | masking.prediction_fields(self.budget(length))
        return fields if self.pair == "none" else fields | pairs.fields(length)

    def example(
        self, tokens: np.ndarray, rng: np.random.Generator, segments: np.ndarray | None = None, **more: np.ndarray
    ) -> dict[str, np.ndarray]:
        """A row with some of its tokens hidden.

        Args:
            tokens: integer [n], n ≥ 1.
            segments: int32 [n], 1, 2, … by document; None: one document.
            more: `partner` integer [at most n], the beginning of another document, for the pair "nsp"; zeros at its end
                do not count.

        Returns:
            "tokens" (corrupted), "segments", "positions" int32 [T]; "places", "labels" int32 [M] and "weights" float32
            [M], 1 where there is a prediction, M = budget(T); with a pair also those of `pairs.fields`.
        """
        vocabulary = self.vocabulary
        if self.pair == "none":
            row = masking.framed(tokens, segments, vocabulary, mask_documents=self.mask_documents)
        else:
            row = pairs.paired(
                tokens,
                segments,
                rng,
                vocabulary,
                kind=self.pair,
                short_share=self.short_share,
                partner=more.get("partner"),
            )
        whole = row["tokens"]
        places = self.places(whole, row["segments"], rng)
        row |= masking.predictions(whole, places)
        row["tokens"] = masking.corrupted(
            whole, places, rng, vocabulary, mask_share=self.mask_share, random_share=self.random_share
        )
        return masking.filled(row, self.fields(len(tokens) - self.raw_length(0)))

    def places(self, tokens: np.ndarray, segments: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The places of a row that are predicted: integer [at most budget(T)], rising; never those of special tokens.

        Args:
            tokens, segments: int32 [T], without padding.
        """
        vocabulary = self.vocabulary
        allowed = ~vocabulary.is_special[tokens]
        words = None
        if self.whole_word or self.ngram > 1:
            words = masking.words_of(tokens, segments, allowed, vocabulary, pieces=not self.whole_word)
        free = np.flatnonzero(allowed) if words is None else np.arange(len(words.starts))
        if self.count == "bernoulli":
            taken = free[rng.random(len(free)) < self.rate]
            return taken if words is None else masking.tokens_of(words.starts[taken], words.ends[taken])
        count = self.drawn_count(len(tokens), rng)
        if words is None:
            return masking.chosen(free, count, rng)
        if self.ngram > 1:
            first, last = masking.chosen_ngrams(words, count, self.ngram, rng)
        else:
            first = last = masking.chosen_words(words.ends - words.starts, count, rng)
        return masking.tokens_of(words.starts[first], words.ends[last])

    def drawn_count(self, length: int, rng: np.random.Generator) -> int:
        """How many tokens of a row of `length` to predict, if so many may be; not with "bernoulli"."""
        if self.count == "exact":
            return masking.exact_count(self.rate, length, self.max_predictions)
        count = math.floor(self.rate * length)
        count += int(rng.random() < self.rate * length - count)
        return count if self.max_predictions is None else min(count, self.max_predictions)

    def normalized(self, batch: dict[str, jax.Array], step: jax.Array | None = None) -> dict[str, jax.Array]:
        if self.pair == "none":
            return batch
        import jax.numpy as jnp

        masked = batch["weights"].sum() > 0
        scale = masking.scale(batch["weights"], batch["pair_weight"])
        # Where nothing is masked, as of words that are all too long, the pairs count by themselves.
        return batch | {
            "pair_scale": jnp.where(masked, scale, 1.0),
            "pair_alone": jnp.where(masked, 0.0, batch["pair_weight"]),
        }

    def combined(self, means: dict[str, float]) -> float:
        if self.pair == "none":
            return means["loss"]
        # A text without any pair has no mean of them, one without any mask none of those.
        return sum(mean for mean in (means["mlm_loss"], means["pair_loss"]) if not math.isnan(mean))

    def loss(self, model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Loss:
        from maxpretrain.objectives.cross_entropy import gathered, token_cross_entropy

        output = model.apply(
            params, batch["tokens"], batch["positions"], batch["segments"], key, token_types=batch.get("token_types")
        )
        hidden = gathered(output.hidden, batch["places"])
        total, sums = token_cross_entropy(model, params, hidden, batch["labels"], batch["weights"])
        weight = batch["weights"].sum()
        metrics = {"accuracy": (sums["correct"].sum(), weight)}
        if self.pair == "none":
            return Loss(total, weight, metrics, output.aux)
        batch = batch if "pair_scale" in batch else self.normalized(batch)
        of_pairs = pairs.cross_entropy(model, params, output.hidden, batch)
        number = batch["pair_weight"].sum()
        metrics |= {
            "mlm_loss": (total, weight),
            "pair_loss": (of_pairs["nll"], number),
            "pair_accuracy": (of_pairs["correct"], number),
        }
        total = total + batch["pair_scale"].max() * of_pairs["nll"]
        return Loss(total, weight + batch["pair_alone"].sum(), metrics, output.aux)
