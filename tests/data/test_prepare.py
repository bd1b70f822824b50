"""Preparation: splits, cache, workers, and every way in which documents or disks can be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from maxpretrain.config import DataConfig, ModelConfig, Run, TokenizerConfig
from maxpretrain.data import encode as encode_module
from maxpretrain.data import passes
from maxpretrain.data import prepare as prepare_module
from maxpretrain.data.clean import Document
from maxpretrain.data.encode import Route, encode_documents
from maxpretrain.data.prepare import cache_directory, prepare, prepare_source, texts
from maxpretrain.data.sources import base
from maxpretrain.data.tokenizer import Bytes, Characters, train_tokenizer
from maxpretrain.data.workers import Workers
from maxpretrain.errors import StorageError, UserError

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "was",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
]
CHARACTERS = TokenizerConfig(kind="characters")
BYTES = TokenizerConfig(kind="bytes")


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch):
    monkeypatch.delenv("MAXPRETRAIN_CACHE", raising=False)


@pytest.fixture
def make(tmp_path):
    """A run on sources in tmp_path, its cache there too."""

    def run(*train, tokenizer=BYTES, model=None, **data):
        sources = tuple(str(tmp_path / name) for name in train)
        data = {"train": sources, "cache": str(tmp_path / "cache"), **data}
        return Run(tokenizer=tokenizer, data=DataConfig(**data), model=model or ModelConfig())

    return run


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in documents))


def sentences(count, seed=0, words=30):
    rng = random.Random(seed)
    return [(f"d{i}", " ".join(rng.choices(WORDS, k=words)) + ".\n") for i in range(count)]


def folders(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".lock"))


def test_characters_split_at_the_tail(tmp_path, make):
    text = "".join(random.Random(0).choices("abcdé \n", k=1234))
    (tmp_path / "a.txt").write_text(text)
    prepared = prepare(make("a.txt", tokenizer=CHARACTERS, split="tail", validation_fraction=0.1))
    (train,), (validation,) = prepared.train, prepared.validation
    assert (train.num_tokens, validation.num_tokens, prepared.tokenizer.vocab_size) == (1110, 124, 7)
    assert prepared.tokenizer.decode(train.read(0, 1110)) == text[:1110]
    assert prepared.tokenizer.decode(validation.read(0, 124)) == text[1110:]
    assert (train.num_bytes, validation.num_bytes) == (len(text[:1110].encode()), len(text[1110:].encode()))
    assert (train.num_documents, validation.num_documents) == (1, 1)


def test_characters_of_the_validation_text_have_ids_too(tmp_path, make):
    (tmp_path / "a.txt").write_text("abcabc")
    (tmp_path / "v.txt").write_text("abz")
    prepared = prepare(make("a.txt", tokenizer=CHARACTERS, validation=(str(tmp_path / "v.txt"),)))
    assert prepared.tokenizer.characters == "abcz"
    assert prepared.validation[0].read(0, 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize("part_bytes", [64, 1 << 20])
@pytest.mark.parametrize("fraction", [0.07, 0.25, 0.5])
def test_tail_of_several_documents(tmp_path, make, monkeypatch, part_bytes, fraction):
    monkeypatch.setattr(base, "PART_BYTES", part_bytes)
    documents = sentences(40)
    write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "b.txt").write_text("".join(t for _, t in documents))  # one document in many parts
    tokenizer = TokenizerConfig(vocab_size=300, algorithm="bpe")
    prepared = prepare(make("a.jsonl", "b.txt", tokenizer=tokenizer, split="tail", validation_fraction=fraction))
    text = "".join(t for _, t in documents)
    cut = int(len(text) * (1 - fraction))
    for store, expected in zip(prepared.train + prepared.validation, [text[:cut]] * 2 + [text[cut:]] * 2, strict=True):
        ids = store.read(0, store.num_tokens)
        assert prepared.tokenizer.decode(ids) == expected
        assert (ids == prepared.tokenizer.eos_id).sum() == store.num_documents
        assert ids[store.offsets[1:] - 1].tolist() == [prepared.tokenizer.eos_id] * store.num_documents
        assert store.num_bytes == len(expected)
    assert [s.num_documents for s in (prepared.train[1], prepared.validation[1])] == [1, 1]


def test_the_cut_between_two_parts_ends_the_document():
    route = Route("tail", 0.5, 10)
    first, second = Document("a", "0123456789", first=True, last=False), Document("a", "rest", first=False, last=True)
    assert list(route.sides(first, 0)) == [(0, first)]
    assert list(route.sides(second, 10)) == [
        (0, Document("a", "", False, True)),
        (1, Document("a", "rest", True, True)),
    ]
    assert list(route.sides(second, 7)) == [(0, Document("a", "res", False, True)), (1, Document("a", "t", True, True))]
    assert list(route.sides(second, 20)) == [(1, second)]
    assert list(route.sides(Document("b", "new"), 10)) == [(1, Document("b", "new"))]


def test_split_by_document_follows_the_id_alone(tmp_path, make):
    write_jsonl(tmp_path / "a.jsonl", sentences(400))
    write_jsonl(tmp_path / "b.jsonl", sentences(500, seed=1))  # other texts, and more of them
    a = prepare(make("a.jsonl", validation_fraction=0.1))
    b = prepare(make("b.jsonl", validation_fraction=0.1))
    expected = [
        i for i in range(500) if int.from_bytes(hashlib.sha256(f"d{i}".encode()).digest()[:8], "big") < 0.1 * 2**64
    ]
    assert (a.validation[0].num_documents, b.validation[0].num_documents) == (34, 38)
    assert len(expected) == 38
    text = dict(sentences(400))
    assert bytes(a.validation[0].read(0, a.validation[0].num_tokens).tolist()).decode() == "".join(
        text[f"d{i}"] for i in expected if i < 400
    )
    assert a.train[0].num_documents == 366


def test_sources_keep_their_own_stores(tmp_path, make):
    write_jsonl(tmp_path / "a.jsonl", sentences(50))
    (tmp_path / "b.txt").write_text("one two three\n")
    write_jsonl(tmp_path / "v.jsonl", sentences(5, seed=2))
    prepared = prepare(make("a.jsonl", "b.txt", validation=(str(tmp_path / "v.jsonl"),)))
    assert [s.num_documents for s in prepared.train] == [50, 1]
    assert [s.num_documents for s in prepared.validation] == [5]
    assert prepared.train[1].num_tokens == 14


def test_every_number_of_workers_gives_the_same(tmp_path, make, monkeypatch):
    monkeypatch.setattr(base, "PART_BYTES", 4096)
    monkeypatch.setattr(passes, "SMALL_BYTES", 0)
    documents = [*sentences(300), ("empty", " ")]
    write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "b.txt").write_text("".join(t for _, t in documents[:-1]))
    found = []
    for workers in (1, 3):
        run = make(
            "a.jsonl", "b.txt", split="tail", workers=workers, max_bad=0.1, cache=str(tmp_path / f"cache{workers}")
        )
        run = run.replace(tokenizer=TokenizerConfig(vocab_size=300))
        prepared = prepare(run)
        found.append([s.fingerprint for s in prepared.train + prepared.validation])
        assert prepared.bad == {"empty or only whitespace": 1}
        assert json.loads((prepared.path / "quarantine.jsonl").read_text())["id"] == "empty"
    assert found[0] == found[1]


def test_little_text_starts_no_process(tmp_path, make, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", sentences(100))
    monkeypatch.setattr(passes, "Workers", None)
    assert prepare(make("a.jsonl", workers=4)).train[0].num_documents > 80


def test_again_is_instant(tmp_path, make, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", sentences(2000))
    run = make("a.jsonl", tokenizer=TokenizerConfig(vocab_size=300, algorithm="bpe"))
    first = prepare(run)
    monkeypatch.setattr(prepare_module, "Passes", None)
    started = time.perf_counter()
    again = prepare(run)
    assert time.perf_counter() - started < 0.3
    assert again.train[0].fingerprint == first.train[0].fingerprint
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert again.baselines == first.baselines
    assert len(folders(tmp_path)) == 1


def test_what_the_tokens_depend_on_makes_another_folder(tmp_path, make):
    write_jsonl(tmp_path / "a.jsonl", sentences(100))
    paths = {
        prepare(make("a.jsonl", **options)).path.name
        for options in (
            {},
            {"validation_fraction": 0.2},
            {"split": "tail"},
            {"tokenizer": CHARACTERS},
            {"shuffle": False},
            {"workers": 2},
        )
    }
    assert len(paths) == 4  # neither shuffling nor workers change tokens
    write_jsonl(tmp_path / "a.jsonl", sentences(101))
    assert prepare(make("a.jsonl")).path.name not in paths


def test_bad_documents_are_listed_and_left_out(tmp_path, make):
    lines = [json.dumps({"id": i, "text": t}).encode() for i, t in sentences(2999)]
    lines[5:5] = [b'{"id": "x", "text": "\\ud800"}']
    lines[9:9] = [b"nonsense", b'{"id": "z", "text": "nul \\u0000"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    prepared = prepare(make("a.jsonl"))  # 3 of 3002: within 0.1 %
    assert prepared.bad == {"lone surrogate": 1, "not a JSON object": 1, "NUL character": 1}
    listed = [json.loads(line) for line in (prepared.path / "quarantine.jsonl").read_text().splitlines()]
    assert [(d["id"].split("@")[0], d["reason"], d["kept"]) for d in listed] == [
        ("x", "lone surrogate", False),
        ("a.jsonl", "not a JSON object", False),
        ("z", "NUL character", False),
    ]
    assert prepared.train[0].num_documents + prepared.validation[0].num_documents == 2999


def test_too_many_bad_documents_end_the_preparation(tmp_path, make):
    lines = [json.dumps({"id": i, "text": t}).encode() for i, t in sentences(997)] + [b"x", b"y", b'{"text": "\xff"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError) as caught:
        prepare(make("a.jsonl"))
    message = str(caught.value)
    assert message.startswith(
        "3 of 1000 documents are unusable, more than the 0.100% that data.max_bad allows: not a JSON object (2), invalid UTF-8 (1); they are listed in "
    )
    (listed,) = folders(tmp_path)
    assert listed.startswith("quarantine-data-")
    assert listed in message
    assert len((tmp_path / "cache" / listed).read_text().splitlines()) == 3
    prepared = prepare(make("a.jsonl", max_bad=0.01))
    assert sum(prepared.bad.values()) == 3
    with pytest.raises(UserError, match=r"3 of 1000 documents are unusable"):  # found done, and still too many
        prepare(make("a.jsonl"))


def test_a_flood_of_bad_documents_ends_it_early(tmp_path, make, monkeypatch):
    monkeypatch.setattr(passes, "_EARLY", 100)
    monkeypatch.setattr(base, "PART_BYTES", 256)
    (tmp_path / "a.jsonl").write_bytes(b"nonsense\n" * 1000 + b'{"text": "fine"}\n')
    with pytest.raises(UserError, match=r"1[0-9][0-9] of 1[0-9][0-9] documents are unusable"):
        prepare(make("a.jsonl"))


def test_a_giant_document_is_kept_and_noted(tmp_path, make, monkeypatch):
    monkeypatch.setattr(encode_module, "GIANT_BYTES", 4000)
    monkeypatch.setattr(encode_module, "_CHUNK", 500)
    text = "".join(t for _, t in sentences(100)) + "x" * 2000
    write_jsonl(tmp_path / "a.jsonl", [*sentences(100), ("giant", text)])
    prepared = prepare(make("a.jsonl", tokenizer=TokenizerConfig(vocab_size=300, algorithm="bpe"), split="tail"))
    listed = json.loads((prepared.path / "quarantine.jsonl").read_text())
    assert (listed["id"], listed["kept"]) == ("giant", True)
    assert prepared.bad == {}
    both = [prepared.tokenizer.decode(s.read(0, s.num_tokens)) for s in prepared.train + prepared.validation]
    assert "".join(both).endswith(text)
    assert prepared.train[0].num_documents == 101


def test_a_tokenizer_that_cannot_join_gets_whole_documents(tmp_path):
    class Prefixing(Bytes):
        joins = False

        def _encode_plain(self, text):
            return super()._encode_plain(" " + text)

    document = Document("a", "line\n" * 300_000)
    assert len(encode_documents([document], Prefixing()).ids) == 1_500_001


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
@pytest.mark.parametrize("tokenizer", [BYTES, CHARACTERS, TokenizerConfig()])
def test_empty_corpus(tmp_path, make, content, tokenizer):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r'a\.txt" holds no usable text'):
        prepare(make("a.txt", tokenizer=tokenizer))
    assert folders(tmp_path) == []


def test_wrong_text_field_is_told_with_the_fields(tmp_path, make):
    (tmp_path / "a.jsonl").write_text('{"body": "hello"}\n' * 10)
    with pytest.raises(
        UserError, match=r"holds no usable text \(no text field \(10\)\); first a\.jsonl@0: fields: 'body'"
    ):
        prepare(make("a.jsonl"))


def test_empty_validation_split(tmp_path, make):
    (tmp_path / "a.txt").write_text("one document only\n")
    with pytest.raises(
        UserError, match=r'the validation split is empty: .* of 1 documents is none; use data\.split "tail"'
    ):
        prepare(make("a.txt"))
    (tmp_path / "v.txt").write_text(" ")
    with pytest.raises(UserError, match=r'v\.txt" holds no usable text'):
        prepare(make("a.txt", validation=(str(tmp_path / "v.txt"),)))
    assert folders(tmp_path) == []


def test_everything_in_validation(tmp_path, make):
    write_jsonl(tmp_path / "a.jsonl", sentences(3))
    with pytest.raises(UserError, match="is left for training: all of it went to validation"):
        prepare(make("a.jsonl", validation_fraction=0.9999))


def test_vocabulary_larger_than_the_corpus_allows_leaves_nothing(tmp_path, make):
    write_jsonl(tmp_path / "a.jsonl", sentences(50))
    with pytest.raises(
        UserError,
        match=r"tokenizer\.vocab_size 4096 is more than the corpus allows; use at most \d+, or give more text",
    ):
        prepare(make("a.jsonl", tokenizer=TokenizerConfig()))
    assert folders(tmp_path) == []


def test_model_vocabulary_smaller_than_the_tokenizers(tmp_path, make):
    write_jsonl(tmp_path / "a.jsonl", sentences(100))
    with pytest.raises(UserError, match=r"model\.vocab_size 255 is smaller than the tokenizer's 256"):
        prepare(make("a.jsonl", model=ModelConfig(vocab_size=255)))
    prepare(make("a.jsonl", model=ModelConfig(vocab_size=256)))
    with pytest.raises(UserError, match=r"model\.vocab_size 255"):
        prepare(make("a.jsonl", model=ModelConfig(vocab_size=255)))


def test_a_loaded_tokenizer(tmp_path, make):
    write_jsonl(tmp_path / "a.jsonl", sentences(100))
    train_tokenizer(TokenizerConfig(vocab_size=300, algorithm="bpe"), [t for _, t in sentences(100)]).save(
        tmp_path / "t"
    )
    prepared = prepare(make("a.jsonl", tokenizer=TokenizerConfig(path=str(tmp_path / "t"))))
    assert prepared.tokenizer.vocab_size == 300
    with pytest.raises(UserError, match=r'is a sentencepiece tokenizer, but tokenizer\.kind is "bytes"'):
        prepare(make("a.jsonl", tokenizer=TokenizerConfig(kind="bytes", path=str(tmp_path / "t"))))
    with pytest.raises(UserError, match=r"nowhere not found; check tokenizer\.path"):
        prepare(make("a.jsonl", tokenizer=TokenizerConfig(path=str(tmp_path / "nowhere"))))


def test_damaged_cache_is_refused(tmp_path, make):
    write_jsonl(tmp_path / "a.jsonl", sentences(100))
    prepared = prepare(make("a.jsonl"))
    shard = prepared.train[0].path / "shard-00000.bin"
    os.truncate(shard, shard.stat().st_size - 2)
    with pytest.raises(UserError, match=r"is damaged: .*delete that folder and run again"):
        prepare(make("a.jsonl"))
    (prepared.path / "complete.json").write_text("{")
    with pytest.raises(UserError, match=r"complete\.json is not what was written; delete that folder and run again"):
        prepare(make("a.jsonl"))


def test_no_permission_and_full_disk(tmp_path, make, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", sentences(100))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        prepare(make("a.jsonl", cache=str(tmp_path / "file" / "cache")))
    original = Path.mkdir

    def refuse(error):
        def mkdir(self, *args, **kwargs):
            if "cache" in self.name:
                raise error
            return original(self, *args, **kwargs)

        return mkdir

    monkeypatch.setattr(Path, "mkdir", refuse(PermissionError(13, "Permission denied", "/x/cache")))
    with pytest.raises(
        UserError, match=r"no permission to write /x/cache while preparing data in .*; set MAXPRETRAIN_CACHE"
    ):
        prepare(make("a.jsonl"))
    monkeypatch.setattr(Path, "mkdir", refuse(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="the disk is full while preparing data"):
        prepare(make("a.jsonl"))


def test_cache_directory(tmp_path, monkeypatch):
    assert cache_directory(DataConfig(cache="~/x")) == Path.home() / "x"
    monkeypatch.setenv("MAXPRETRAIN_CACHE", str(tmp_path))
    assert cache_directory(DataConfig(cache="~/x")) == tmp_path


def test_a_source_that_changes_meanwhile(tmp_path, make):
    write_jsonl(tmp_path / "a.jsonl", sentences(100))

    def meddle(*_):
        with open(tmp_path / "a.jsonl", "a") as file:
            file.write('{"text": "more"}\n')

    with pytest.raises(UserError, match=r'a\.jsonl" changed while it was being prepared'):
        prepare(make("a.jsonl"), progress=meddle)
    assert folders(tmp_path) == []


def test_progress_and_reports(tmp_path, make):
    write_jsonl(tmp_path / "a.jsonl", sentences(200))
    said, shown = [], []
    prepare(
        make("a.jsonl", tokenizer=TokenizerConfig(vocab_size=300, algorithm="bpe")),
        said.append,
        lambda *a: shown.append(a),
    )
    size = (tmp_path / "a.jsonl").stat().st_size
    assert said == ["training a bpe tokenizer of 300 pieces"]
    assert shown[-1] == ("tokenizing", size, size)


CHILD = """
import os, sys
from maxpretrain.config import DataConfig, Run, TokenizerConfig
from maxpretrain.data.prepare import prepare
run = Run(tokenizer=TokenizerConfig(kind="bytes"), data=DataConfig(train=(sys.argv[1],), cache=sys.argv[2]))
prepare(run, progress=lambda *a: os.kill(os.getpid(), 9))
"""


def test_killed_in_the_middle_leaves_nothing_that_counts(tmp_path, make):
    write_jsonl(tmp_path / "a.jsonl", sentences(100))
    write_jsonl(tmp_path / "b.jsonl", sentences(100, seed=1))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "a.jsonl"), str(tmp_path / "cache")], check=False
    )
    assert done.returncode == -signal.SIGKILL
    (partial,) = folders(tmp_path)
    assert partial.startswith(".partial-data-")
    prepare(make("b.jsonl"))  # other data: clears up what nobody works on any more
    assert len(folders(tmp_path)) == 1
    assert prepare(make("a.jsonl")).train[0].num_documents > 80


def test_two_at_once_prepare_once(tmp_path, make, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", sentences(200))
    made, said = [], []
    original = prepare_module._make

    def slow(*args):
        made.append(1)
        time.sleep(0.3)
        return original(*args)

    monkeypatch.setattr(prepare_module, "_make", slow)
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(lambda _: prepare(make("a.jsonl"), said.append), range(2))
    assert a.train[0].fingerprint == b.train[0].fingerprint
    assert made == [1]
    assert said == ["another process is preparing the same data; waiting for it"]


def test_prepare_source(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(20))
    data = DataConfig(cache=str(tmp_path / "cache"))
    store = prepare_source(str(tmp_path / "a.jsonl"), Bytes(), data)
    assert store.num_documents == 20
    assert bytes(store.read(0, store.num_tokens).tolist()).decode() == "".join(t for _, t in sentences(20))
    assert prepare_source(str(tmp_path / "a.jsonl"), Bytes(), data).path == store.path
    assert prepare_source(str(tmp_path / "a.jsonl"), Bytes(("</s>",)), data).num_tokens == store.num_tokens + 20
    with pytest.raises(UserError, match=r'in document "d0", the character .* is not among the 2 characters'):
        prepare_source(str(tmp_path / "a.jsonl"), Characters("ab"), data)
    with pytest.raises(UserError, match="not found"):
        prepare_source(str(tmp_path / "nowhere.txt"), Bytes(), data)
    assert "".join(texts(str(tmp_path / "a.jsonl"), data)) == "".join(t for _, t in sentences(20))


def test_the_sample_for_a_tokenizer_is_spread_and_of_training_text_alone(tmp_path, make, monkeypatch):
    monkeypatch.setattr(base, "PART_BYTES", 2000)
    write_jsonl(tmp_path / "a.jsonl", sentences(1000))
    run = make("a.jsonl", validation_fraction=0.3)
    from maxpretrain.data.sources import open_source

    source = open_source(run.data.train[0], run.data)
    whole = list(passes.Passes([source], [], run.data).sample(10**9))
    assert len(whole) == 1000 - sum(
        int.from_bytes(hashlib.sha256(f"d{i}".encode()).digest()[:8], "big") < 0.3 * 2**64 for i in range(1000)
    )
    some = list(passes.Passes([source], [], run.data).sample(source.size // 5))
    assert 100 < len(some) < 250
    at = [whole.index(t) for t in some]
    assert min(at) < 50
    assert max(at) > len(whole) - 200


def test_embedded_corpus_end_to_end(tmp_path):
    run = Run(tokenizer=TokenizerConfig(algorithm="bpe"), data=DataConfig(cache=str(tmp_path)))
    prepared = prepare(run)
    (train,), (validation,) = prepared.train, prepared.validation
    assert prepared.tokenizer.vocab_size == 4096
    assert 0.03 < validation.num_bytes / (train.num_bytes + validation.num_bytes) < 0.08
    assert 3.0 < train.num_bytes / train.num_tokens < 4.5
    assert 2.4 < prepared.baselines["unigram_bits_per_byte"] < 3.2
    assert 1.6 < prepared.baselines["bigram_bits_per_byte"] < 2.3
    assert prepared.bad == {}


def test_workers_answer_in_order_and_raise_what_was_raised():
    with Workers(eval, 3) as workers:
        assert list(workers.map(f"__import__('time').sleep({(7 * i) % 5 / 100}) or {i}" for i in range(20))) == list(
            range(20)
        )
        assert (
            len(set(workers.map("__import__('time').sleep(0.05) or __import__('os').getpid()" for _ in range(9)))) == 3
        )
        assert list(workers.map(["print('to the terminal')"])) == [None]
        with pytest.raises(ZeroDivisionError):
            list(workers.map(["1/0"]))
        assert list(workers.map(["2"])) == [2]
        with pytest.raises(UserError, match=r"a worker of the preparation was ended \(status -9\)"):
            list(workers.map(["__import__('os').kill(__import__('os').getpid(), 9)"]))


ORPHANS = """
from maxpretrain.data.workers import Workers
with Workers(eval, 2) as workers:
    for pid in workers.map(["__import__('os').getpid()", "__import__('time').sleep(0.1) or __import__('os').getpid()"]):
        print(pid, flush=True)
    print("ready", flush=True)
    list(workers.map(["__import__('time').sleep(60)"] * 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_workers_die_with_their_parent():
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True) as parent:
        lines = [parent.stdout.readline().strip() for _ in range(3)]
        assert lines[2] == "ready"
        parent.kill()
    deadline = time.monotonic() + 10
    while any(_alive(int(pid)) for pid in lines[:2]):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
