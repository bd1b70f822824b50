"""T5's span corruption: spans of the text become sentinels, and the decoder writes what stood there."""

from __future__ import annotations

import bisect
import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.objectives.base import Fields
from maxpretrain.objectives.seq2seq import Seq2Seq

if TYPE_CHECKING:  # pragma: no cover
    import numpy as np

    from maxpretrain.config import Run
    from maxpretrain.vocabulary import Vocabulary
else:
    np = lazy("numpy")


class Counts(NamedTuple):
    """How a window of `raw` tokens is divided."""

    raw: int
    noise: int  # tokens in spans
    spans: int  # sentinels in the inputs, and in the targets

    @property
    def inputs(self) -> int:
        return self.raw - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        return self.noise + self.spans + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption(Seq2Seq):
    """Each span of noise becomes a sentinel in the inputs; the targets are the sentinels with the spans after them.

    Of n tokens round(n·density) are noise (a half goes to the even number), in round(noise / mean_span) spans, at least
    one; lengths of the spans and of what is between them are uniform among all that add up. The window begins with what
    is kept and ends with a span. eos ends inputs and targets; no sentinel comes before it.

    Reference: Raffel et al. 2020, arXiv:1910.10683, §3.3.4 (released code: random_spans_noise_mask and _helper).
    """

    density: float = 0.15  # share of the tokens that are noise
    mean_span: float = 3.0  # tokens of a span, on average
    num_sentinels: int = 100  # sentinels of a tokenizer that is trained for it

    def validate(self, run: Run) -> None:
        if not 0 < self.density < 1:
            raise UserError(f"objective.density is {self.density}; it must be between 0 and 1")
        if self.mean_span < 1:
            raise UserError(f"objective.mean_span is {self.mean_span}; it must be at least 1")
        if self.num_sentinels < 1:
            raise UserError(f"objective.num_sentinels is {self.num_sentinels}; it must be at least 1")
        super().validate(run)
        if not run.tokenizer.path:
            self._require_sentinels(self.spans(run.batch.length), self.num_sentinels, f" of length {run.batch.length}")

    def symbols(self) -> tuple[str, ...]:
        from maxpretrain.vocabulary import sentinels  # with numpy, which the help of a command does not wait for

        return sentinels(self.num_sentinels)

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        super().check_vocabulary(vocabulary)
        if not vocabulary.sentinels:
            raise UserError(
                f"objective {self._title} needs sentinels, and the tokenizer has none; use one with <extra_id_0>, "
                "<extra_id_1>, …, or let the run train its own"
            )

    def _require_sentinels(self, needed: int, there: int, where: str) -> None:
        if needed > there:
            raise UserError(
                f"objective {self._title} needs {needed} sentinels for inputs{where}, one a span, and the tokenizer "
                f"has {there}; shorten batch.length, or train a tokenizer with objective.num_sentinels {needed}"
            )

    def published(self, raw: int) -> Counts:
        """The division that lengths are reckoned by: T5's, where a span that rounding makes none is none."""
        noise = max(1, round(raw * self.density))
        return Counts(raw, noise, round(noise / self.mean_span) if noise > 1 else 1)

    def counts(self, raw: int) -> Counts:
        """The division of a window of at least two tokens: at least one token is noise, and one is not."""
        noise = min(max(1, round(raw * self.density)), raw - 1)
        return Counts(raw, noise, min(max(1, round(noise / self.mean_span)), noise, raw - noise))

    def usable(self, raw: int) -> int:
        """Tokens of a window that its example has room for: all, unless `published` found no span for it, or for one that
        is a token longer, such as one of 64 tokens at density .15 in inputs of 128. T5 cuts off the ends of inputs and targets there;
        here some tokens of the window stay out.
        """
        # Lengths are reckoned for whole windows: where a second token of noise takes the only span away, they fall once.
        rooms = [room for room in (self.published(raw), self.published(raw + 1)) if room.spans < 1]
        while raw > 2 and not all(_fits(self.counts(raw), room) for room in rooms):
            raw -= 1
        return raw

    def text_length(self, inputs: int) -> int:
        """The most tokens whose inputs fit; at density .5 one less where the targets would be the longer."""
        most = range(2, int((inputs + 2) / (1 - self.density)) + 3)
        raw = 1 + bisect.bisect_right(most, inputs, key=lambda n: self.published(n).inputs)
        found = self.published(raw)
        return max(1, raw - (self.density == 0.5 and found.targets > found.inputs))

    def answer_length(self, inputs: int) -> int:
        return self.published(self.text_length(inputs)).targets

    def spans(self, length: int) -> int:
        """Sentinels that inputs of `length` need."""
        return self.counts(self.usable(max(2, self.raw_length(length)))).spans

    def fields(self, length: int) -> Fields:
        fields = super().fields(length)
        if self.bound is not None:
            self._require_sentinels(self.spans(length), len(self.vocabulary.sentinels), f" of length {length}")
        return fields

    def corrupted(
        self, text: np.ndarray, documents: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        if len(text) < 2:
            return self.framed(text, text[:0])[0], text[:0]
        there = self.usable(len(text))
        if there < len(text):
            first = int(rng.integers(len(text) - there + 1))
            text = text[first : first + there]
        counts = self.counts(there)
        sentinels = self._sentinels(counts.spans)
        return self.framed(*with_sentinels(text, noise_mask(counts, rng), sentinels))

    def _sentinels(self, count: int) -> np.ndarray:
        there = self.vocabulary.sentinels
        self._require_sentinels(count, len(there), "")
        return np.array(there[:count], np.int32)


def _fits(counts: Counts, room: Counts) -> bool:
    return counts.inputs <= room.inputs and counts.targets <= room.targets


def composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Positive lengths that add up, int64 [parts]: each such sequence as likely as any other.

    The boundaries between parts are a random subset of the places between neighbours.
    """
    boundaries = np.sort(rng.choice(total - 1, parts - 1, replace=False, shuffle=False)) + 1
    return np.diff(boundaries, prepend=0, append=total)


def noise_mask(counts: Counts, rng: np.random.Generator) -> np.ndarray:
    """bool [raw]: kept and noise take turns, so that the first token is kept and the last is noise."""
    lengths = np.empty(2 * counts.spans, np.int64)
    lengths[0::2] = composition(counts.raw - counts.noise, counts.spans, rng)
    lengths[1::2] = composition(counts.noise, counts.spans, rng)
    return np.repeat(np.arange(2 * counts.spans) % 2 == 1, lengths)


def with_sentinels(text: np.ndarray, noise: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The text with each run of noise replaced by its sentinel, and with each run of the rest replaced by its sentinel.

    Args:
        text: int32 [n].
        noise: bool [n].
        sentinels: int32, one a run, in order.
    """
    changes = np.empty(len(text), bool)
    changes[0] = True
    np.not_equal(noise[1:], noise[:-1], out=changes[1:])

    def replaced(runs: np.ndarray) -> np.ndarray:
        first = runs & changes
        marked = text.copy()
        marked[first] = sentinels[: np.count_nonzero(first)]
        return marked[first | ~runs]

    return replaced(noise), replaced(~noise)
