"""The token store survives a round trip and refuses what it must."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest

from maxpretrain.data.store import Store, StoreWriter, dtype_for
from maxpretrain.errors import StorageError, UserError

TOKENIZER = "ab" * 32


def write(path, *, documents=None, vocab_size=100, shard_tokens=8):
    """Documents [0..4], [5..9], [10..19]: 20 tokens in shards of 8, 8 and 4."""
    if documents is None:
        documents = [np.arange(5), np.arange(5, 10), np.arange(10, 20)]
    with StoreWriter(path, vocab_size=vocab_size, tokenizer_fingerprint=TOKENIZER, shard_tokens=shard_tokens) as writer:
        for i, ids in enumerate(documents):
            writer.add(ids, 100 * (i + 1))
    return Store.open(path)


def test_round_trip(tmp_path):
    store = write(tmp_path / "s")
    assert (store.num_tokens, store.num_documents, store.num_bytes, store.max_id) == (20, 3, 600, 19)
    assert store.dtype == np.uint16
    assert store.offsets.tolist() == [0, 5, 10, 20]
    assert store.byte_offsets.tolist() == [0, 100, 300, 600]
    assert [os.path.getsize(store.path / f"shard-{i:05d}.bin") for i in range(3)] == [16, 16, 8]
    assert store.read(0, 20).tolist() == list(range(20))
    assert store.read(6, 11).tolist() == list(range(6, 17))  # crosses both seams
    assert store.read(20, 0).tolist() == []
    assert store.read(3, 4).dtype == np.int32
    store.verify(full=True)


def test_gather_equals_read(tmp_path):
    store = write(tmp_path / "s")
    starts = np.array([0, 5, 7, 8, 15, 1])
    assert store.gather(starts, 5).tolist() == [store.read(s, 5).tolist() for s in starts]
    assert store.gather(starts[:2], 10).tolist() == [list(range(10)), list(range(5, 15))]  # longer than a shard
    assert store.gather(np.zeros(0, np.int64), 5).shape == (0, 5)
    for bad in ([-1], [16]):
        with pytest.raises(IndexError):
            store.gather(np.array(bad), 5)
    with pytest.raises(IndexError):
        store.read(16, 5)


def test_segments_count_from_the_window(tmp_path):
    store = write(tmp_path / "s", documents=[np.arange(5), np.arange(0), np.arange(5), np.arange(10)])
    assert store.segments(0, 8).tolist() == [1, 1, 1, 1, 1, 2, 2, 2]  # the document without tokens takes no number
    assert store.segments(4, 8).tolist() == [1, 2, 2, 2, 2, 2, 3, 3]
    assert store.segments(5, 3).tolist() == [1, 1, 1]
    assert store.segments(12, 8).tolist() == [1] * 8


def test_dtype_follows_the_vocabulary(tmp_path):
    assert dtype_for(65536) == np.uint16
    assert dtype_for(65537) == np.uint32
    store = write(tmp_path / "s", documents=[np.array([70000, 1])], vocab_size=70001)
    assert store.dtype == np.uint32
    assert store.read(0, 2).tolist() == [70000, 1]


def test_id_outside_the_vocabulary_is_refused_when_written(tmp_path):
    for bad in (100, -1, 70000):
        with (
            pytest.raises(UserError, match=f"id {bad}, outside its vocabulary of 100"),
            StoreWriter(tmp_path / "s", vocab_size=100, tokenizer_fingerprint=TOKENIZER) as writer,
        ):
            writer.add(np.array([1, bad]), 2)
    with pytest.raises(UserError, match="holds no token store"):
        Store.open(tmp_path / "s")


def test_pickles(tmp_path):
    store = write(tmp_path / "s")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.read(6, 11).tolist() == list(range(6, 17))
    assert len(pickle.dumps(store)) < 1000


def test_fingerprint_follows_content(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    c = write(tmp_path / "c", documents=[np.arange(5), np.arange(5, 10), np.arange(10, 19)])
    d = write(tmp_path / "d", documents=[np.arange(10), np.arange(10, 20)])
    assert a.fingerprint == b.fingerprint
    assert len({a.fingerprint, c.fingerprint, d.fingerprint}) == 3


def test_truncated_shard(tmp_path):
    path = write(tmp_path / "s").path
    os.truncate(path / "shard-00001.bin", 14)
    with pytest.raises(UserError, match=r"shard-00001\.bin has 14 bytes, not 16; delete that folder and run again"):
        Store.open(path)


def test_missing_shard(tmp_path):
    path = write(tmp_path / "s").path
    (path / "shard-00002.bin").unlink()
    with pytest.raises(UserError, match=r"shard-00002\.bin is missing"):
        Store.open(path)


def test_additional_shard(tmp_path):
    path = write(tmp_path / "s").path
    (path / "shard-00003.bin").write_bytes(b"\0" * 16)
    with pytest.raises(UserError, match="holds 4 shards where its manifest lists 3"):
        Store.open(path)


def test_swapped_shards(tmp_path):
    path = write(tmp_path / "s").path
    os.rename(path / "shard-00000.bin", path / "x")
    os.rename(path / "shard-00001.bin", path / "shard-00000.bin")
    os.rename(path / "x", path / "shard-00001.bin")
    with pytest.raises(UserError, match=r"shard-00000\.bin does not begin and end as it was written"):
        Store.open(path)


def test_flipped_bit_in_the_middle_is_found_by_the_full_check(tmp_path):
    store = write(tmp_path / "s", documents=[np.zeros(10_000, int)], shard_tokens=100_000)
    with open(store.path / "shard-00000.bin", "r+b") as file:
        file.seek(10_000)
        file.write(b"\x01")
    store.verify(full=False)
    with pytest.raises(UserError, match=r"shard-00000\.bin does not have the sha256"):
        store.verify(full=True)


def test_offsets_damaged(tmp_path):
    path = write(tmp_path / "s").path
    data = bytearray((path / "documents.bin").read_bytes())
    data[8] ^= 1
    (path / "documents.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"documents\.bin does not have the sha256"):
        Store.open(path)


def test_edited_manifest(tmp_path):
    path = write(tmp_path / "s").path
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"] = manifest["shards"][::-1]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json was changed after it was written"):
        Store.open(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        Store.open(path)
    (path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="does not describe a token store"):
        Store.open(path)


def test_another_tokenizer(tmp_path):
    path = write(tmp_path / "s").path
    Store.open(path, tokenizer_fingerprint=TOKENIZER)
    with pytest.raises(UserError, match=r"made with another tokenizer \(abababababab, not cdcdcdcdcdcd\)"):
        Store.open(path, tokenizer_fingerprint="cd" * 32)


def test_id_past_the_models_vocabulary(tmp_path):
    path = write(tmp_path / "s").path
    Store.open(path, vocab_size=20)
    with pytest.raises(
        UserError, match=r"holds id 19, but the vocabulary has 19; set model\.vocab_size to at least 20"
    ):
        Store.open(path, vocab_size=19)


def test_a_killed_writer_leaves_no_store_and_the_next_starts_clean(tmp_path):
    writer = StoreWriter(tmp_path / "s", vocab_size=100, tokenizer_fingerprint=TOKENIZER, shard_tokens=4)
    writer.add(np.arange(10), 10)  # two shards finished, one open, then the process is gone
    with pytest.raises(UserError, match="holds no token store"):
        Store.open(tmp_path / "s")
    store = write(tmp_path / "s")
    assert store.num_tokens == 20
    with pytest.raises(UserError, match="already holds a token store"):
        StoreWriter(tmp_path / "s", vocab_size=100, tokenizer_fingerprint=TOKENIZER)


def test_full_disk_and_no_permission_are_one_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    writer = StoreWriter(tmp_path / "s", vocab_size=100, tokenizer_fingerprint=TOKENIZER)
    monkeypatch.setattr("os.fsync", full)
    writer.add(np.arange(4), 4)
    with pytest.raises(StorageError, match="the disk is full while writing the token store"):
        writer.close()
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        StoreWriter(tmp_path / "file" / "s", vocab_size=100, tokenizer_fingerprint=TOKENIZER)


def test_empty_store(tmp_path):
    store = write(tmp_path / "s", documents=[])
    assert (store.num_tokens, store.num_documents, store.max_id) == (0, 0, -1)
    assert store.read(0, 0).tolist() == []
