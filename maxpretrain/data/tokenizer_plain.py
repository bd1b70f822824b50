"""Tokenizers without a model: bytes and characters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from maxpretrain.data.store import canonical
from maxpretrain.data.tokenizer_base import SPECIAL, Tokenizer, fingerprint
from maxpretrain.errors import UserError


class _Plain(Tokenizer):
    """What bytes and characters share: user symbols take the ids after the alphabet, and control symbols those after them.

    A user symbol named `<s>`, `</s>`, `<pad>` or `<unk>` is that control piece; without one the tokenizer has none, and
    documents follow each other with nothing between.
    """

    def __init__(self, alphabet: int, symbols: Sequence[str], controls: Sequence[str] = ()):
        both = (*symbols, *controls)
        if len(set(both)) != len(both) or "" in both:
            raise UserError(
                f"tokenizer.user_symbols and tokenizer.control_symbols {both} must be distinct and not empty"
            )
        self.controls = tuple(controls)
        self.symbols = tuple(both)
        self.vocab_size = alphabet + len(self.symbols)
        self._alphabet = alphabet
        for name, text in SPECIAL.items():
            setattr(self, name, alphabet + self.symbols.index(text) if text in self.symbols else None)
        matched = sorted((s for s in self.symbols if not self.is_control(s)), key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, matched)) + ")") if matched else None

    def is_control(self, symbol: str) -> bool:
        """Whether it is never found in a text."""
        return symbol in SPECIAL.values() or symbol in self.controls

    @property
    def joins(self) -> bool:
        return True

    @property
    def named(self) -> dict[str, int]:
        return {symbol: self._alphabet + i for i, symbol in enumerate(self.symbols)}

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._encode(text) for text in texts]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return np.concatenate([np.zeros(0, np.int32), *parts]), lengths

    def _encode(self, text: str) -> np.ndarray:
        if self._pattern is None:
            return self._encode_plain(text)
        parts = self._pattern.split(text)
        symbol = lambda s: np.array([self._alphabet + self.symbols.index(s)], np.int32)  # noqa: E731
        return np.concatenate([symbol(p) if i % 2 else self._encode_plain(p) for i, p in enumerate(parts)])

    def _encode_plain(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def _symbol_bytes(self, id: int) -> bytes:
        symbol = self.symbols[id - self._alphabet]
        return b"" if self.is_control(symbol) else symbol.encode()

    def piece(self, id: int) -> str:
        return self.symbols[id - self._alphabet] if id >= self._alphabet else super().piece(id)

    def _state(self) -> dict[str, Any]:
        users = self.symbols[: len(self.symbols) - len(self.controls)]
        return {**super()._state(), "symbols": users, "controls": self.controls}

    def _symbols_key(self) -> list[Any]:
        """What of the symbols determines the ids; without control symbols as it was before there were any."""
        return [self.symbols, self.controls] if self.controls else [self.symbols]


class Bytes(_Plain):
    """UTF-8 bytes: id = byte; user symbols from 256 on."""

    kind = "bytes"

    def __init__(self, symbols: Sequence[str] = (), controls: Sequence[str] = ()):
        super().__init__(256, symbols, controls)
        self.fingerprint = fingerprint(self.kind, *map(canonical, self._symbols_key()))

    def _encode_plain(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def piece_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else self._symbol_bytes(id)


class Characters(_Plain):
    """One id a character, in the order of code points; user symbols after them.

    A character that the alphabet lacks is `<unk>` where that is among the user symbols, and an error otherwise.

    Args:
        characters: the alphabet; sorted here.
        symbols: user symbols.
        controls: control symbols.
    """

    kind = "characters"

    def __init__(self, characters: Iterable[str], symbols: Sequence[str] = (), controls: Sequence[str] = ()):
        self.characters = "".join(sorted(set(characters)))
        super().__init__(len(self.characters), symbols, controls)
        self.fingerprint = fingerprint(self.kind, canonical([self.characters, *self._symbols_key()]))
        codes = np.frombuffer(self.characters.encode("utf-32-le"), np.uint32)
        self._ids = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)  # the last one stands for all beyond
        self._ids[codes] = np.arange(len(codes))

    def __reduce__(self) -> tuple[Any, ...]:
        return Characters, (self.characters, self.symbols[: len(self.symbols) - len(self.controls)], self.controls)

    def _encode_plain(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if len(ids) and ids.min() < 0:
            if self.unk_id is None:
                character = chr(codes[int(np.argmin(ids))])
                raise UserError(
                    f"the character {character!r} (U+{ord(character):04X}) is not among the {len(self.characters)} characters that the tokenizer "
                    f'knows; train on text that has it, or add "<unk>" to tokenizer.user_symbols'
                )
            ids = np.where(ids < 0, np.int32(self.unk_id), ids)
        return ids

    def piece_bytes(self, id: int) -> bytes:
        return self.characters[id].encode() if id < self._alphabet else self._symbol_bytes(id)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "characters": self.characters}
