"""The interface of every tokenizer."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from maxpretrain.data.store import storage_errors, write_atomically

MANIFEST = "maxpretrain_tokenizer.json"
SPECIAL = {"unk_id": "<unk>", "bos_id": "<s>", "eos_id": "</s>", "pad_id": "<pad>"}


class Tokenizer:
    """Text to ids and back.

    Attributes:
        kind: "sentencepiece", "huggingface", "bytes" or "characters".
        vocab_size: every id is below it.
        bos_id, eos_id, pad_id, unk_id: ids of control pieces, or None; pad is never the same id as eos.
        fingerprint: sha256 hex of what determines the ids.
    """

    kind: ClassVar[str]
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens]: the ids of `text`, without bos or eos."""
        return self.encode_batch([text])[0]

    def encode_marked(self, text: str) -> np.ndarray:
        """As `encode`, but control pieces that the text spells, such as a mask, are those tokens.

        Where words carry the space before them, one right before a control piece is left out: it is the hidden word's.
        """
        named = self.named
        if not named:
            return self.encode(text)
        names = "|".join(map(re.escape, sorted(named, key=len, reverse=True)))
        parts = re.split(f"{' ?' if self.spaces_lead else ''}({names})", text)
        ids = [[named[p]] if i % 2 else self.encode(p) for i, p in enumerate(parts)]
        return np.concatenate(ids).astype(np.int32)

    @cached_property
    def spaces_lead(self) -> bool:
        """Whether words carry the space before them, as pieces of sentencepiece do."""
        return any(re.match(rb" \w", self.piece_bytes(i)) for i in range(self.vocab_size))

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Many texts at once, which is much faster.

        Returns:
            ids: int32, of all texts one after another.
            lengths: int64 [len(texts)], how many belong to each.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control pieces have none, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.piece_bytes(int(i)) for i in ids).decode("utf-8", "replace")

    def id_of(self, name: str) -> int | None:
        """The id of the control piece or user symbol of that name; None where there is none."""
        return self.named.get(name)

    @property
    def named(self) -> dict[str, int]:
        """Control pieces and user symbols: name -> id."""
        raise NotImplementedError

    def piece(self, id: int) -> str:
        """The name of an id, for showing."""
        return self.piece_bytes(id).decode("utf-8", "backslashreplace")

    def piece_bytes(self, id: int) -> bytes:
        """What the id adds to the text, in UTF-8; empty for a control piece."""
        raise NotImplementedError

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as the ids arrive; half a character waits for its other half. Joined, it is `decode(ids)`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(self.piece_bytes(int(i)))
        yield decoder.decode(b"", final=True)

    @property
    def joins(self) -> bool:
        """Whether ids of consecutive parts of a text, cut at a newline, are ids of the whole; if so long documents are made in parts."""
        a, b = "some words,\n", "and  others\n"
        return self.decode(np.concatenate([self.encode(a), self.encode(b)])) == a + b

    def save(self, directory: Path | str) -> None:
        """Writes `maxpretrain_tokenizer.json` and the file it names, if any, into `directory`."""
        directory = Path(directory)
        manifest = {
            "format": "maxpretrain tokenizer",
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            **self._state(),
        }
        with storage_errors(f"writing the tokenizer to {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            for name, data in self._files().items():
                write_atomically(directory / name, data)
            write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=True).encode())

    def _state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("vocab_size", *SPECIAL)}

    def _files(self) -> dict[str, bytes]:
        return {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]!r})"


def fingerprint(kind: str, *parts: bytes) -> str:
    """sha256 hex of a kind and the byte strings that determine its ids."""
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
