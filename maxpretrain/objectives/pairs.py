"""Rows of two texts and what to say of them: does the second follow the first (NSP), are they in their order (SOP)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from maxpretrain.errors import UserError
from maxpretrain.objectives.base import Fields
from maxpretrain.objectives.masking import framed, positions_of
from maxpretrain.vocabulary import Vocabulary

if TYPE_CHECKING:  # pragma: no cover
    import jax


def fields(length: int) -> Fields:
    """What a pair adds to a row: "token_types" 0 or 1; "pair_label", 1 where the second text is a random one (NSP), or
    where the two are swapped (SOP); "pair_weight" 0 where the window had no text to divide, or the partner no other
    text.
    """
    return {"token_types": ((length,), "int32"), "pair_label": ((), "int32"), "pair_weight": ((), "float32")}


def paired(
    tokens: np.ndarray,
    segments: np.ndarray | None,
    rng: np.random.Generator,
    vocabulary: Vocabulary,
    *,
    kind: Literal["nsp", "sop"],
    short_share: float,
    partner: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """[bos] A [eos] B [eos], then whatever else the window holds, in segments that neither see nor are seen.

    A and B are of one document of the window, drawn in proportion to its tokens, so that each stretch of the text has
    the same chance; they part at the end of a sentence, drawn among all, or anywhere where the vocabulary knows of
    none. In SOP they are of whole sentences. With the chance `short_share` they have a random length together, from 2 to the window's. In NSP B is a
    stretch of `partner` half of the time, of B's length where that has so much; in SOP A and B change places half of
    the time.

    Documents are often shorter than a window, and one row has one pair, since its decision is read from the first
    token. The rest of the row therefore trains on the rest of the window without a pair. Only what a random B takes the
    place of is left out, where BERT uses it in the next row; other epochs cut and draw otherwise.

    Args:
        tokens: integer [n].
        segments: int32 [n], 1, 2, … by document; None: one document.
        partner: integer, the beginning of another document; what follows an end of sequence there, and zeros at the
            end, do not count.

    Returns:
        "tokens", "segments", "positions" int32 [n + 3] at most, and what `fields` says.

    References: Devlin et al. 2018, arXiv:1810.04805, §3.1 and the released create_pretraining_data; Lan et al. 2019,
    arXiv:1909.11942, §3.1.
    """
    tokens = np.asarray(tokens, np.int32)
    segments = np.ones(len(tokens), np.int32) if segments is None else np.asarray(segments, np.int32)
    starts, stops = documents_of(segments)
    begins, ends = texts_of(tokens, starts, stops, vocabulary)
    sizes = np.where(ends - begins > 1, ends - begins, 0)
    other = None
    if kind == "nsp":
        other = _first_text(partner, vocabulary)
        # The partner is not of the document that the window begins in, but it may be one of the others.
        sizes[_alike(tokens, begins, ends, other)] = 0
    if not sizes.sum():
        return _unpaired(tokens, segments, vocabulary)
    drawn = int(np.searchsorted(np.cumsum(sizes), rng.integers(sizes.sum()), "right"))
    start, stop = int(begins[drawn]), int(ends[drawn])
    if rng.random() < short_share:
        stop = min(stop, start + int(rng.integers(2, max(3, len(tokens) + 1))))
    opening = start
    if kind == "sop":
        start, stop = _whole_sentences(tokens, start, stop, vocabulary, cut=drawn == 0)
        if stop - start < 2:
            return _unpaired(tokens, segments, vocabulary)
    middle = start + _division(tokens[start:stop], rng, vocabulary)
    first, second = tokens[start:middle], tokens[middle:stop]
    # What is cut off a short pair goes into a segment of its own, as the other documents do.
    starts[drawn], begins[drawn] = stop, min(stop, ends[drawn])
    rest = list(zip(starts[begins < ends].tolist(), stops[begins < ends].tolist(), strict=True))
    rest += [(opening, start)] if opening < start else []
    label = int(rng.random() < 0.5)
    if label and other is not None:
        rest.append((middle, stop))
        second = _stretch(other, second, rng, vocabulary)
    elif label:
        first, second = second, first
    row = _row(first, second, [tokens[a:b] for a, b in rest], len(tokens) + 3, vocabulary)
    return row | {"pair_label": np.int32(label), "pair_weight": np.float32(1)}


def _unpaired(tokens: np.ndarray, segments: np.ndarray, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    row = framed(tokens, segments, vocabulary)
    none = {"pair_label": np.int32(0), "pair_weight": np.float32(0)}
    return row | none | {"token_types": np.zeros_like(row["tokens"])}


def documents_of(segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each segment but padding starts and stops, int64 [N] each."""
    real = segments[segments > 0]
    edges = np.flatnonzero(real[1:] != real[:-1]) + 1
    return np.append(0, edges), np.append(edges, len(real))


def texts_of(
    tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """Where the texts of documents begin and end, without the special tokens around them; equal where there is none."""
    ordinary, index = ~vocabulary.is_special[tokens[: stops[-1]]], np.arange(stops[-1])
    begins = np.minimum.reduceat(np.where(ordinary, index, len(tokens)), starts)
    ends = np.maximum.reduceat(np.where(ordinary, index + 1, 0), starts)
    none = begins >= ends
    return np.where(none, stops, begins), np.where(none, stops, ends)


def _whole_sentences(
    tokens: np.ndarray, start: int, stop: int, vocabulary: Vocabulary, *, cut: bool
) -> tuple[int, int]:
    """The part of a text that is whole sentences, at least two; (start, start) where it has not so many.

    A pair that begins or ends within a sentence, and parts between two, would tell by its edges alone whether it is
    swapped. Where no sentence ends at all, any edge is like any other, and the text stays as it is.

    Args:
        cut: the text may begin within a sentence.
    """
    if vocabulary.sentence_ends is None:
        return start, stop
    ends = start + 1 + np.flatnonzero(vocabulary.sentence_ends[tokens[start:stop]])
    if not len(ends):
        return start, stop
    ends = ends if cut else np.append(start, ends)
    return (int(ends[0]), int(ends[-1])) if len(ends) > 2 else (start, start)


def _division(text: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> int:
    """How many tokens of a text of at least two are the first part."""
    if vocabulary.sentence_ends is not None:
        ends = np.flatnonzero(vocabulary.sentence_ends[text[:-1]]) + 1
        if len(ends):
            return int(ends[rng.integers(len(ends))])
    return int(rng.integers(1, len(text)))


def _first_text(partner: np.ndarray | None, vocabulary: Vocabulary) -> np.ndarray:
    """The first document's text of a partner, int32, without special tokens around it; perhaps empty."""
    if partner is None:
        raise UserError("the pair nsp takes a second text; give `partner`, the beginning of another document")
    partner = np.trim_zeros(np.asarray(partner, np.int32), "b")
    if not len(partner):
        return partner
    closing = np.zeros(len(partner), bool)
    for eos in {vocabulary.eos_id, getattr(vocabulary.tokenizer, "eos_id", None)} - {None}:
        closing |= partner == eos
    stop = int(closing.argmax()) if closing.any() else len(partner)
    (begin,), (end,) = texts_of(partner, np.array([0]), np.array([max(stop, 1)]), vocabulary)
    return partner[begin:end]


def _alike(tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray, other: np.ndarray) -> list[int]:
    """Which texts of a window are the same as another one, as far as both go; all where that one is empty."""
    if not len(other):
        return list(range(len(begins)))
    likely = np.flatnonzero((begins < ends) & (tokens[np.minimum(begins, len(tokens) - 1)] == other[0])).tolist()
    sizes = {i: min(int(ends[i] - begins[i]), len(other)) for i in likely}
    return [i for i, n in sizes.items() if np.array_equal(tokens[begins[i] : begins[i] + n], other[:n])]


def _stretch(text: np.ndarray, second: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary) -> np.ndarray:
    """A stretch of another text in the place of `second`, no longer than it.

    It begins where a sentence does, not where the document does if that can be helped, and ends with a sentence where
    `second` does: only what it says is to tell it apart.
    """
    size = min(len(second), len(text))
    room = len(text) - size
    begins = np.arange(room + 1)
    ends = vocabulary.sentence_ends
    sentences = np.zeros(len(text), bool) if ends is None else ends[text]
    if sentences[:-1].any():
        begins = np.flatnonzero(sentences[:room]) + 1 if sentences[:room].any() else begins[:1]
    begin = int(begins[rng.integers(len(begins))])
    found, inside = text[begin : begin + size], np.flatnonzero(sentences[begin : begin + size])
    if len(inside) and ends is not None and ends[second[-1]]:
        return found[: int(inside[-1]) + 1]
    return found


def _row(
    first: np.ndarray, second: np.ndarray, rest: list[np.ndarray], length: int, vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """The pair and, after it, as much of the rest as there is room for."""
    bos, eos = np.array([vocabulary.bos_id], np.int32), np.array([vocabulary.eos_id], np.int32)
    parts = [np.concatenate([bos, first, eos, second, eos]), *rest]
    tokens = np.concatenate(parts)[:length]
    segments = np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), [len(part) for part in parts])[:length]
    types = np.zeros_like(tokens)
    types[len(first) + 2 : len(parts[0])] = 1
    return {"tokens": tokens, "segments": segments, "positions": positions_of(segments), "token_types": types}


def cross_entropy(model: Any, params: Any, hidden: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums over the pairs of a batch: "nll" and "correct", float32 []. Device side.

    Args:
        model: with the heads "pooler" and "pair".
        hidden: [B, T, D].
        batch: "segments" int32 [B, T], "pair_label" int32 [B], "pair_weight" float32 [B].
    """
    import jax.numpy as jnp

    from maxpretrain.objectives.cross_entropy import cross_entropy_sums

    logits = model.head_outputs(params, hidden, batch["segments"] > 0)["pair_logits"]
    weights = batch["pair_weight"]
    logits = jnp.where(
        weights[:, None] > 0, logits, 0.0
    )  # of a row of padding nothing reaches the gradient, not even NaN
    return cross_entropy_sums(logits, batch["pair_label"], weights)
