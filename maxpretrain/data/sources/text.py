"""Plain text: a file is a document, or many where `data.separator` stands between them.

A long document is handed out in parts that end at a newline, so that one big file keeps every worker busy.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from maxpretrain.data.clean import EMPTY, INVALID_UTF8, NUL, TRUNCATED, BadDocument, Document, decode, excerpt
from maxpretrain.data.sources import base, packing
from maxpretrain.data.sources.base import File, Part


def separator(options: dict[str, str]) -> bytes:
    """The separator, with `\\n` and `\\t` as typed on a command line understood."""
    return options["separator"].replace("\\n", "\n").replace("\\t", "\t").encode()


def parts(file: File, options: dict[str, str], whole_documents: bool) -> Iterator[Part]:
    between = separator(options)
    if between:
        yield from _separated(file, between)
    elif whole_documents or (not file.packing and file.size <= base.PART_BYTES):
        yield Part(file, 0, file.size, file.size, None if not file.packing else _unpacked(file))
    else:
        yield from _one_document(file)


def _unpacked(file: File) -> bytes | None:
    try:
        return b"".join(packing.blocks(file.path, file.packing))
    except packing.Damaged:
        return None  # `documents` meets the damage again, and reports it


def _one_document(file: File) -> Iterator[Part]:
    # Its first parts are tokenized before its end is read, so it is checked beforehand.
    bad = _validate(file)
    if bad is not None:
        yield Part(file, 0, 0, 0, b"", bad=(bad,))
        return
    start, held = 0, b""
    for block in packing.blocks(file.path, file.packing):
        held += block
        while len(held) > base.PART_BYTES:
            # What is held back keeps the last part from being empty.
            cut = _cut(held, base.PART_BYTES)
            yield Part(
                file, start, start + cut, cut, held[:cut] if file.packing else None, first=start == 0, last=False
            )
            start += cut
            held = held[cut:]
    yield Part(file, start, start + len(held), len(held), held if file.packing else None, first=start == 0)


def _cut(data: bytes, limit: int) -> int:
    """Where to end a part: after the last newline before `limit`, else before the last space, else between characters."""
    newline = data.rfind(b"\n", 0, limit)
    if newline >= 0:
        return newline + 1
    space = data.rfind(b" ", 1, limit)
    if space > 0:
        return space
    while data[limit] & 0xC0 == 0x80:
        limit -= 1
    return limit


def _validate(file: File) -> BadDocument | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    blank, at = True, 0
    try:
        for block in packing.blocks(file.path, file.packing):
            text = decoder.decode(block)
            blank = blank and (not text or text.isspace())
            if "\0" in text:
                return BadDocument(file.name, NUL, excerpt(text, text.index("\0")))
            at += len(block)
        decoder.decode(b"", final=True)
    except packing.Damaged as error:
        return BadDocument(file.name, TRUNCATED, str(error))
    except UnicodeDecodeError as error:
        return BadDocument(file.name, INVALID_UTF8, f"byte {at + error.start}, about")
    return BadDocument(file.name, EMPTY) if blank else None


def _separated(file: File, between: bytes) -> Iterator[Part]:
    start, held, bad = 0, bytearray(), ()
    try:
        for block in packing.blocks(file.path, file.packing):
            seen = max(0, len(held) - len(between))
            held += block
            cut = held.rfind(between, seen) + len(between)
            if len(held) > base.PART_BYTES and cut >= len(between):
                yield Part(file, start, start + cut, cut, bytes(held[:cut]) if file.packing else None)
                start += cut
                del held[:cut]
    except packing.Damaged as error:
        del held[
            held.rfind(between) + len(between) if between in held else 0 :
        ]  # the document that the damage cut is lost
        bad = (BadDocument(file.name, TRUNCATED, str(error)),)
    yield Part(file, start, start + len(held), len(held), bytes(held) if file.packing else None, bad=bad)


def documents(part: Part, options: dict[str, str]) -> Iterator[Document | BadDocument]:
    data = part.data
    if data is None and part.file.packing:
        yield BadDocument(part.file.name, TRUNCATED)
        return
    if data is None:
        with open(part.file.path, "rb") as file:
            file.seek(part.start)
            data = file.read(part.stop - part.start)
    between = separator(options)
    if between:
        at = part.start
        for piece in data.split(between):
            if piece.strip():  # nothing between two separators is no document
                yield decode(piece, f"{part.file.name}@{at}")
            at += len(piece) + len(between)
    elif part.first and part.last:
        if not part.bad:
            yield decode(data, part.file.name)
    else:
        text = data.decode("utf-8-sig" if part.first else "utf-8")
        yield Document(part.file.name, text, part.first, part.last)
