"""The token store: flat shards of ids, document offsets, and a manifest that is written last.

A store is a folder:

    shard-00000.bin …   ids, little-endian uint16 or uint32, whichever holds the vocabulary; documents follow one another
    documents.bin       int64 [2, num_documents + 1]: where each document's tokens begin, and its UTF-8 bytes
    manifest.json       what the above must be (sizes, sha256, largest id, tokenizer); its presence makes the store good

Everything the manifest promises is checked at `Store.open`, because a truncated memory map is a SIGBUS without a message
and an id past the vocabulary is clamped in silence by the embedding.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from maxpretrain.errors import StorageError, UserError

FORMAT = "maxpretrain token store"
VERSION = 1
MANIFEST = "manifest.json"
DOCUMENTS = "documents.bin"
SHARD_TOKENS = 1 << 27
_EDGE = 4096  # bytes at each end of a shard that are hashed at every open


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turns a full disk, a missing permission or a vanished folder into one sentence about `doing`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"the disk is full while {doing}; free some space, or set MAXPRETRAIN_CACHE to another disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            where = error.filename or "its folder"
            raise UserError(
                f"no permission to write {where} while {doing}; set MAXPRETRAIN_CACHE to a folder that you may write"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"{error.filename} is in the way while {doing}: a file stands where a folder is needed; move it, or set MAXPRETRAIN_CACHE"
            ) from error
        raise


def canonical(value: Any) -> bytes:
    """JSON of `value` with sorted keys: the same bytes for the same value."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` so that `path` holds either all of it or what it held before, even through a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class StoreWriter:
    """Writes a store, document by document; a context manager that leaves a good store, or none at all.

    Args:
        path: the folder to make; it must not hold a store already.
        vocab_size: every id must be below it; decides the dtype.
        tokenizer_fingerprint: of the tokenizer that made the ids.
        meta: JSON values to keep in the manifest (source, cleaning version, …); part of the fingerprint.
        shard_tokens: tokens per shard file, at least 1.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        vocab_size: int,
        tokenizer_fingerprint: str,
        meta: dict[str, Any] | None = None,
        shard_tokens: int = SHARD_TOKENS,
    ):
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.dtype = dtype_for(vocab_size)
        self._tokenizer = tokenizer_fingerprint
        self._meta = meta or {}
        self._shard_tokens = shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._in_shard = 0
        self._max_id = -1
        self._lengths: list[np.ndarray] = []
        self._bytes: list[np.ndarray] = []
        if (self.path / MANIFEST).exists():
            raise UserError(f"{self.path} already holds a token store; remove it first")
        with storage_errors("making the token store"):
            self.path.mkdir(parents=True, exist_ok=True)
            for old in [*self.path.glob("shard-*.bin"), self.path / DOCUMENTS]:  # left by a killed writer
                old.unlink(missing_ok=True)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Appends one document: its ids (with its end-of-sequence id, where there is one) and the UTF-8 bytes it came from."""
        self.add_many(ids, np.array([len(ids)], np.int64), np.array([num_bytes], np.int64))

    def add_many(self, ids: np.ndarray, lengths: np.ndarray, num_bytes: np.ndarray, *, continues: bool = False) -> None:
        """Appends documents whose ids follow one another.

        Args:
            ids: integer [sum(lengths)].
            lengths: int64 [documents], tokens of each.
            num_bytes: int64 [documents], UTF-8 bytes of the text of each.
            continues: the first of them is more of the document appended last.
        """
        ids = np.asarray(ids)
        if int(np.sum(lengths)) != len(ids):
            raise ValueError(f"lengths sum to {int(np.sum(lengths))}, but there are {len(ids)} ids")
        if len(ids):
            low, high = int(ids.min()), int(ids.max())
            # astype(uint16) would wrap 70000 to 4464 in silence.
            if low < 0 or high >= self.vocab_size:
                bad = low if low < 0 else high
                raise UserError(
                    f"the tokenizer made id {bad}, outside its vocabulary of {self.vocab_size}; its files do not belong together"
                )
            self._max_id = max(self._max_id, high)
        lengths, num_bytes = np.array(lengths, np.int64), np.array(num_bytes, np.int64)
        if continues and len(lengths):
            self._lengths[-1][-1] += lengths[0]
            self._bytes[-1][-1] += num_bytes[0]
            lengths, num_bytes = lengths[1:], num_bytes[1:]
        if len(lengths):
            self._lengths.append(lengths)
            self._bytes.append(num_bytes)
        with storage_errors(f"writing tokens to {self.path}"):
            self._write(ids.astype(self.dtype, copy=False))

    def _write(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._file is None:
                name = f"shard-{len(self._shards):05d}.bin"
                self._file = open(self.path / name, "wb")  # noqa: SIM115
                self._shards.append({"file": name, "tokens": 0})
                self._digest, self._in_shard = hashlib.sha256(), 0
            room = self._shard_tokens - self._in_shard
            part = np.ascontiguousarray(ids[:room])
            self._file.write(part.data)
            self._digest.update(part.data)
            self._in_shard += len(part)
            ids = ids[room:]
            if self._in_shard == self._shard_tokens:
                self._finish_shard()

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        shard = self._shards[-1]
        shard["tokens"] = self._in_shard
        shard["size"] = self._in_shard * self.dtype.itemsize
        shard["sha256"] = self._digest.hexdigest()
        shard["edges"] = _edges(self.path / shard["file"], shard["size"])

    def close(self) -> Store:
        """Writes the manifest, which makes the store good, and opens it."""
        lengths = np.concatenate([np.zeros(1, np.int64), *self._lengths])
        sizes = np.concatenate([np.zeros(1, np.int64), *self._bytes])
        documents = np.stack([np.cumsum(lengths), np.cumsum(sizes)]).astype("<i8").tobytes()
        with storage_errors(f"writing the token store {self.path}"):
            self._finish_shard()
            write_atomically(self.path / DOCUMENTS, documents)
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "dtype": self.dtype.name,
                "num_tokens": int(lengths.sum()),
                "num_documents": len(lengths) - 1,
                "num_bytes": int(sizes.sum()),
                "max_id": self._max_id,
                "vocab_size": self.vocab_size,
                "tokenizer": self._tokenizer,
                "meta": self._meta,
                "shards": self._shards,
                "documents": {"size": len(documents), "sha256": hashlib.sha256(documents).hexdigest()},
            }
            manifest["fingerprint"] = hashlib.sha256(canonical(manifest)).hexdigest()
            write_atomically(self.path / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
        return Store.open(self.path)

    def abort(self) -> None:
        """Removes what was written: without a manifest it is no store."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for old in [*self.path.glob("shard-*.bin"), self.path / DOCUMENTS]:
            old.unlink(missing_ok=True)


def _edges(path: Path, size: int) -> str:
    """sha256 of the first and last bytes of a shard: cheap enough for every open, and it tells shards of one size apart."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(_EDGE))
        file.seek(max(0, size - _EDGE))
        digest.update(file.read(_EDGE))
    return digest.hexdigest()


class Store:
    """Tokens and document offsets of one source and split: read-only, memory-mapped, picklable (a copy opens the files again).

    Attributes:
        path: its folder.
        num_tokens, num_documents: what it holds, end-of-sequence ids counted as tokens.
        num_bytes: UTF-8 bytes of the text the tokens came from.
        dtype: of the shards.
        max_id: largest id, -1 where there is no token.
        vocab_size: of the tokenizer that made the ids.
        tokenizer_fingerprint: of that tokenizer.
        fingerprint: sha256 that changes with any token, offset or the tokenizer.
        meta: what the writer noted about source and cleaning.
        offsets: int64 [num_documents + 1], where each document's tokens begin.
        byte_offsets: int64 [num_documents + 1], the same in UTF-8 bytes of the text.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self.num_tokens: int = manifest["num_tokens"]
        self.num_documents: int = manifest["num_documents"]
        self.num_bytes: int = manifest["num_bytes"]
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.max_id: int = manifest["max_id"]
        self.vocab_size: int = manifest["vocab_size"]
        self.tokenizer_fingerprint: str = manifest["tokenizer"]
        self.fingerprint: str = manifest["fingerprint"]
        self.meta: dict[str, Any] = manifest["meta"]
        self._starts = np.cumsum([0, *(s["tokens"] for s in manifest["shards"])])
        table = np.fromfile(path / DOCUMENTS, "<i8").reshape(2, self.num_documents + 1)
        self.offsets: np.ndarray = table[0]
        self.byte_offsets: np.ndarray = table[1]
        self._maps = [_map(path / s["file"], self.dtype) for s in manifest["shards"]]

    @classmethod
    def open(
        cls, path: Path | str, *, tokenizer_fingerprint: str | None = None, vocab_size: int | None = None
    ) -> Store:
        """Opens a store after checking its manifest, its list of shards, every file's size and both ends of every shard.

        Args:
            path: the store's folder.
            tokenizer_fingerprint: refuse a store that another tokenizer made.
            vocab_size: refuse a store that holds an id this large or larger.

        Raises:
            UserError: the store is absent, damaged, or not the one asked for.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        _check_files(path, manifest)
        if tokenizer_fingerprint is not None and manifest["tokenizer"] != tokenizer_fingerprint:
            raise UserError(
                f"the token store {path} was made with another tokenizer ({manifest['tokenizer'][:12]}, not {tokenizer_fingerprint[:12]}); "
                f"prepare the data again, or use the tokenizer it was made with"
            )
        limit = manifest["vocab_size"] if vocab_size is None else vocab_size
        if manifest["max_id"] >= limit:
            raise UserError(
                f"the token store {path} holds id {manifest['max_id']}, but the vocabulary has {limit}; "
                f"set model.vocab_size to at least {manifest['max_id'] + 1}, or prepare the data with a smaller tokenizer"
            )
        return cls(path, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.path,)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, tokens={self.num_tokens}, documents={self.num_documents})"

    def verify(self, full: bool = True) -> None:
        """Checks the files again; `full` reads everything and compares sha256.

        Raises:
            UserError: names the file that is not what was written.
        """
        _check_files(self.path, self.manifest)
        if not full:
            return
        expected = {s["file"]: s["sha256"] for s in self.manifest["shards"]} | {
            DOCUMENTS: self.manifest["documents"]["sha256"]
        }
        for name, digest in expected.items():
            with open(self.path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                raise _damaged(
                    self.path, f"{name} does not have the sha256 that was written ({found[:12]}, not {digest[:12]})"
                )

    def read(self, start: int, length: int) -> np.ndarray:
        """int32 [length]: the tokens from `start`; may cross documents and shards.

        Raises:
            IndexError: the range leaves the store.
        """
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"tokens {start} to {start + length} of a store of {self.num_tokens}")
        out = np.empty(length, np.int32)
        shard = int(np.searchsorted(self._starts, start, "right")) - 1
        done = 0
        while done < length:
            offset = start + done - int(self._starts[shard])
            part = self._maps[shard][offset : offset + length - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return out

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """int32 [N, length]: many windows at once.

        Args:
            starts: int64 [N], each in [0, num_tokens - length].
            length: tokens per window.

        Raises:
            IndexError: a window leaves the store.
        """
        starts = np.asarray(starts, np.int64)
        out = np.empty((len(starts), length), np.int32)
        if not len(starts) or not length:
            return out
        if starts.min() < 0 or starts.max() + length > self.num_tokens:
            raise IndexError(
                f"windows of {length} from {starts.min()} to {starts.max()} of a store of {self.num_tokens}"
            )
        shards = np.searchsorted(self._starts, starts, "right") - 1
        inside = starts + length <= self._starts[shards + 1]
        for shard in np.unique(shards[inside]).tolist():
            rows = np.flatnonzero(inside & (shards == shard))
            windows = np.lib.stride_tricks.sliding_window_view(self._maps[shard], length)
            out[rows] = windows[starts[rows] - self._starts[shard]]
        for row in np.flatnonzero(~inside):
            out[row] = self.read(int(starts[row]), length)
        return out

    def segments(self, start: int, length: int) -> np.ndarray:
        """int32 [length]: 1, 2, 3, … by document, counted from the window's first document."""
        first = int(np.searchsorted(self.offsets, start, "right")) - 1
        last = int(np.searchsorted(self.offsets, start + length, "left"))
        sizes = np.diff(np.clip(self.offsets[first : last + 1], start, start + length))
        sizes = sizes[sizes > 0]  # a document without tokens takes no number
        return np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"the token store {path} is damaged: {what}; delete that folder and run again to prepare it afresh"
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} holds no token store (no {MANIFEST}); run maxpretrain prepare") from None
    except (ValueError, UnicodeDecodeError):
        raise _damaged(path, f"{MANIFEST} is not JSON") from None
    except OSError as error:
        raise UserError(f"the token store {path} cannot be read: {error.strerror}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path / MANIFEST} does not describe a token store; give another path")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"the token store {path} has format version {manifest.get('version')}, this program reads {VERSION}; prepare the data again"
        )
    stated = manifest.get("fingerprint")
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    if hashlib.sha256(canonical(content)).hexdigest() != stated:
        raise _damaged(path, f"{MANIFEST} was changed after it was written")
    return manifest


def _check_files(path: Path, manifest: dict[str, Any]) -> None:
    """The cheap checks: the list of shards, sizes, both ends of each shard, the offsets."""
    listed = [s["file"] for s in manifest["shards"]]
    found = sorted(p.name for p in path.glob("shard-*.bin"))
    for name in listed:
        if name not in found:
            raise _damaged(path, f"{name} is missing")
    if listed != found:
        raise _damaged(path, f"it holds {len(found)} shards where its manifest lists {len(listed)}")
    sizes = [(s["file"], s["size"]) for s in manifest["shards"]] + [(DOCUMENTS, manifest["documents"]["size"])]
    for name, size in sizes:
        try:
            actual = (path / name).stat().st_size
        except FileNotFoundError:
            raise _damaged(path, f"{name} is missing") from None
        if actual != size:
            raise _damaged(path, f"{name} has {actual} bytes, not {size}")
    for shard in manifest["shards"]:
        if _edges(path / shard["file"], shard["size"]) != shard["edges"]:
            raise _damaged(
                path, f"{shard['file']} does not begin and end as it was written (shards out of order, or overwritten)"
            )
    if sum(s["tokens"] for s in manifest["shards"]) != manifest["num_tokens"]:
        raise _damaged(path, "its shards do not add up to its number of tokens")
    digest = hashlib.sha256((path / DOCUMENTS).read_bytes()).hexdigest()
    if digest != manifest["documents"]["sha256"]:
        raise _damaged(path, f"{DOCUMENTS} does not have the sha256 that was written")
