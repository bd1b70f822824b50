"""One task of the preparation: the documents of a part, checked, sent to training or validation, and tokenized.

A pure function of the part, so that the result is the same in this process or in any number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from maxpretrain.data.clean import GIANT_BYTES, BadDocument, Document, Tally
from maxpretrain.data.sources.base import Part, Source
from maxpretrain.data.store import dtype_for
from maxpretrain.data.tokenizer import Tokenizer
from maxpretrain.errors import UserError

TRAIN, VALIDATION = 0, 1
_BATCH = 4 << 20  # characters tokenized in one call
_CHUNK = (
    1 << 20
)  # longer texts are tokenized in parts cut at newlines: a sentencepiece lattice takes a hundred bytes a character


@dataclass(frozen=True)
class Route:
    """Which documents are for training and which for validation.

    Attributes:
        mode: "all": training; "documents": by a hash of the document's id; "tail": by place in the text.
        fraction: share of the validation, with "documents".
        cut: characters before the validation, with "tail".
    """

    mode: Literal["all", "documents", "tail"] = "all"
    fraction: float = 0.0
    cut: int = 0

    def sides(self, document: Document, at: int) -> Iterator[tuple[int, Document]]:
        """(TRAIN or VALIDATION, document): two where the cut goes through it.

        Args:
            document: a good document, or part of one.
            at: characters of the source before it.
        """
        if self.mode == "all":
            yield TRAIN, document
        elif self.mode == "documents":
            number = int.from_bytes(hashlib.sha256(document.id.encode()).digest()[:8], "big")
            yield (VALIDATION if number < self.fraction * 2.0**64 else TRAIN), document
        else:
            here = self.cut - at
            if here > 0 or (here == 0 and not document.first):  # even with no character left: the document must end
                yield (
                    TRAIN,
                    Document(
                        document.id,
                        document.text[:here],
                        document.first,
                        document.last or here <= len(document.text) - 1,
                    ),
                )
            if here < len(document.text):
                yield (
                    VALIDATION,
                    Document(document.id, document.text[max(0, here) :], document.first or here >= 0, document.last),
                )


@dataclass
class Encoded:
    """Tokens of consecutive documents.

    Attributes:
        ids: unsigned [tokens], end-of-sequence ids included.
        lengths: int64 [documents].
        num_bytes: int64 [documents], UTF-8 bytes of their text.
        continues: the first is more of the document before.
    """

    ids: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    continues: bool


@dataclass
class Task:
    """What a worker is asked: a part, of which source and unit, and how many characters of that source come before it."""

    part: Part
    source: int = 0
    unit: int = 0
    at: int = 0


@dataclass
class Result:
    """What a worker answers.

    Attributes:
        source, unit: as in the task.
        sides: (training, validation); None where nothing went there, or where only counting was asked for.
        tally: good and bad documents.
        characters: of the good ones.
        size: of the part, for progress.
    """

    source: int = 0
    unit: int = 0
    sides: tuple[Encoded | None, Encoded | None] = (None, None)
    tally: Tally = field(default_factory=Tally)
    characters: int = 0
    size: int = 0


@dataclass
class Job:
    """What all tasks of a pass share; with a tokenizer they tokenize, without one they only count characters. Picklable."""

    sources: list[Source]
    routes: list[Route]
    tokenizer: Tokenizer | None = None
    threads: int = 1

    def __call__(self, task: Task) -> Result:
        source = self.sources[task.source]
        if self.tokenizer is None:
            return count(source, task)
        return encode(source, task, self.routes[task.source], self.tokenizer, self.threads)


def good_documents(source: Source, part: Part, tally: Tally) -> Iterator[Document]:
    """The usable documents of a part; the others, and the giants, go to the tally."""
    for document in source.documents(part):
        if isinstance(document, BadDocument):
            tally.refuse(document)
            continue
        tally.good += document.first
        if len(document.text) > GIANT_BYTES // 4:
            size = len(document.text.encode())
            if size > GIANT_BYTES:
                tally.giant.append((document.id, size))
        yield document


def count(source: Source, task: Task) -> Result:
    """Only how many characters the good documents of a part have."""
    result = Result(task.source, task.unit, size=task.part.size)
    result.characters = sum(len(d.text) for d in good_documents(source, task.part, result.tally))
    return result


def encode(source: Source, task: Task, route: Route, tokenizer: Tokenizer, threads: int = 1) -> Result:
    """Tokenizes a part."""
    result = Result(task.source, task.unit, size=task.part.size)
    routed: tuple[list[Document], list[Document]] = ([], [])
    made: tuple[list[Encoded], list[Encoded]] = ([], [])
    waiting = 0
    for document in good_documents(source, task.part, result.tally):
        for side, piece in route.sides(document, task.at + result.characters):
            routed[side].append(piece)
        result.characters += len(document.text)
        waiting += len(document.text)
        if waiting >= _BATCH:
            _flush(routed, made, tokenizer, threads)
            waiting = 0
    _flush(routed, made, tokenizer, threads)
    result.sides = (_join(made[TRAIN]), _join(made[VALIDATION]))
    return result


def _flush(
    routed: tuple[list[Document], list[Document]],
    made: tuple[list[Encoded], list[Encoded]],
    tokenizer: Tokenizer,
    threads: int,
) -> None:
    for documents, encoded in zip(routed, made, strict=True):
        if documents:
            encoded.append(encode_documents(documents, tokenizer, threads))
            documents.clear()


def encode_documents(documents: list[Document], tokenizer: Tokenizer, threads: int = 1) -> Encoded:
    """Ids of documents, each followed by the end-of-sequence id where the tokenizer has one."""
    texts: list[str] = []
    counts = np.empty(len(documents), np.int64)
    for i, document in enumerate(documents):
        chunks = list(_chunks(document.text)) if len(document.text) > _CHUNK and tokenizer.joins else [document.text]
        texts.extend(chunks)
        counts[i] = len(chunks)
    try:
        ids, of_texts = tokenizer.encode_batch(texts, threads)
    except UserError as error:
        raise UserError(f"{_culprit(documents, tokenizer)}{error}") from None
    lengths = np.add.reduceat(of_texts, np.cumsum(counts) - counts)
    if tokenizer.eos_id is not None:
        ended = np.array([d.last for d in documents])
        ids = np.insert(ids, np.cumsum(lengths)[ended], tokenizer.eos_id)
        lengths = lengths + ended
    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    if low < 0 or high >= tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer made id {low if low < 0 else high}, outside its vocabulary of {tokenizer.vocab_size}; its files do not belong together"
        )
    sizes = np.fromiter(
        (len(d.text) if d.text.isascii() else len(d.text.encode()) for d in documents), np.int64, len(documents)
    )
    return Encoded(ids.astype(dtype_for(tokenizer.vocab_size)), lengths, sizes, not documents[0].first)


def _culprit(documents: list[Document], tokenizer: Tokenizer) -> str:
    for document in documents:
        try:
            tokenizer.encode(document.text)
        except UserError:
            return f'in document "{document.id}", '
    return ""


def _chunks(text: str) -> Iterator[str]:
    """Parts of about `_CHUNK` characters that end at a newline, a space, or anywhere."""
    start = 0
    while len(text) - start > _CHUNK:
        stop = text.rfind("\n", start, start + _CHUNK) + 1
        if stop <= start:
            stop = text.rfind(" ", start + 1, start + _CHUNK)
        if stop <= start:
            stop = start + _CHUNK
        yield text[start:stop]
        start = stop
    yield text[start:]


def _join(parts: Iterable[Encoded]) -> Encoded | None:
    parts = list(parts)
    if len(parts) <= 1:
        return parts[0] if parts else None
    return Encoded(
        np.concatenate([p.ids for p in parts]),
        np.concatenate([p.lengths for p in parts]),
        np.concatenate([p.num_bytes for p in parts]),
        parts[0].continues,
    )
