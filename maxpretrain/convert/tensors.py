"""The safetensors files of a Hugging Face directory, in and out, one tensor in memory at a time.

The format is a JSON header of names, dtypes, shapes and byte ranges, then the raw bytes of all tensors. Reading goes through
the `safetensors` library. Writing does not: the library wants every tensor of a file at once, while a header can be made
from shapes alone and the bytes appended as they come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from maxpretrain.errors import StorageError, UserError, nearest
from maxpretrain.manifest import sync_directory
from maxpretrain.storage import is_full, sentence

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".ckpt")
_LFS = b"version https://git-lfs"

TensorSource = tuple[str, Sequence[int], Any, Callable[[], np.ndarray]]
"""Name, shape, dtype, and what makes the array."""


class TensorFiles:
    """The tensors of a directory, read one at a time. Opening it reads headers only; close it, or use it in `with`."""

    def __init__(self, directory: Path, handles: dict[str, Any]):
        self.directory = directory
        self._handles = handles
        self._file: dict[str, str] = {}
        for file, handle in handles.items():
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in self._file:
                    raise UserError(
                        f'tensor "{name}" is in both {directory / self._file[name]} and {directory / file}; fetch the model anew'
                    )
                self._file[name] = file

    @classmethod
    def open(cls, directory: Path | str) -> TensorFiles:
        """Opens `model.safetensors`, or else the shards that `model.safetensors.index.json` names.

        Raises:
            UserError: there are no such files, or one is missing, truncated or garbled, or lacks a tensor that the index
                says it has.
        """
        directory = Path(directory).expanduser()
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory; give one that holds {WEIGHTS} and config.json")
        if (directory / WEIGHTS).is_file():
            return cls(directory, {WEIGHTS: _open(directory / WEIGHTS)})
        if not (directory / INDEX).is_file():
            raise _no_weights(directory)
        weight_map = _read_index(directory / INDEX)
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UserError(
                f"{directory} lacks {missing[0]}{_and_more(missing)} of the {len(names)} files that {INDEX} names; "
                "fetch the model again"
            )
        files = cls(directory, {name: _open(directory / name) for name in names})
        for tensor, file in weight_map.items():
            if files._file.get(tensor) != file:
                raise UserError(
                    f'{INDEX} says that tensor "{tensor}" is in {directory / file}, which does not hold it; fetch the model again'
                )
        return files

    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self._file)

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """float32, float16 or bfloat16.

        Raises:
            UserError: the tensor has another dtype.
        """
        code = self._slice(name).get_dtype()
        if code not in _DTYPES:
            raise UserError(
                f'tensor "{name}" in {self.directory / self._file[name]} has dtype {code}; read are {", ".join(_DTYPES)}: '
                "load the model in transformers with dtype=torch.bfloat16 and save it with save_pretrained"
            )
        return _DTYPES[code]

    def read(self, name: str) -> np.ndarray:
        """The array of one tensor, as its file has it.

        Raises:
            UserError: there is no such tensor, or it has a dtype that is not read.
        """
        dtype = self.dtype(name)
        array = self._handles[self._file[name]].get_tensor(name)
        assert array.dtype == dtype, (name, array.dtype, dtype)
        return array

    def _slice(self, name: str) -> Any:
        if name not in self._file:
            raise UserError(f'there is no tensor "{name}" in {self.directory}{nearest(name, self.names())}')
        return self._handles[self._file[name]].get_slice(name)

    def close(self) -> None:
        """Lets go of the files; arrays that were read stay good."""
        self._handles.clear()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        with open(path, "rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise UserError(
                    f"{path} is a Git LFS pointer, not the weights; run git lfs pull in its folder"
                ) from None
        why = str(error).removeprefix("Error while deserializing header: ")
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no safetensors file ({why}); fetch or save it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is not the JSON of a sharded model (an object with weight_map); fetch the model again"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    for file in weight_map.values():
        if Path(file).name != file:  # an index must not reach files outside of its folder
            raise UserError(f'{path} names "{file}", which is not a file of its own folder; fetch the model again')
    return weight_map


def _no_weights(directory: Path) -> UserError:
    names = sorted(p.name for p in directory.iterdir())
    other = [n for n in names if n.endswith(_OTHER_WEIGHTS) and n != "training_args.bin"]
    if other:
        return UserError(
            f"{directory} has weights only as {other[0]}{_and_more(other)}, which is not read; load the model in transformers "
            "and write it with save_pretrained(safe_serialization=True)"
        )
    tensors = [n for n in names if n.endswith(".safetensors")]
    if "adapter_model.safetensors" in tensors:
        return UserError(
            f"{directory} holds an adapter, not a model; merge it into its base model (peft's merge_and_unload) and save that"
        )
    if tensors:
        return UserError(
            f"{directory} has {tensors[0]}{_and_more(tensors)} but neither {WEIGHTS} nor {INDEX}; fetch the missing one, or "
            f"rename a single file to {WEIGHTS}"
        )
    return UserError(
        f"{directory} holds no weights ({WEIGHTS}, or {INDEX} with its shards); give the directory that save_pretrained wrote"
    )


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def write(directory: Path | str, tensors: Iterable[TensorSource], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Path]:
    """Writes tensors as `model.safetensors`, or as shards and their index, the way `transformers` names and fills them.

    Each array is asked for when its turn comes and dropped once written, so that no more than one is held. The directory
    is the caller's to put in place; what a write that stopped half-way leaves in it, `open` refuses.

    Args:
        directory: exists.
        tensors: names, shapes, dtypes (float32, float16 or bfloat16) and what makes each array. Taken in order, a shard
            after another; within a shard wider dtypes come first, which keeps every tensor aligned.
        max_shard_bytes: bytes of tensors in a file, at most; a tensor above it has a file of its own.

    Returns:
        What was written, the index last.

    Raises:
        ValueError: a name comes twice, a dtype is none of the three, or an array is not what was announced.
        StorageError: the disk is full, or fails.
    """
    directory = Path(directory)
    shards = _shards(list(tensors), max_shard_bytes)
    if len(shards) == 1:
        paths = [directory / WEIGHTS]
    else:
        paths = [directory / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    try:
        for path, shard in zip(paths, shards, strict=True):
            _write_file(path, shard)
        if len(shards) > 1:
            _write_index(directory / INDEX, dict(zip((p.name for p in paths), shards, strict=True)))
            paths.append(directory / INDEX)
        sync_directory(directory)
    except OSError as error:
        out = "free some space, or write to another disk" if is_full(error) else "check that disk"
        raise StorageError(f"writing weights to {directory} failed: {sentence(error)}; {out}") from error
    return paths


def _bytes(tensor: TensorSource) -> int:
    _, shape, dtype, _ = tensor
    count = 1
    for size in shape:
        count *= int(size)
    return count * np.dtype(dtype).itemsize


def _shards(tensors: list[TensorSource], max_bytes: int) -> list[list[TensorSource]]:
    shards: list[list[TensorSource]] = [[]]
    seen: set[str] = set()
    room = max_bytes
    for tensor in tensors:
        name, _, dtype, _ = tensor
        if name in seen or name == "__metadata__":
            raise ValueError(f'tensor name "{name}" comes twice, or is reserved')
        if np.dtype(dtype) not in _CODES:
            raise ValueError(f'tensor "{name}" has dtype {np.dtype(dtype)}; written are {", ".join(_DTYPES)}')
        seen.add(name)
        size = _bytes(tensor)
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _write_index(path: Path, shards: dict[str, list[TensorSource]]) -> None:
    every = [tensor for shard in shards.values() for tensor in shard]
    index = {
        "metadata": {
            "total_parameters": sum(_bytes(t) // np.dtype(t[2]).itemsize for t in every),
            "total_size": sum(_bytes(t) for t in every),
        },
        "weight_map": {tensor[0]: file for file, shard in shards.items() for tensor in shard},
    }
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write_file(path: Path, tensors: list[TensorSource]) -> None:
    tensors = sorted(tensors, key=lambda t: -np.dtype(t[2]).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        name, shape, dtype, _ = tensor
        start, end = end, end + _bytes(tensor)
        header[name] = {
            "dtype": _CODES[np.dtype(dtype)],
            "shape": [int(n) for n in shape],
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, dtype, make in tensors:
            array = make()
            if array.shape != tuple(shape) or array.dtype != np.dtype(dtype):
                raise ValueError(
                    f'tensor "{name}" came as {array.dtype}{list(array.shape)}, announced as {np.dtype(dtype)}{list(shape)}'
                )
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            file.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
            del array, little  # before the next one is made
        file.flush()
        os.fsync(file.fileno())
