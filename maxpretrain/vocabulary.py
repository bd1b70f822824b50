"""What an objective has to know of the tokens: which are special, where words and sentences begin and end."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # pragma: no cover
    from maxpretrain.data.tokenizer import Tokenizer

# Names that tokenizers have for them; the first is what a tokenizer trained here has.
MASKS = ("<mask>", "[MASK]")
MODES = ("[NLU]", "[NLG]", "[S2S]")
FIM = {
    "prefix": ("<fim_prefix>", "<|fim_prefix|>", "<PRE>", "▁<PRE>", "<｜fim▁begin｜>"),
    "suffix": ("<fim_suffix>", "<|fim_suffix|>", "<SUF>", "▁<SUF>", "<｜fim▁hole｜>"),
    "middle": ("<fim_middle>", "<|fim_middle|>", "<MID>", "▁<MID>", "<｜fim▁end｜>"),
}


SENTINEL = re.compile(r"<extra_id_\d+>")


def is_marked(text: str, tokenizer: Tokenizer) -> bool:
    """Whether a text has a mask, a sentinel or a mode token of the tokenizer's, by its name."""
    names = [name for name in (*MASKS, *MODES) if name in text] + SENTINEL.findall(text)
    return any(tokenizer.id_of(name) is not None for name in names)


def sentinels(count: int) -> tuple[str, ...]:
    """Names of T5's sentinels as a vocabulary ends with them: the first one last."""
    return tuple(f"<extra_id_{i}>" for i in reversed(range(count)))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """The ids of a tokenizer by what they are for. Only `size` and what an objective uses has to be given.

    Attributes:
        size: number of ids.
        pad_id: fills up; nothing is learned about it.
        bos_id, eos_id: what a sequence begins and ends with ([CLS] and [SEP], where there are such), or None.
        mask_id: in the place of what is to be predicted, or None.
        sentinels: ids that stand for one span after another.
        modes: ids of UL2's [NLU], [NLG], [S2S]; empty: there are none.
        fim: ids that come before the prefix, the suffix and the middle; empty: there are none.
        specials: all control ids: never masked, never predicted, never drawn as a random replacement.
        word_starts: bool [size], tokens that begin a word; None: every token does.
        sentence_ends: bool [size], tokens that end a sentence; None: none does.
        tokenizer: for what works on characters; None: there is none at hand.
    """

    size: int
    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int | None = None
    mask_id: int | None = None
    sentinels: tuple[int, ...] = ()
    modes: tuple[int, ...] = ()
    fim: tuple[int, ...] = ()
    specials: tuple[int, ...] = ()
    word_starts: np.ndarray | None = None
    sentence_ends: np.ndarray | None = None
    tokenizer: Tokenizer | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """The ids of a tokenizer, found by the usual names of special tokens."""
        named = tokenizer.named
        first = lambda names: next((named[n] for n in names if n in named), None)  # noqa: E731
        begin, end = ends_of(tokenizer)
        fim = [first(names) for names in FIM.values()]
        modes = [first([name]) for name in MODES]
        numbered = {int(m[1]): i for name, i in named.items() if (m := re.fullmatch(r"<extra_id_(\d+)>", name))}
        spans = tuple(numbered[n] for n in range(len(numbered)) if n in numbered)
        own = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id)
        mask = first(MASKS)
        control = {*own, begin, end, mask, *fim, *modes, *spans} - {None}
        silent = {i for i in named.values() if not tokenizer.piece_bytes(i)}
        pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
        texts = [tokenizer.piece_bytes(i).decode("utf-8", "replace") or piece for i, piece in enumerate(pieces)]
        silent |= {i for i, piece in enumerate(pieces) if not piece}  # gaps between ids
        return cls(
            size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id or 0,
            bos_id=begin,
            eos_id=end,
            mask_id=mask,
            sentinels=spans,
            modes=() if None in modes else tuple(modes),  # type: ignore[arg-type]
            fim=() if None in fim else tuple(fim),  # type: ignore[arg-type]
            specials=tuple(sorted(control | silent)),  # type: ignore[type-var]
            word_starts=_word_starts(pieces, texts),
            sentence_ends=np.array([_SENTENCE_END.search(text) is not None for text in texts]),
            tokenizer=tokenizer,
        )

    @cached_property
    def is_special(self) -> np.ndarray:
        """bool [size]."""
        flags = np.zeros(self.size, bool)
        flags[list(self.specials)] = True
        return flags

    @cached_property
    def ordinary(self) -> np.ndarray:
        """int32: the ids that are no specials, in order: what random replacements are drawn from."""
        return np.flatnonzero(~self.is_special).astype(np.int32)

    def begins_word(self, tokens: np.ndarray) -> np.ndarray:
        """bool [n]: which of consecutive tokens begin a word; the first does, and specials are words of their own."""
        if self.word_starts is None:
            return np.ones(len(tokens), bool)
        begins = self.word_starts[tokens]
        special = self.is_special[tokens]
        begins |= special
        begins[1:] |= special[:-1]
        begins[:1] = True
        return begins


def ends_of(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The ids that stand around a sequence: [CLS] and [SEP] where there are such, else bos and eos."""
    begin, end = (tokenizer.id_of(name) for name in ("[CLS]", "[SEP]"))
    return tokenizer.bos_id if begin is None else begin, tokenizer.eos_id if end is None else end


_SENTENCE_END = re.compile(r"[.!?。！？]['\")\]]*[\s▁]*$|\n")


def _word_starts(pieces: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Tokens that begin a word: those without `##` where a tokenizer marks what continues one, else those that begin with, or
    are, white space."""
    if any(piece.startswith("##") and len(piece) > 2 for piece in pieces) and "[CLS]" in pieces:
        return np.array([not piece.startswith("##") for piece in pieces])
    spaced = [text[:1].isspace() for text in texts]
    return np.array([space or piece[:1] in ("▁", "Ġ", "Ċ") for piece, space in zip(pieces, spaced, strict=True)])
