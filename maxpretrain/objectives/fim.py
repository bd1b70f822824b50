"""Fill in the middle: documents with their middle moved to the end, so that a decoder learns to complete it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.objectives.clm import CLM

if TYPE_CHECKING:  # pragma: no cover
    import numpy as np

    from maxpretrain.config import Run
    from maxpretrain.data.tokenizer import Tokenizer
    from maxpretrain.vocabulary import Vocabulary
else:
    np = lazy("numpy")


class _Piece(NamedTuple):
    """Part of a document without its eos: a text, and the tokens before and after it that are bytes of a character
    which the edge of the window cuts in two.
    """

    head: np.ndarray
    text: str
    tail: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillInTheMiddle(CLM):
    """CLM on documents of which a share is cut at two points into prefix p, middle m and suffix s, in another order.

    PSM: <PRE> p <SUF> s <MID> m; SPM: <PRE> <SUF> s <MID> p m (the paper's variant 2). Loss on all tokens. Each
    document, or part of one, is cut within its window, after packing; its eos stays at its end. Cuts are uniform over
    all places, both ends too, so that any part may be empty. What the new tokens push beyond the length of the row is
    trimmed.

    With level "character" the cuts fall anywhere in the text and each part is tokenized by itself, as a prompt and a
    suffix are when the model is used. With "token" they fall between tokens: four times cheaper, but the model never
    sees a word that is cut.

    References: Bavarian et al. 2022, arXiv:2207.14255, §3 and appendix D; the cuts: §4.4.
    """

    rate: float = 0.5  # share of the documents that are put in another order; 0.9 costs no left-to-right loss either
    spm_rate: float = 0.5  # of those, the share in which the suffix comes first
    level: Literal["character", "token"] = "character"  # where a document can be cut

    whole_text: ClassVar[bool] = False

    def validate(self, run: Run) -> None:
        super().validate(run)
        for name in ("rate", "spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"objective.{name} is {getattr(self, name)}; it must be in [0, 1]")

        if run.batch.length < 5:
            raise UserError(
                f"batch.length is {run.batch.length}, too short for the tokens before prefix, suffix and middle and text in all of "
                "them; use at least 5"
            )

    def symbols(self) -> tuple[str, ...]:
        from maxpretrain.vocabulary import FIM  # with numpy, which the help of a command does not wait for

        return tuple(names[0] for names in FIM.values())

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        if not vocabulary.fim:
            raise UserError(
                "objective FillInTheMiddle needs tokens for prefix, suffix and middle, and the tokenizer has none; "
                f"use one with {', '.join(self.symbols())}, or leave tokenizer.path out and let the run train its own"
            )
        if self.level == "character" and vocabulary.tokenizer is None:
            raise UserError(
                'objective.level is "character", and there is no tokenizer to split the text anew; set it to "token"'
            )
        if self.level == "character" and vocabulary.tokenizer.kind not in ("bytes", "characters"):
            encode, decode = vocabulary.tokenizer.encode, vocabulary.tokenizer.decode
            if decode([*encode("Th"), *encode("e c"), *encode(" at")]) != "The c at":
                raise UserError(
                    'objective.level is "character", and the tokenizer changes a text that it is given in parts (it puts spaces in '
                    'front, or leaves something out); set it to "token"'
                )

    def example(
        self, tokens: np.ndarray, rng: np.random.Generator, segments: np.ndarray | None = None, **more: np.ndarray
    ) -> dict[str, np.ndarray]:
        """CLM's example of the documents in their new order.

        Args:
            tokens: integer [n], n ≥ 1.
            rng: draws which documents, which order, and the cuts.
            segments: int32 [n], 1, 2, … by document; None: one document.

        Returns:
            The arrays of `fields(n − 1)`, or shorter ones where the new tokens are fewer.
        """
        row, numbers = self.reordered(tokens, rng, segments)
        return super().example(row[: len(tokens)], rng, numbers[: len(tokens)])

    def reordered(
        self, tokens: np.ndarray, rng: np.random.Generator, segments: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The row before it is trimmed: tokens and their segments, int32 [m] each."""
        edges = (
            np.zeros(1, np.int64) if segments is None else np.flatnonzero(np.diff(segments, prepend=segments[0] - 1))
        )
        documents = np.split(tokens.astype(np.int32), edges[1:])
        moved = rng.random(len(documents)) < self.rate
        suffix_first = rng.random(len(documents)) < self.spm_rate
        bodies, ends = zip(*map(self._without_eos, documents), strict=True)
        chosen = [i for i in np.flatnonzero(moved).tolist() if len(bodies[i])]
        cut = self._cut_text if self.level == "character" else self._cut_tokens
        pre, suf, mid = (np.array([i], np.int32) for i in self.vocabulary.fim)
        for i, (p, m, s) in zip(chosen, cut([bodies[i] for i in chosen], rng) if chosen else (), strict=True):
            order = (pre, suf, s, mid, p, m) if suffix_first[i] else (pre, p, suf, s, mid, m)
            documents[i] = np.concatenate([*order, ends[i]])
        numbers = np.arange(1, len(documents) + 1) if segments is None else segments[edges]
        return np.concatenate(documents), np.repeat(numbers.astype(np.int32), [len(d) for d in documents])

    def _without_eos(self, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = len(document) - int(document[-1] == self.vocabulary.eos_id)
        return document[:size], document[size:]

    def _cut_tokens(self, bodies: list[np.ndarray], rng: np.random.Generator) -> list[list[np.ndarray]]:
        return [np.split(body, _two_cuts(len(body), rng)) for body in bodies]

    def _cut_text(self, bodies: list[np.ndarray], rng: np.random.Generator) -> list[list[np.ndarray]]:
        tokenizer = self.vocabulary.tokenizer
        assert tokenizer is not None, "check_vocabulary has looked"
        pieces = [_piece(body, tokenizer) for body in bodies]
        texts = []
        for piece in pieces:
            i, j = _two_cuts(len(piece.text), rng)
            texts += [piece.text[:i], piece.text[i:j], piece.text[j:]]
        # Those of the whole row at once: a call by itself costs as much as a hundred tokens.
        ids, lengths = tokenizer.encode_batch(texts)
        parts = np.split(ids, np.cumsum(lengths)[:-1])
        return [
            [np.concatenate([piece.head, p]), m, np.concatenate([s, piece.tail])]
            for piece, p, m, s in zip(pieces, parts[::3], parts[1::3], parts[2::3], strict=True)
        ]


def _two_cuts(size: int, rng: np.random.Generator) -> list[int]:
    """Two of the places 0 … size, drawn one by one, in order."""
    return sorted(rng.integers(0, size + 1, 2).tolist())


def _piece(ids: np.ndarray, tokenizer: Tokenizer) -> _Piece:
    low, high = 0, len(ids)
    text = tokenizer.decode(ids)
    # U+FFFD where a character is not whole, of which UTF-8 has at most three bytes; or the text has one, which stays.
    if text[:1] == "\ufffd":
        low = next((k for k in range(1, min(4, high)) if tokenizer.decode(ids[k:])[:1] != "\ufffd"), 0)
    if text[-1:] == "\ufffd":
        high = next(
            (k for k in range(high - 1, max(high - 4, low), -1) if tokenizer.decode(ids[low:k])[-1:] != "\ufffd"), high
        )
    if (low, high) != (0, len(ids)):
        text = tokenizer.decode(ids[low:high])
    return _Piece(ids[:low], text, ids[high:])
