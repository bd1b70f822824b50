"""JSON Lines: one object a line, its text in `data.text_field`, its id in `id` (or the place of the line). Also a JSON array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from maxpretrain.data.clean import (
    BAD_LINE,
    EMPTY,
    INVALID_UTF8,
    NO_TEXT,
    TRUNCATED,
    BadDocument,
    Document,
    check,
    excerpt,
)
from maxpretrain.data.sources import base, packing
from maxpretrain.data.sources.base import File, Part

_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[")


def parts(file: File, options: dict[str, str], whole_documents: bool) -> Iterator[Part]:
    if file.packing:
        yield from _packed(file)
        return
    with open(file.path, "rb") as opened:
        if _ARRAY.match(opened.read(64)):
            yield Part(file, 0, file.size, file.size)  # a JSON array can only be read whole
            return
        start = 0
        while start < file.size:
            opened.seek(start + base.PART_BYTES)
            opened.readline()
            stop = min(max(opened.tell(), start + 1), file.size)
            yield Part(file, start, stop, stop - start)
            start = stop


def _packed(file: File) -> Iterator[Part]:
    held: list[bytes] = []
    size, start, array = 0, 0, False
    try:
        for block in packing.blocks(file.path, file.packing):
            array = array or (not held and not start and bool(_ARRAY.match(block[:64])))
            held.append(block)
            size += len(block)
            if not array and size >= base.PART_BYTES and b"\n" in block:
                whole, _, rest = b"".join(held).rpartition(b"\n")
                yield Part(file, start, start + len(whole) + 1, len(whole), whole)
                start += len(whole) + 1
                held, size = [rest], len(rest)
    except packing.Damaged as error:
        whole, newline, _ = b"".join(held).rpartition(b"\n")  # the line that the damage cut is lost
        bad = BadDocument(file.name, TRUNCATED, str(error))
        yield Part(file, start, start + len(whole) + len(newline), len(whole), whole, bad=(bad,))
        return
    yield Part(file, start, start + size, size, b"".join(held))


def documents(part: Part, options: dict[str, str]) -> Iterator[Document | BadDocument]:
    data = part.data
    if data is None:
        with open(part.file.path, "rb") as file:
            file.seek(part.start)
            data = file.read(part.stop - part.start)
    if part.start == 0 and _ARRAY.match(data[:64]):
        yield from _array(part, data, options["text_field"])
        return
    at = part.start
    for line in data.split(b"\n"):
        if line and not line.isspace():
            yield _line(f"{part.file.name}@{at}", line, options["text_field"])
        at += len(line) + 1


def _line(id: str, line: bytes, text_field: str) -> Document | BadDocument:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return BadDocument(id, INVALID_UTF8, f"byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return BadDocument(id, BAD_LINE, f"{error}: {excerpt(line.decode('utf-8', 'backslashreplace'))}"[:200])
    return document(id, record, text_field)


def _array(part: Part, data: bytes, text_field: str) -> Iterator[Document | BadDocument]:
    try:
        records = json.loads(data)
    except UnicodeDecodeError as error:
        yield BadDocument(part.file.name, INVALID_UTF8, f"byte {error.start}")
        return
    except (ValueError, RecursionError) as error:
        yield BadDocument(part.file.name, BAD_LINE, str(error)[:200])
        return
    for i, record in enumerate(records):
        yield document(f"{part.file.name}[{i}]", record, text_field)


def document(id: str, record: Any, text_field: str) -> Document | BadDocument:
    """A document from a parsed record; its `id` field, where it has one, replaces `id`."""
    if not isinstance(record, dict):
        return BadDocument(id, BAD_LINE, f"a {type(record).__name__}")
    if isinstance(record.get("id"), str | int) and record["id"] != "":
        id = str(record["id"]).encode("utf-8", "backslashreplace").decode()
    text = record.get(text_field)
    if text is None and text_field in record:
        return BadDocument(id, EMPTY)
    if not isinstance(text, str):
        return BadDocument(id, NO_TEXT, f"fields: {', '.join(map(ascii, list(record)[:10]))}")
    return check(Document(id, text))
