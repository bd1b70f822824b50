"""What masked objectives share on the host: which places of a text are masked, and what stands there instead."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.objectives.base import Fields, Objective

if TYPE_CHECKING:  # pragma: no cover
    import jax
    import numpy as np

    from maxpretrain.config import Run
    from maxpretrain.vocabulary import Vocabulary
else:
    np = lazy("numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(Objective):
    """An encoder predicts some of its tokens, which its input hides. Base of such objectives.

    The row of a window is [bos] tokens [eos], as far as the vocabulary has these.
    """

    rate: float = 0.15  # share of the tokens that are predicted
    mask_share: float = 0.8  # of those, the share that the mask stands for
    random_share: float = 0.1  # of those, the share that a random token stands for; the rest stay as they are
    mask_documents: bool = True  # packed documents do not see each other, and each has positions from 0 on

    architectures: ClassVar[tuple[str, ...]] = ("encoder",)

    def validate(self, run: Run) -> None:
        super().validate(run)
        if not 0 < self.rate < 1:
            raise UserError(f"objective.rate is {self.rate}; it must be between 0 and 1")
        for part in ("mask_share", "random_share"):
            if not 0 <= getattr(self, part) <= 1:
                raise UserError(f"objective.{part} is {getattr(self, part)}; it must be in [0, 1]")
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise UserError(
                f"objective.mask_share {self.mask_share} and objective.random_share {self.random_share} are more than "
                "1 together; lower one"
            )
        if run.batch.length < 3:
            raise UserError(
                f"batch.length is {run.batch.length}, which leaves no token between bos and eos; use at least 3"
            )

    def symbols(self) -> tuple[str, ...]:
        return ("<mask>",)

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        if vocabulary.mask_id is None:
            raise UserError(
                f"objective {type(self).__name__} needs a mask token, and the tokenizer has none; use one with <mask> "
                "or [MASK], or leave tokenizer.path out and let the run train its own"
            )
        if not len(vocabulary.ordinary):
            raise UserError("the tokenizer has special tokens only; there is nothing to mask")

    def raw_length(self, length: int) -> int:
        return length - (self.vocabulary.bos_id is not None) - (self.vocabulary.eos_id is not None)


class Words(NamedTuple):
    """Tokens that are masked together or not at all, in order; [N] each.

    Attributes:
        starts, ends: int64, the first token and one past the last.
        joined: bool, whether the next word follows at once, in the same segment.
    """

    starts: np.ndarray
    ends: np.ndarray
    joined: np.ndarray


def row_fields(length: int) -> Fields:
    """The fields of `framed`."""
    return dict.fromkeys(("tokens", "segments", "positions"), ((length,), "int32"))


def prediction_fields(budget: int) -> Fields:
    """The fields of what is predicted at `budget` places at most."""
    return {"places": ((budget,), "int32"), "labels": ((budget,), "int32"), "weights": ((budget,), "float32")}


def framed(
    tokens: np.ndarray, segments: np.ndarray | None, vocabulary: Vocabulary, *, mask_documents: bool = True
) -> dict[str, np.ndarray]:
    """[bos] tokens [eos], as far as the vocabulary has these and the window does not have them there already.

    Args:
        tokens: integer [n].
        segments: int32 [n], 1, 2, … by document, 0 for padding at the end; None: one document.
        mask_documents: else all are one segment.

    Returns:
        "tokens", "segments" (bos and eos belong to the documents that they touch) and "positions", which count from 0
        in each segment, int32 [n + 2] at most.
    """
    tokens = np.asarray(tokens, np.int32)
    segments = np.ones(len(tokens), np.int32) if segments is None else np.asarray(segments, np.int32)
    if len(segments) and segments[-1] == 0:
        real = segments > 0
        tokens, segments = tokens[real], segments[real]
    if not mask_documents:
        segments = np.ones_like(segments)
    bos, eos = vocabulary.bos_id, vocabulary.eos_id
    if len(tokens):
        before = [] if bos is None or tokens[0] == bos else [bos]
        after = [] if eos is None or tokens[-1] == eos else [eos]
        tokens = np.concatenate([np.array(before, np.int32), tokens, np.array(after, np.int32)])
        segments = np.concatenate([segments[: len(before)], segments, segments[len(segments) - len(after) :]])
    return {"tokens": tokens, "segments": segments, "positions": positions_of(segments)}


def positions_of(segments: np.ndarray) -> np.ndarray:
    """Positions int32 [T] that count from 0 in each segment of int32 [T]."""
    index = np.arange(len(segments), dtype=np.int32)
    starts = np.zeros_like(index)
    starts[1:] = index[1:] * (segments[1:] != segments[:-1])
    return index - np.maximum.accumulate(starts)


def candidates(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The places that may be masked: those of no special token. int32 [T] -> int64 [N], rising."""
    return np.flatnonzero(~vocabulary.is_special[tokens])


def words_of(
    tokens: np.ndarray, segments: np.ndarray, allowed: np.ndarray, vocabulary: Vocabulary, *, pieces: bool = False
) -> Words:
    """The words of a row, none across a border of segments, that are allowed whole.

    Args:
        tokens, segments: int32 [T], T ≥ 1.
        allowed: bool [T], tokens that may be masked.
        pieces: each token is taken for a word.
    """
    border = segments[1:] != segments[:-1]
    begins = np.ones(len(tokens), bool) if pieces else vocabulary.begins_word(tokens)
    begins[1:] |= border
    starts = np.flatnonzero(begins)
    ends = np.append(starts[1:], len(tokens))
    whole = np.logical_and.reduceat(allowed, starts)
    starts, ends = starts[whole], ends[whole]
    joined = np.zeros(len(starts), bool)
    joined[:-1] = (starts[1:] == ends[:-1]) & ~border[starts[1:] - 1]
    return Words(starts, ends, joined)


def exact_count(rate: float, length: int, max_predictions: int | None = None) -> int:
    """min(max_predictions, max(1, rate·length)), rounded half to even.

    Args:
        length: tokens of the row, special ones too, without padding.

    Reference: Devlin et al. 2018, arXiv:1810.04805 (released code, create_pretraining_data).
    """
    count = max(1, round(rate * length))
    return count if max_predictions is None else min(count, max_predictions)


def chosen(places: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Exactly `count` of the places (all, where they are fewer), each set of so many as likely as any other; rising."""
    if count >= len(places):
        return places
    return np.sort(rng.choice(places, count, replace=False, shuffle=False))


def chosen_words(lengths: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Words in random order as long as their tokens are at most `budget`; one that would be too much is passed over.

    Args:
        lengths: integer [N], tokens of each word.

    Returns:
        int64 [at most N], indices of words.

    Reference: Devlin et al. 2018, arXiv:1810.04805 (released code, whole word masking).
    """
    order = rng.permutation(len(lengths))
    sizes = lengths[order]
    total = np.cumsum(sizes)
    first = int(np.searchsorted(total, budget, "right"))  # so many fit as they come
    taken, left = [order[:first]], budget - (int(total[first - 1]) if first else 0)
    while left and len(fitting := np.flatnonzero(sizes[first:] <= left)):
        first += int(fitting[0]) + 1
        taken.append(order[first - 1 : first])
        left -= int(sizes[first - 1])
    return np.concatenate(taken)


def ngram_shares(longest: int) -> np.ndarray:
    """How often n = 1 … longest is drawn: in proportion to 1/n. float64 [longest].

    Reference: Lan et al. 2019, arXiv:1909.11942, §4.1.
    """
    weights = 1.0 / np.arange(1, longest + 1)
    return weights / weights.sum()


def chosen_ngrams(words: Words, budget: int, longest: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """N-grams of neighbouring words as long as their tokens are at most `budget`.

    They begin at words in random order. An n-gram that would be too much is shortened, one that meets another is passed
    over; n is drawn among those that fit before the run of words ends.

    Returns:
        First and last word of each, int64 [at most N].

    Reference: Lan et al. 2019, arXiv:1909.11942, §4.1 (released code, create_pretraining_data).
    """
    count = len(words.starts)
    reach, more = np.ones(count, np.int64), words.joined.copy()  # words from each on, as far as the longest n-gram goes
    for n in range(1, longest):
        reach += more
        more[:-n] &= words.joined[n:]
        more[-n:] = False
    cumulative = np.cumsum(ngram_shares(longest))
    drawn = rng.random(count) * cumulative[reach - 1]
    sizes = np.minimum(1 + np.searchsorted(cumulative, drawn, "right"), reach).tolist()
    starts, ends = words.starts.tolist(), words.ends.tolist()
    taken, left, found = bytearray(count), budget, []
    for word in rng.permutation(count).tolist():
        if taken[word]:
            continue
        n = sizes[word]
        while n and ends[word + n - 1] - starts[word] > left:
            n -= 1
        if n and not any(taken[word : word + n]):
            taken[word : word + n] = b"\1" * n
            left -= ends[word + n - 1] - starts[word]
            found.append((word, word + n - 1))
            if not left:
                break
    pairs = np.array(found, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def tokens_of(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The places of all tokens of some stretches [start, end); int64, rising where the stretches do not overlap."""
    lengths = ends - starts
    offsets = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.sort(np.repeat(starts, lengths) + offsets)


def corrupted(
    tokens: np.ndarray,
    places: np.ndarray,
    rng: np.random.Generator,
    vocabulary: Vocabulary,
    *,
    mask_share: float,
    random_share: float,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """The tokens with the mask, a random token or the same one at some places, drawn for each by itself.

    Random tokens are no special ones, where BERT draws from all ids: there a text can get a [SEP] in its middle.

    Args:
        tokens: int32 [T].
        places: integer [N].
        groups: int [N], 0, 1, …: places of a group are all masked, all random (each another) or all kept; None: each
            is one.

    Returns:
        int32 [T], a new array.
    """
    assert vocabulary.mask_id is not None
    if groups is None:
        drawn = rng.random(len(places))
    else:
        drawn = rng.random(int(groups[-1]) + 1 if len(groups) else 0)[groups]
    ordinary = vocabulary.ordinary
    random = ordinary[rng.integers(len(ordinary), size=len(places))]
    inputs = tokens.copy()
    kept = np.where(drawn < mask_share + random_share, random, tokens[places])
    inputs[places] = np.where(drawn < mask_share, np.int32(vocabulary.mask_id), kept)
    return inputs


def predictions(tokens: np.ndarray, places: np.ndarray) -> dict[str, np.ndarray]:
    """What is predicted at some places of a row, before it is corrupted: "places", "labels", "weights"."""
    return {"places": places, "labels": tokens[places], "weights": np.ones(len(places), np.float32)}


def filled(arrays: dict[str, np.ndarray], fields: Fields) -> dict[str, np.ndarray]:
    """The arrays with zeros after them, up to the shapes of `fields`, in their dtypes."""
    example = {}
    for name, (shape, dtype) in fields.items():
        array = np.asarray(arrays[name])
        # A budget that is too small would drop predictions without a word.
        assert all(n <= m for n, m in zip(array.shape, shape, strict=True)), (name, array.shape, shape)
        example[name] = np.zeros(shape, dtype)
        example[name][tuple(map(slice, array.shape))] = array
    return example


def scale(first: jax.Array, second: jax.Array) -> jax.Array:
    """What a sum over predictions `second` is multiplied by, for its mean to be sum / Σ first. Device side.

    For `Objective.normalized`.

    Args:
        first, second: float32 [B, …], of the whole batch.

    Returns:
        float32 [B], Σ first / Σ second, the same in every row, so that it survives the cut into microbatches.
    """
    import jax.numpy as jnp

    ratio = jnp.sum(first) / jnp.maximum(jnp.sum(second), 1.0)  # of counts: nothing to predict has the sum 0
    return jnp.broadcast_to(ratio, first.shape[:1])
