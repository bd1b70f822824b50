"""What every source of documents does, and the files that most of them are made of."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maxpretrain.data.clean import BadDocument, Document
from maxpretrain.data.store import canonical
from maxpretrain.errors import UserError

PART_BYTES = 4 << 20  # text that one task of a worker holds, about
_HASHED_BYTES = 64 << 20  # sources up to this size are fingerprinted by content, larger ones by size and time of change


@dataclass(frozen=True)
class File:
    """A file of a source: where it is, what documents in it are named by, its size in bytes, and its format and packing."""

    path: str
    name: str
    size: int
    format: str = "text"
    packing: str = ""


@dataclass(frozen=True)
class Part:
    """A picklable piece of a source, enough for one task of a worker.

    Attributes:
        file: it is of; None for sources that are no files.
        start, stop: its range, in the format's own unit.
        size: text in it, in bytes, about.
        data: the content itself, where a worker cannot seek to it.
        first, last: whether it begins and ends its document, where that is longer than a part.
        bad: documents already known to be unusable.
    """

    file: File | None
    start: int
    stop: int
    size: int
    data: bytes | None = None
    first: bool = True
    last: bool = True
    bad: tuple[BadDocument, ...] = ()


@dataclass
class Source:
    """Documents from one place; subclasses say how. Picklable: workers open parts by themselves.

    Attributes:
        name: as the user gave it.
        size: bytes of text, about.
        whole_documents: never cut a long document into parts (for tokenizers whose ids cannot be joined).
    """

    name: str
    size: int = 0
    whole_documents: bool = False

    def units(self) -> list[Any]:
        """What `parts` are listed by, in order: files, for most; each has a `size` in bytes and may not be `seekable`."""
        raise NotImplementedError

    def parts(self, unit: Any) -> Iterator[Part]:
        """Pieces of a unit, in order; the same at every call."""
        raise NotImplementedError

    def seekable(self, unit: Any) -> bool:
        """Whether listing the parts of a unit costs much less than reading it."""
        return True

    def documents(self, part: Part) -> Iterator[Document | BadDocument]:
        """Documents of a part, in order, good and bad."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """sha256 hex that changes with the documents."""
        raise NotImplementedError


@dataclass
class FileSource(Source):
    """Documents in files.

    Attributes:
        files: in order.
        options: fields of DataConfig that change how they are read (text_field, separator).
    """

    files: list[File] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)

    def units(self) -> list[File]:
        return self.files

    def _format(self, file: File) -> Any:
        from maxpretrain.data.sources import FORMATS

        return FORMATS[file.format]

    def seekable(self, unit: File) -> bool:
        return not unit.packing

    def parts(self, unit: File) -> Iterator[Part]:
        with reading(unit.path):
            yield from self._format(unit).parts(unit, self.options, self.whole_documents)

    def documents(self, part: Part) -> Iterator[Document | BadDocument]:
        yield from part.bad
        with reading(part.file.path):
            yield from self._format(part.file).documents(part, self.options)

    def fingerprint(self) -> str:
        content = self.size <= _HASHED_BYTES and len(self.files) <= 1000
        rows = []
        for file in self.files:
            with reading(file.path):
                rows.append(
                    [
                        file.name,
                        file.size,
                        _sha256(file.path)
                        if content
                        else [os.path.realpath(file.path), os.stat(file.path).st_mtime_ns],
                    ]
                )
        return hashlib.sha256(canonical([rows, self.options])).hexdigest()


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns a file that vanished or may not be read into one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{path} not found; it was there a moment ago, so run again when nothing else changes it"
        ) from error
    except PermissionError as error:
        raise UserError(f"no permission to read {path}; change its permissions, or name other data") from error


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_files(spec: str) -> list[File]:
    """The files that a path, folder or glob names, sorted by name; names are relative to what they have in common.

    Raises:
        UserError: there is none, or one cannot be read or is of a format that is not.
    """
    from maxpretrain.data.sources import PACKINGS, SUFFIXES, UNREADABLE

    pattern = os.path.expanduser(spec)
    if os.path.isdir(pattern):
        known = tuple(SUFFIXES) + tuple(s + p for s in SUFFIXES for p in PACKINGS)
        paths = sorted(str(p) for p in Path(pattern).rglob("*") if p.name.endswith(known) and p.is_file())
        if not paths:
            raise UserError(f"the folder {spec} holds no {', '.join(SUFFIXES)} file; name a file or a glob")
    elif os.path.exists(pattern) or not glob.has_magic(pattern):
        paths = [pattern]
    else:
        paths = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
        if not paths:
            raise UserError(f'no file matches "{spec}" (from {os.getcwd()}); check the path')
    common = os.path.dirname(paths[0]) if len(paths) == 1 else os.path.commonpath(paths)
    files = []
    for path in paths:
        stem, packing = os.path.splitext(path)
        if packing not in PACKINGS:
            stem, packing = path, ""
        suffix = os.path.splitext(stem)[1].lower()
        if suffix in UNREADABLE:
            raise UserError(f"{path}: {UNREADABLE[suffix]}")
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise UserError(
                f"data file {path} {'not found' if isinstance(error, FileNotFoundError) else error.strerror}; check the path"
            ) from None
        if not os.access(path, os.R_OK):
            raise UserError(f"no permission to read {path}; change its permissions, or name other data")
        files.append(File(path, os.path.relpath(path, common or "."), size, SUFFIXES.get(suffix, "text"), packing))
    return files
