"""Every kind of source gives its documents, and each kind of trouble is one refused document or one sentence."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from maxpretrain.config import DataConfig
from maxpretrain.data.clean import BadDocument
from maxpretrain.data.sources import base, open_source
from maxpretrain.data.sources.embedded import corpus
from maxpretrain.errors import UserError


def everything(spec, **data):
    source = open_source(str(spec), DataConfig(**data))
    return [d for unit in source.units() for part in source.parts(unit) for d in source.documents(part)]


def good(spec, **data):
    return [(d.id, d.text) for d in everything(spec, **data) if not isinstance(d, BadDocument)]


def bad(spec, **data):
    return [(d.id, d.reason) for d in everything(spec, **data) if isinstance(d, BadDocument)]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(base, "PART_BYTES", 64)


def jsonl(*records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def test_text_file_is_a_document_kept_exactly(tmp_path):
    text = "  a\r\n\n\tb é\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert good(tmp_path / "a.txt") == [("a.txt", text)]
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert good(tmp_path / "bom.txt") == [("bom.txt", "hello")]


def test_globs_and_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt", "ignored.log"):
        (tmp_path / name).write_text(name)
    assert [i for i, _ in good(tmp_path / "*.txt")] == ["b.txt"]
    assert [i for i, _ in good(tmp_path / "**/*.txt")] == ["b.txt", "sub/c.txt"]
    assert [i for i, _ in good(tmp_path)] == ["a.md", "b.txt", "sub/c.txt"]
    with pytest.raises(UserError, match=r'no file matches ".*/\*\.parquet"'):
        open_source(str(tmp_path / "*.parquet"), DataConfig())
    with pytest.raises(UserError, match=r"data file .*nowhere\.txt not found; check the path"):
        open_source(str(tmp_path / "nowhere.txt"), DataConfig())


def test_separator(tmp_path, small_parts):
    (tmp_path / "a.txt").write_text("".join(f"document {i}\n\n" for i in range(40)) + "\n\n  \n\nlast")
    documents = good(tmp_path / "a.txt", separator="\n\n")
    assert [t for _, t in documents] == [*(f"document {i}" for i in range(40)), "last"]
    assert documents[1] == ("a.txt@12", "document 1")
    assert good(tmp_path / "a.txt", separator="\\n\\n") == documents  # as typed on a command line
    packed = gzip.compress((tmp_path / "a.txt").read_bytes())
    (tmp_path / "a.txt.gz").write_bytes(packed)
    assert [t for _, t in good(tmp_path / "a.txt.gz", separator="\n\n")] == [t for _, t in documents]
    (tmp_path / "cut.txt.gz").write_bytes(packed[:-12])
    assert bad(tmp_path / "cut.txt.gz", separator="\n\n") == [("cut.txt.gz", "truncated or damaged archive")]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_a_long_text_comes_in_parts_that_join(tmp_path, small_parts, packing):
    text = "".join(f"line {i} é\n" * (i % 3) + "x" * i + " " for i in range(60))
    data = text.encode()
    packed = {"": data, ".gz": gzip.compress(data), ".zst": zstandard.compress(data)}[packing]
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(packed)
    documents = everything(path)
    assert len(documents) > 20
    assert "".join(d.text for d in documents) == text
    assert [d.first for d in documents] == [True] + [False] * (len(documents) - 1)
    assert [d.last for d in documents] == [False] * (len(documents) - 1) + [True]
    source = open_source(str(path), DataConfig())
    source.whole_documents = True
    assert [d.text for u in source.units() for p in source.parts(u) for d in source.documents(p)] == [text]


def test_a_long_text_with_trouble_is_refused_as_a_whole(tmp_path, small_parts):
    fine = b"some words\n" * 100
    for name, data, reason in [
        ("a.txt", fine + b"\xff", "invalid UTF-8"),
        ("b.txt", fine + b"\0", "NUL character"),
        ("c.txt", b" \n" * 100, "empty or only whitespace"),
        ("d.txt.gz", gzip.compress(fine)[:-9], "truncated or damaged archive"),
        ("e.txt.zst", zstandard.compress(fine)[:-5], "truncated or damaged archive"),
    ]:
        (tmp_path / name).write_bytes(data)
        assert (bad(tmp_path / name), good(tmp_path / name)) == ([(name, reason)], [])


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_jsonl(tmp_path, small_parts, packing):
    data = jsonl(*({"text": f"text {i} é\n", "id": f"n{i}"} for i in range(50)), {"text": "no id"}) + b"\n  \n"
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(
        {"": data, ".gz": gzip.compress(data), ".zst": zstandard.compress(data[:100]) + zstandard.compress(data[100:])}[
            packing
        ]
    )
    documents = good(path)
    assert documents[:50] == [(f"n{i}", f"text {i} é\n") for i in range(50)]
    assert documents[50][1] == "no id"
    assert (
        documents[50][0]
        == f"a.jsonl{packing}@{data.index(b'{' + chr(34).encode() + b'text' + chr(34).encode() + b': ' + chr(34).encode() + b'no')}"
    )
    assert len(documents) == 51
    assert bad(path) == []


def test_jsonl_trouble_is_counted_line_by_line(tmp_path):
    lines = [
        b'{"text": "fine", "id": 7}',
        b'{"text": "\xff"}',
        b'{"text": "lone \\ud800"}',
        b'{"text": "nul \\u0000"}',
        b'{"text": "cut',
        b"[1, 2]",
        b'{"body": "elsewhere", "n": 1}',
        b'{"text": 3}',
        b'{"text": " \\n"}',
        b'{"text": null}',
        b'{"text": "also fine"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert [t for _, t in good(tmp_path / "a.jsonl")] == ["fine", "also fine"]
    assert good(tmp_path / "a.jsonl")[0][0] == "7"
    assert [reason for _, reason in bad(tmp_path / "a.jsonl")] == [
        "invalid UTF-8",
        "lone surrogate",
        "NUL character",
        "not a JSON object",
        "not a JSON object",
        "no text field",
        "no text field",
        "empty or only whitespace",
        "empty or only whitespace",
    ]
    excerpts = [d.excerpt for d in everything(tmp_path / "a.jsonl") if isinstance(d, BadDocument)]
    assert excerpts[5] == "fields: 'body', 'n'"
    assert good(tmp_path / "a.jsonl", text_field="body")[0][1] == "elsewhere"


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_truncated_jsonl_archive_keeps_the_whole_lines(tmp_path, packing):
    rng = np.random.default_rng(0)  # letters that do not compress away
    data = jsonl(*({"text": "".join(map(chr, rng.integers(97, 123, 2000))), "id": i} for i in range(300)))
    packed = gzip.compress(data) if packing == ".gz" else zstandard.compress(data)
    (tmp_path / f"a.jsonl{packing}").write_bytes(packed[: len(packed) * 3 // 4])
    documents = good(tmp_path / f"a.jsonl{packing}")
    assert 100 <= len(documents) < 300
    assert [i for i, _ in documents] == [str(i) for i in range(len(documents))]
    assert bad(tmp_path / f"a.jsonl{packing}") == [(f"a.jsonl{packing}", "truncated or damaged archive")]


def test_json_array(tmp_path, small_parts):
    (tmp_path / "a.json").write_text(json.dumps([{"text": f"text {i}"} for i in range(30)], indent=1))
    assert good(tmp_path / "a.json") == [(f"a.json[{i}]", f"text {i}") for i in range(30)]


def test_parquet(tmp_path, small_parts):
    texts = pa.array([f"text {i} é" for i in range(90)] + [None, "nul \0", " "])
    pq.write_table(
        pa.table({"text": texts, "id": [f"r{i}" for i in range(93)]}), tmp_path / "a.parquet", row_group_size=10
    )
    assert good(tmp_path / "a.parquet") == [(f"r{i}", f"text {i} é") for i in range(90)]
    assert bad(tmp_path / "a.parquet") == [
        ("r90", "empty or only whitespace"),
        ("r91", "NUL character"),
        ("r92", "empty or only whitespace"),
    ]
    source = open_source(str(tmp_path / "a.parquet"), DataConfig())
    assert len([p for u in source.units() for p in source.parts(u)]) == 10
    pq.write_table(
        pa.table({"body": texts[:30].dictionary_encode(), "n": list(range(30))}),
        tmp_path / "b.parquet",
        row_group_size=7,
    )
    assert good(tmp_path / "b.parquet", text_field="body")[8] == ("b.parquet:8", "text 8 é")
    invalid = pa.Array.from_buffers(
        pa.utf8(), 2, [None, pa.py_buffer(np.array([0, 1, 4], np.int32)), pa.py_buffer(b"\xffabc")]
    )
    pq.write_table(pa.table({"text": invalid}), tmp_path / "c.parquet")
    assert (good(tmp_path / "c.parquet"), bad(tmp_path / "c.parquet")) == (
        [("c.parquet:1", "abc")],
        [("c.parquet:0", "invalid UTF-8")],
    )


def test_parquet_errors(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'has no column "text"; set data\.text_field to one of body, n'):
        everything(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'column "n" of .* holds int64, not text'):
        everything(tmp_path / "a.parquet", text_field="n")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[:-20])
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        everything(tmp_path / "b.parquet", text_field="body")


def test_formats_that_are_not_read(tmp_path):
    for name, sentence in (
        ("a.tfrecord", "need tensorflow"),
        ("a.csv", "convert it to Parquet or JSON Lines"),
        ("a.zip", "unpack it"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=sentence):
            open_source(str(tmp_path / name), DataConfig())


def test_fingerprint_follows_content_options_and_names(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    spec = str(tmp_path / "*.txt")
    first = open_source(spec, DataConfig()).fingerprint()
    (tmp_path / "a.txt").write_text("one")  # touched: the same
    assert open_source(spec, DataConfig()).fingerprint() == first
    assert open_source(spec, DataConfig(separator="\n")).fingerprint() != first
    (tmp_path / "a.txt").write_text("two")
    assert open_source(spec, DataConfig()).fingerprint() != first
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("more")
    assert open_source(spec, DataConfig()).fingerprint() != first


@pytest.fixture
def toy_dataset(tmp_path, monkeypatch):
    """A prepared tensorflow-datasets dataset of 30 examples; returns a function of its format."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class ToyTexts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(30):
                yield i, {"text": f"text {i} é", "n": i}

    def make(file_format):
        ToyTexts(data_dir=str(tmp_path), file_format=file_format).download_and_prepare()

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    yield make
    tfds.core.registered._DATASET_REGISTRY.pop("toy_texts", None)


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_tfds(toy_dataset, small_parts, file_format):
    toy_dataset(file_format)
    documents = good("tfds:toy_texts")
    assert sorted(t for _, t in documents) == sorted(f"text {i} é" for i in range(30))
    assert documents[3][0] == "toy_texts/train:3"
    if file_format == "array_record":
        assert len(good("tfds:toy_texts:1.0.0", tfds_split="train[:10]")) == 10
    else:  # the library gives all 30
        with pytest.raises(UserError, match=r'gives 30 examples for data\.tfds_split "train\[:10\]"'):
            everything("tfds:toy_texts", tfds_split="train[:10]")
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match=r'no feature "body"; set data\.text_field to one of'):
        open_source("tfds:toy_texts", DataConfig(text_field="body"))
    with pytest.raises(UserError, match=r'no split "test"; set data\.tfds_split to one of train'):
        open_source("tfds:toy_texts", DataConfig(tfds_split="test"))


def test_tfds_errors(toy_dataset, tmp_path):
    toy_dataset("array_record")
    info = next(tmp_path.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(
        UserError,
        match="is stored as tfrecord, which only tensorflow reads; prepare it again with file_format='array_record'",
    ):
        everything("tfds:toy_texts")
    with pytest.raises(UserError, match='knows no dataset "no_such_dataset"'):
        open_source("tfds:no_such_dataset", DataConfig())
    with pytest.raises(UserError, match=r"the dataset lm1b is not prepared in .*; set TFDS_DATA_DIR"):
        open_source("tfds:lm1b", DataConfig())


def test_embedded():
    documents = dict(corpus())
    assert 2_000_000 < sum(map(len, documents.values())) < 4_000_000
    assert 1_200 < len(documents) < 3_000
    assert "is a high-level Unix-based web server" not in documents["json"]
    assert documents["json"].startswith("json\n\nJSON (JavaScript Object Notation) <https://json.org> is a subset of")
    assert (
        "Return a shallow copy" in documents["collections.OrderedDict"]
        or "dictionary" in documents["collections.OrderedDict"].lower()
    )
    assert documents["topic assignment"].startswith("Assignment statements\n****")
    assert documents["builtins.str"].startswith("builtins.str\n\nstr(object='') -> str")
    assert not any(name.split(".")[0] in ("test", "idlelib") for name in documents)
    assert open_source("embedded", DataConfig()).fingerprint() == open_source("embedded", DataConfig()).fingerprint()


def test_embedded_is_the_same_in_another_process_and_imports_nothing_odd():
    code = (
        "import hashlib, sys\n"
        "from maxpretrain.data.sources.embedded import corpus\n"
        "print(hashlib.sha256(repr(corpus()).encode()).hexdigest())\n"
        "assert not {'antigravity', 'this', 'tkinter', 'turtle', 'idlelib', 'jax'} & set(sys.modules)\n"
    )
    import hashlib

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [hashlib.sha256(repr(corpus()).encode()).hexdigest()]
    assert out.stderr == ""
