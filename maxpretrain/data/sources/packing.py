"""Files packed with gzip or zstandard, read as a stream that notices when the end is missing."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator

_BLOCK = 1 << 20


class Damaged(Exception):
    """The archive ends early, or is none."""


def blocks(path: str, packing: str) -> Iterator[bytes]:
    """The unpacked content, block by block.

    Raises:
        Damaged: after the last good block, where the file is cut off or not of this packing.
    """
    if packing == ".gz":
        yield from _gzip(path)
    elif packing == ".zst":
        yield from _zstandard(path)
    else:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                yield block


def _gzip(path: str) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        while True:
            try:
                block = file.read1(_BLOCK)  # read() would lose what came before the damage
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise Damaged(str(error)) from None
            if not block:
                return
            yield block


def _zstandard(path: str) -> Iterator[bytes]:
    import zstandard

    with open(path, "rb") as file:
        frame = None  # zstandard's own reader takes a cut-off frame for a whole one
        while data := file.read(_BLOCK):
            while data:
                if frame is None or frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                try:
                    block = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise Damaged(str(error)) from None
                data = frame.unused_data if frame.eof else b""
                if block:
                    yield block
        if frame is not None and not frame.eof:
            raise Damaged("the last frame is cut off")
