"""Safetensors files: lazy reading, streamed writing that the library itself reads, and every kind of broken directory."""

from __future__ import annotations

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from maxpretrain.convert import tensors
from maxpretrain.convert.tensors import TensorFiles
from maxpretrain.errors import UserError

BF16 = ml_dtypes.bfloat16


def arrays():
    rng = np.random.default_rng(0)
    return {
        "scalar": np.array(1.5, np.float16),
        "model.embed.weight": rng.normal(size=(5, 4)).astype(BF16),
        "model.norm.weight": rng.normal(size=(3,)).astype(np.float32),
        "naïve": rng.normal(size=(2, 3, 1)).astype(np.float16),
        "empty": np.zeros((0, 7), np.float32),
        "transposed": rng.normal(size=(4, 6)).astype(np.float32).T,
    }


def sources(values):
    return [(name, a.shape, a.dtype, lambda a=a: a) for name, a in values.items()]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_the_library_reads_what_was_written(tmp_path):
    assert tensors.write(tmp_path, iter(sources(arrays()))) == [tmp_path / "model.safetensors"]
    loaded = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert sorted(loaded) == sorted(arrays())
    for name, value in arrays().items():
        assert same(loaded[name], value), name
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for name, value in arrays().items():
        assert header[name]["data_offsets"][0] % value.dtype.itemsize == 0


def test_we_read_what_the_library_wrote(tmp_path):
    safetensors.numpy.save_file({n: a.copy(order="C") for n, a in arrays().items()}, tmp_path / "model.safetensors")
    with TensorFiles.open(tmp_path) as files:
        assert files.names() == [
            "empty",
            "model.embed.weight",
            "model.norm.weight",
            "naïve",
            "scalar",
            "transposed",
        ]
        assert files.shape("model.embed.weight") == (5, 4)
        assert files.dtype("model.embed.weight") == BF16
        assert files.shape("scalar") == ()
        assert "scalar" in files
        assert "x" not in files
        for name, value in arrays().items():
            assert same(files.read(name), value), name
        with pytest.raises(
            UserError, match=r'there is no tensor "model\.norm\.weigth".*; did you mean "model\.norm\.wei'
        ):
            files.read("model.norm.weigth")


def sharded(directory):
    values = {f"layer.{i}.weight": np.full((10, 10), i, np.float32) for i in range(7)}  # 400 bytes each
    values["big"] = np.ones((50, 10), np.float32)
    values["last"] = np.ones((3,), BF16)
    return values, tensors.write(directory, sources(values), max_shard_bytes=1000)


def test_shards(tmp_path):
    values, paths = sharded(tmp_path)
    assert [p.name for p in paths] == [
        *(f"model-0000{i}-of-00006.safetensors" for i in range(1, 7)),
        "model.safetensors.index.json",
    ]
    index = json.loads(paths[-1].read_text())
    assert index["metadata"] == {"total_parameters": 1203, "total_size": 4806}
    assert index["weight_map"]["layer.1.weight"] == "model-00001-of-00006.safetensors"
    assert index["weight_map"]["layer.6.weight"] == "model-00004-of-00006.safetensors"
    assert index["weight_map"]["big"] == "model-00005-of-00006.safetensors"
    assert index["weight_map"]["last"] == "model-00006-of-00006.safetensors"
    for path in paths[:-1]:
        for name, array in safetensors.numpy.load_file(path).items():
            assert index["weight_map"][name] == path.name
            assert same(array, values[name])
    with TensorFiles.open(tmp_path) as files:
        assert files.names() == sorted(values)
        assert all(same(files.read(n), v) for n, v in values.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)


def test_no_more_than_one_tensor_is_held(tmp_path):
    size = 4 << 20
    many = [(f"t{i}", (size // 4,), np.float32, lambda i=i: np.full(size // 4, i, np.float32)) for i in range(12)]
    tracemalloc.start()
    tensors.write(tmp_path, iter(many), max_shard_bytes=3 * size)
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    with TensorFiles.open(tmp_path) as files:
        for name in files.names():
            assert files.read(name)[0] == int(name[1:])
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written < 1.5 * size
    assert read < 2.5 * size  # one being read while the last one is let go


def test_writing_what_was_not_announced(tmp_path):
    one = np.ones(3, np.float32)
    for bad, message in (
        ([("a", (3,), np.float32, lambda: one), ("a", (3,), np.float32, lambda: one)], "comes twice"),
        ([("a", (4,), np.float32, lambda: one)], r"came as float32\[3\], announced as float32\[4\]"),
        ([("a", (3,), BF16, lambda: one)], "came as float32"),
        ([("a", (3,), np.int32, lambda: one)], "has dtype int32; written are F32, F16, BF16"),
    ):
        with pytest.raises(ValueError, match=message):
            tensors.write(tmp_path, bad)


def refused(directory, message):
    with pytest.raises(UserError, match=message) as error:
        TensorFiles.open(directory)
    assert "\n" not in str(error.value)


def test_a_directory_without_weights(tmp_path):
    refused(tmp_path / "nowhere", "is not a directory")
    refused(tmp_path, "holds no weights")
    (tmp_path / "training_args.bin").touch()
    refused(tmp_path, "holds no weights")
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, r"only as pytorch_model\.bin, which is not read; .*save_pretrained\(safe_serialization=True\)")
    (tmp_path / "model.gguf").touch()
    refused(tmp_path, r"only as model\.gguf and 1 more")


def test_other_safetensors_files(tmp_path):
    (tmp_path / "consolidated.safetensors").touch()
    refused(tmp_path, r"has consolidated\.safetensors but neither")
    (tmp_path / "adapter_model.safetensors").touch()
    refused(tmp_path, "holds an adapter")


def test_truncated_and_garbled_files(tmp_path):
    tensors.write(tmp_path, sources(arrays()))
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:100], whole[:5], b"", b"\xff" * 200, whole + b"x"):
        path.write_bytes(data)
        refused(tmp_path, rf"model\.safetensors \({len(data)} bytes\) is truncated or no safetensors file")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    refused(tmp_path, "is a Git LFS pointer")


def test_broken_shards(tmp_path):
    _, paths = sharded(tmp_path)
    index = json.loads(paths[-1].read_text())
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[:-7])
    refused(tmp_path, r"model-00003-of-00006\.safetensors \(\d+ bytes\) is truncated")
    paths[2].unlink()
    refused(
        tmp_path, r"lacks model-00003-of-00006\.safetensors of the 6 files that model\.safetensors\.index\.json names"
    )
    paths[2].write_bytes(whole)
    for weight_map, message in (
        ({"ghost": paths[0].name}, 'says that tensor "ghost" is in .*model-00001-of-00006'),
        ({"big": paths[0].name}, 'says that tensor "big" is in .*model-00001-of-00006'),
        ({"x": "../model.safetensors"}, "not a file of its own folder"),
        ({"x": 3}, "is not the JSON of a sharded model"),
    ):
        paths[-1].write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **weight_map}}))
        refused(tmp_path, message)
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'):
        paths[-1].write_text(text)
        refused(tmp_path, "is not the JSON of a sharded model")


def test_a_tensor_in_two_shards(tmp_path):
    _, paths = sharded(tmp_path)
    (tmp_path / paths[1].name).write_bytes(paths[0].read_bytes())
    refused(tmp_path, r'tensor "layer\.0\.weight" is in both')


@pytest.mark.parametrize(
    ("code", "width"), [("F8_E4M3", 1), ("I64", 8), ("BOOL", 1), ("U8", 1), ("F64", 8)], ids=lambda v: str(v)
)
def test_a_dtype_that_is_not_read_is_named(tmp_path, code, width):
    header = json.dumps({"w": {"dtype": code, "shape": [2], "data_offsets": [0, 2 * width]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2 * width))
    with TensorFiles.open(tmp_path) as files:
        assert files.names() == ["w"]  # whoever knows that it is a buffer may pass it over
        assert files.shape("w") == (2,)
        for ask in (files.read, files.dtype):
            with pytest.raises(
                UserError, match=rf'tensor "w" in .*model\.safetensors has dtype {code}; read are F32, F16'
            ):
                ask("w")
