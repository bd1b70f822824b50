"""BART: a text is corrupted in any of five ways, and the decoder writes it as it was."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.objectives.seq2seq import Seq2Seq

if TYPE_CHECKING:  # pragma: no cover
    import numpy as np

    from maxpretrain.config import Run
    from maxpretrain.vocabulary import Vocabulary
else:
    np = lazy("numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BART(Seq2Seq):
    """Five noises, in this order: sentences permuted, spans infilled, tokens masked, tokens deleted, the text rotated.

    The defaults are the recipe of the published models. bos, where there is one, and eos stand around inputs and
    targets; nothing moves them. The inputs are never longer than the targets, which are the whole text.

    Reference: Lewis et al. 2019, arXiv:1910.13461, §2.2 and §5.1 (released code: fairseq's DenoisingDataset). Spans do
    not overlap here, so that each has its mask; sentences stay in their document.
    """

    infill: float = 0.3  # share of the words in spans that one mask each stands for
    poisson: float = 3.0  # words of such a span, on average; one of none is a mask between two words
    permute_sentences: float = 1.0  # share of the sentences of each document that change places
    mask: float = 0.0  # share of the tokens that a mask each stands for
    delete: float = 0.0  # share of the tokens that are left out
    rotate: float = 0.0  # share of the texts that begin at a token drawn at random, what was before it at the end

    bos: ClassVar[bool] = True
    noises: ClassVar[tuple[str, ...]] = ("infill", "permute_sentences", "mask", "delete", "rotate")

    def validate(self, run: Run) -> None:
        for name in self.noises:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"objective.{name} is {getattr(self, name)}; it is a share, in [0, 1]")
        if not any(getattr(self, name) for name in self.noises):
            raise UserError(
                f"objective BART corrupts nothing: {', '.join(self.noises)} are all 0; set one, such as infill 0.3"
            )
        if not 0.1 <= self.poisson <= 1000:
            raise UserError(f"objective.poisson is {self.poisson}; it must be in [0.1, 1000], and 3 is published")
        super().validate(run)

    def symbols(self) -> tuple[str, ...]:
        return ("<mask>",)

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        super().check_vocabulary(vocabulary)
        if (self.infill or self.mask) and vocabulary.mask_id is None:
            raise UserError(
                "objective BART needs a mask token, and the tokenizer has none; use one with <mask> or [MASK], or set "
                "objective.infill and objective.mask to 0"
            )

    def text_length(self, inputs: int) -> int:
        return max(1, inputs - 2)

    def answer_length(self, inputs: int) -> int:
        return self.text_length(inputs) + 2

    def corrupted(
        self, text: np.ndarray, documents: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        words = self.vocabulary
        source, begins = text, words.begins_word(text)
        begins[1:] |= documents[1:] != documents[:-1]
        if self.permute_sentences and words.sentence_ends is not None:
            starts = sentence_starts(words.sentence_ends[text], documents)
            begins[starts] = True
            order = permuted(starts, documents, self.permute_sentences, rng)
            source, begins = source[order], begins[order]
        mask = np.int32(-1 if words.mask_id is None else words.mask_id)
        if self.infill:
            source = infilled(source, begins, mask, share=self.infill, rate=self.poisson, rng=rng)
        for share, put in ((self.mask, mask), (self.delete, None)):
            if not share:
                continue
            left = np.flatnonzero(source != mask)
            places = rng.choice(left, round(share * len(left)), replace=False, shuffle=False)
            if put is None:
                source = np.delete(source, places)
            else:
                source = source.copy()
                source[places] = put
        if self.rotate and len(source) and rng.random() < self.rotate:
            source = np.roll(source, -int(rng.integers(len(source))))
        return self.framed(source, text)

    def framed(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both with eos at the end and bos, where there is one, at the beginning."""
        inputs, targets = super().framed(inputs, targets)
        if self.vocabulary.bos_id is None:
            return inputs, targets
        bos = np.array([self.vocabulary.bos_id], np.int32)
        return np.concatenate([bos, inputs]), np.concatenate([bos, targets])


def sentence_starts(ends: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The first token of each sentence, int64, rising: where a document begins, and after a token that ends a sentence
    (after the last one, where several in a row do).

    Args:
        ends: bool [n], tokens that end a sentence.
        documents: int32 [n].
    """
    starts = np.empty(len(ends), bool)
    starts[0] = True
    starts[1:] = (ends[:-1] & ~ends[1:]) | (documents[1:] != documents[:-1])
    return np.flatnonzero(starts)


def permuted(starts: np.ndarray, documents: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """The places of the tokens with a share of the sentences, drawn at random, in random order among their places.

    Args:
        starts: int64 [k], first token of each sentence.
        documents: int32 [n]; sentences change places within their own.

    Returns:
        int64 [n], a permutation.
    """
    count = len(starts)
    order = np.arange(count)
    moving = np.sort(rng.permutation(count)[: math.ceil(share * count - 1e-9)])
    of = documents[starts[moving]]
    order[moving] = moving[np.lexsort((rng.random(len(moving)), of))]
    lengths = np.diff(starts, append=len(documents))[order]
    offsets = np.arange(len(documents)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts[order], lengths) + offsets


def span_lengths(budget: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Draws from Poisson(rate) until they add up to `budget`, the last one cut to be exact; int64, in random order.

    Zeros that would make them more than `budget` in number are left out, so that masks never lengthen a text. With
    rate 3 that befalls budgets of a few words: at 5 one draw in 10³, at 150 none (P < 10⁻⁵⁰).
    """
    drawn = rng.poisson(rate, size=8 + int(1.5 * budget / rate))
    while int(drawn.sum()) < budget:
        drawn = np.concatenate([drawn, rng.poisson(rate, size=len(drawn))])
    total = np.cumsum(drawn)
    last = int(np.searchsorted(total, budget))
    lengths = drawn[: last + 1]
    lengths[last] -= total[last] - budget
    if last >= budget:
        some = lengths[lengths > 0]
        lengths = np.pad(some, (0, budget - len(some)))
    return rng.permutation(lengths)


def infilled(
    text: np.ndarray, begins: np.ndarray, mask: np.int32, *, share: float, rate: float, rng: np.random.Generator
) -> np.ndarray:
    """The text with ceil(share · words) of its words, in spans, replaced by one mask a span.

    Spans are put among the words that stay: every order of the two is as likely as any other. A span of no words adds
    a mask.

    Args:
        text: int32 [n].
        begins: bool [n], tokens that begin a word.
        rate: mean of the Poisson distribution of spans' lengths in words.

    Returns:
        int32 [at most n].
    """
    first = np.flatnonzero(begins)
    words = len(first)
    budget = math.ceil(share * words - 1e-9)
    spans = span_lengths(budget, rate, rng)
    # What stays of the text, word by word, and the spans, in the order in which they will stand.
    is_span = np.zeros(words - budget + len(spans), bool)
    is_span[rng.choice(len(is_span), len(spans), replace=False, shuffle=False)] = True
    lengths = np.ones(len(is_span), np.int64)
    lengths[is_span] = spans
    word = np.cumsum(lengths) - lengths  # the first word of each
    stays = np.zeros(words, bool)
    stays[word[~is_span]] = True
    kept = np.repeat(stays, np.diff(first, append=len(text)))
    before = np.append(np.cumsum(kept) - kept, np.count_nonzero(kept))  # tokens that stay, before each
    places = before[np.append(first, len(text))[word[is_span]]]
    return np.insert(text[kept], places, mask)
