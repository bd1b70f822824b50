"""Batches: pure functions of the step, the same for any number of hosts, every window once an epoch."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from maxpretrain.data import pipeline as module
from maxpretrain.data.order import hash_words
from maxpretrain.data.pipeline import EvaluationBatches, Pipeline, segments_of
from maxpretrain.data.store import Store, StoreWriter
from maxpretrain.errors import UserError
from maxpretrain.objectives import CLM, Objective

PLAIN = CLM(mask_documents=False)


def make_store(path, lengths, first=0, bytes_per_token=1):
    """Ids first, first + 1, …, so that a token says where it stands."""
    lengths = np.asarray(lengths, np.int64)
    with StoreWriter(
        path, vocab_size=first + int(lengths.sum()) + 1, tokenizer_fingerprint="t", shard_tokens=97
    ) as writer:
        writer.add_many(first + np.arange(lengths.sum()), lengths, lengths * bytes_per_token)
    return Store.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("a") / "s", [7, 30, 1, 62, 101])  # 201 tokens: 25 windows of 8


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("b") / "s", [50, 54], first=1000)  # 104 tokens: 12 windows of 8


def build(stores, *, objective=PLAIN, weights=(), batch_size=5, length=8, seed=0, shuffle=True, rows=None):
    return Pipeline(
        stores, weights, objective, batch_size=batch_size, length=length, seed=seed, shuffle=shuffle, rows=rows
    )


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name])


def test_shapes_and_dtypes_are_the_declared_fields(store, second):
    for objective in (PLAIN, CLM()):
        batch = build([store, second], objective=objective).batch(0)
        fields = {name: ((5, *shape), dtype) for name, (shape, dtype) in objective.fields(8).items()}
        assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == fields


def test_without_shuffle_windows_follow_the_text_and_repeat(store):
    pipeline = build([store], shuffle=False)
    assert pipeline.windows_per_epoch == (25,)
    tokens = [pipeline.batch(step)["tokens"][:, 0].tolist() for step in range(6)]
    assert tokens[:2] == [[0, 8, 16, 24, 32], [40, 48, 56, 64, 72]]
    assert tokens[4] == [160, 168, 176, 184, 192]
    assert tokens[5] == tokens[0]
    assert pipeline.batch(0)["labels"][1].tolist() == [9, 10, 11, 12, 13, 14, 15, 16]


def test_every_window_once_an_epoch(store):
    pipeline = build([store])
    for epoch in range(4):
        where = [pipeline.where(step) for step in range(5 * epoch, 5 * epoch + 5)]
        assert np.concatenate([w.epoch for w in where]).tolist() == [epoch] * 25
        assert sorted(np.concatenate([w.window for w in where]).tolist()) == list(range(25))


def test_first_epoch_predicts_each_token_once(store):
    labels = np.concatenate([build([store]).batch(step)["labels"].ravel() for step in range(5)])
    assert sorted(labels.tolist()) == list(range(1, 201))


def test_later_epochs_have_another_order_and_other_cuts(store):
    pipeline = build([store])
    orders, phases = [], []
    for epoch in range(20):
        where = [pipeline.where(step) for step in range(5 * epoch, 5 * epoch + 5)]
        window, start = (np.concatenate([getattr(w, f) for w in where]) for f in ("window", "start"))
        orders.append(tuple(window.tolist()))
        phases.append(int(start[window == 12][0]) - 12 * 8)
        expected = np.clip(phases[-1] + 8 * np.arange(25), 0, 201 - 9)
        assert start[np.argsort(window)].tolist() == expected.tolist()
    assert len(set(orders)) == 20
    assert phases[0] == 0
    assert set(phases) <= set(range(-4, 4))
    assert len(set(phases)) >= 6


def test_an_epoch_can_end_inside_a_batch(store):
    by_four, by_five = build([store], batch_size=4), build([store], batch_size=5)
    assert by_four.where(6).epoch.tolist() == [0, 1, 1, 1]
    fours = np.concatenate([by_four.batch(step)["tokens"] for step in range(20)])
    fives = np.concatenate([by_five.batch(step)["tokens"] for step in range(16)])
    np.testing.assert_array_equal(fours, fives)  # and the batch size does not change the sequence of rows


def test_golden_order(store, second):
    """Pins the whole way from step to tokens; exact resume across versions rests on it."""
    assert build([store], seed=1).batch(0)["tokens"][:, 0].tolist() == [144, 0, 96, 56, 192]
    assert build([store], seed=1).batch(7)["tokens"][:, 0].tolist() == [172, 164, 52, 124, 116]
    both = build([store, second], weights=(1, 1), seed=1)
    assert both.batch(300)["tokens"][:, 0].tolist() == [12, 1011, 1019, 1067, 1075]


def test_seeds_differ(store):
    starts = [tuple(build([store], seed=seed).where(0).start.tolist()) for seed in range(8)]
    assert len(set(starts)) == 8


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_make_the_global_batch(store, second, hosts):
    whole = build([store, second], batch_size=8, objective=CLM())
    each = 8 // hosts
    parts = [
        build([store, second], batch_size=8, objective=CLM(), rows=range(h * each, h * each + each))
        for h in range(hosts)
    ]
    for step in (0, 1, 127, 128, 1000):  # 128 batches of 8 fill a block of the mixture
        batches = [part.batch(step) for part in parts]
        same({name: np.concatenate([b[name] for b in batches]) for name in batches[0]}, whole.batch(step))


def test_mixture_takes_each_source_in_turn_by_weight(store, second):
    pipeline = build([store, second], weights=(3, 1), batch_size=64)
    where = [pipeline.where(step) for step in range(16)]
    source, epoch = (np.concatenate([getattr(w, f) for w in where]) for f in ("source", "epoch"))
    assert np.bincount(source).tolist() == [768, 256]
    assert epoch[source == 0].tolist() == [k // 25 for k in range(768)]
    assert epoch[source == 1].tolist() == [k // 12 for k in range(256)]
    tokens = np.concatenate([pipeline.batch(step)["tokens"] for step in range(16)])
    assert ((tokens >= 1000).all(axis=1) == (source == 1)).all()
    assert ((tokens < 1000).all(axis=1) == (source == 0)).all()


def test_default_weights_are_the_windows(store, second):
    pipeline = build([store, second], batch_size=1024)
    assert pipeline.windows_per_epoch == (25, 12)
    assert np.bincount(pipeline.where(0).source).tolist() == [692, 332]  # 1024 · 25 / 37 = 691.9


def test_packed_documents(store):
    """Documents begin at tokens 0, 7, 37, 38 and 100."""
    batch = build([store], objective=CLM(), batch_size=25, shuffle=False).batch(0)
    assert {name: batch[name][0].tolist() for name in batch} == {
        "tokens": [0, 1, 2, 3, 4, 5, 6, 7],
        "labels": [1, 2, 3, 4, 5, 6, 0, 8],
        "weights": [1, 1, 1, 1, 1, 1, 0, 1],
        "segments": [1, 1, 1, 1, 1, 1, 1, 2],
        "positions": [0, 1, 2, 3, 4, 5, 6, 0],
    }
    assert batch["segments"][4].tolist() == [1, 1, 1, 1, 1, 2, 3, 3]
    assert batch["positions"][4].tolist() == [0, 1, 2, 3, 4, 0, 0, 1]
    assert batch["weights"][4].tolist() == [1, 1, 1, 1, 0, 0, 1, 1]
    assert batch["weights"].sum() == 200 - 4


def test_segments_of_equals_the_store(store, tmp_path):
    gaps = make_store(tmp_path / "gaps", [0, 3, 0, 0, 2, 1, 9, 0])  # documents without tokens
    for each, length in ((store, 40), (gaps, 1), (gaps, 6), (gaps, 15)):
        starts = np.arange(each.num_tokens - length + 1)
        expected = np.stack([each.segments(s, length) for s in starts.tolist()])
        np.testing.assert_array_equal(segments_of(each, starts, length), expected)


class Drawing(Objective):
    """Rows of random numbers beside their tokens."""

    def raw_length(self, length):
        return length

    def fields(self, length):
        return {"tokens": ((length,), "int32"), "drawn": ((2,), "int64")}

    def example(self, tokens, rng, segments=None):
        return {"tokens": tokens, "drawn": rng.integers(0, 2**62, 2)}


def test_generators_are_of_the_seed_source_epoch_and_window(store, second):
    pipeline = build([store, second], objective=Drawing(), batch_size=50)
    drawn, keys = {}, set()
    for step in range(4):
        where, batch = pipeline.where(step), pipeline.batch(step)
        for row in range(50):
            key = (int(where.source[row]), int(where.epoch[row]), int(where.window[row]))
            drawn[tuple(batch["drawn"][row].tolist())] = key
            keys.add(key)
    assert len(drawn) == len(keys) == 200
    again = build([store, second], objective=Drawing(), batch_size=10).batch(7)
    np.testing.assert_array_equal(again["drawn"], pipeline.batch(1)["drawn"][20:30])
    other = build([store, second], objective=Drawing(), batch_size=50, seed=1).batch(0)
    assert not np.isin(other["drawn"], pipeline.batch(0)["drawn"]).any()


def test_a_subclass_that_replaces_example_is_heard(store):
    class Backwards(CLM):
        def example(self, tokens, rng=None, segments=None):
            return super().example(tokens[::-1], rng, segments)

    batch = build([store], objective=Backwards(mask_documents=False), shuffle=False).batch(0)
    assert batch["tokens"][0].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("mask", [True, False])
def test_row_by_row_equals_all_at_once(store, second, mask, monkeypatch):
    objective = CLM(mask_documents=mask)
    makers = [
        build([store, second], objective=objective),
        EvaluationBatches([store, second], objective, batch_size=7, length=11),
    ]
    together = [maker.batch(step) for maker in makers for step in range(4)]
    monkeypatch.setattr(module, "_has_vectorized", lambda kind: False)
    for batch, (maker, step) in zip(together, itertools.product(makers, range(4)), strict=True):
        same(batch, maker.batch(step))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_iterate_from_any_step_equals_uninterrupted(store, second, prefetch):
    pipeline = build([store, second], objective=CLM())
    for start in (0, 1, 4, 5, 203, 10**9):
        with build([store, second], objective=CLM()).iterate(start, prefetch) as batches:
            for step in range(start, start + 5):
                same(next(batches), pipeline.batch(step))


def grain_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain")]


def test_close_ends_the_thread(store):
    batches = build([store]).iterate(0, 2)
    next(batches)
    assert grain_threads()
    batches.close()
    batches.close()
    deadline = time.monotonic() + 10
    while grain_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not grain_threads()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_making_ahead_begins_at_once_and_stops_at_prefetch(store):
    made = []
    with module.Batches(lambda n: made.append(n) or {"n": np.array(n)}, 3, 100, 2) as batches:
        deadline = time.monotonic() + 10
        while len(made) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [3, 4]
        assert int(next(batches)["n"]) == 3


def test_errors_on_the_thread_reach_the_caller():
    def broken(number):
        raise UserError("no such shard")

    with module.Batches(broken, 0, 10, 2) as batches, pytest.raises(UserError, match="no such shard"):
        next(batches)


def test_the_interpreter_ends_with_an_open_iterator(store):
    code = f"""
import sys
from maxpretrain.data.pipeline import Pipeline
from maxpretrain.data.store import Store
from maxpretrain.objectives import CLM
batches = Pipeline([Store.open({str(store.path)!r})], (), CLM(), batch_size=5, length=8, seed=0, shuffle=True).iterate(3, 2)
print(next(batches)["tokens"].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(5, 8)\n", "")


@pytest.mark.parametrize("tokens", [9, 10, 16, 17, 18, 24, 25, 100, 201])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_predicts_each_token_once(tmp_path, tokens, batch_size):
    store = make_store(tmp_path / "s", [tokens], bytes_per_token=3)
    evaluation = EvaluationBatches([store], PLAIN, batch_size=batch_size, length=8)
    batches = list(evaluation)
    windows = -(-(tokens - 1) // 8)
    assert len(batches) == len(evaluation) == -(-windows // batch_size)
    labels = np.concatenate([b["labels"][b["weights"] > 0] for b in batches])
    assert labels.tolist() == list(range(1, tokens))
    inputs = np.concatenate([b["tokens"][b["weights"] > 0] for b in batches])
    assert inputs.tolist() == list(range(tokens - 1))
    assert all(b["tokens"].shape == (batch_size, 8) for b in batches)
    assert (evaluation.num_tokens, evaluation.num_bytes) == (tokens, 3 * tokens)


def test_evaluation_pads_with_zeros(tmp_path):
    store = make_store(tmp_path / "s", [8, 4], first=50)
    batch = EvaluationBatches([store], CLM(), batch_size=3, length=8).batch(0)
    assert batch["tokens"].tolist() == [list(range(50, 58)), [58, 59, 60, 0, 0, 0, 0, 0], [0] * 8]
    assert batch["labels"].tolist() == [[*range(51, 58), 0], [59, 60, 61, 0, 0, 0, 0, 0], [0] * 8]
    assert batch["weights"].tolist() == [[1] * 7 + [0], [1] * 3 + [0] * 5, [0] * 8]
    assert batch["segments"].tolist() == [[1] * 8, [1] * 3 + [0] * 5, [0] * 8]
    assert batch["positions"].tolist() == [list(range(8)), [0, 1, 2, 0, 0, 0, 0, 0], [0] * 8]


def test_evaluation_over_several_stores_and_hosts(store, second):
    whole = EvaluationBatches([store, second], CLM(), batch_size=4, length=8)
    assert len(whole) == 10  # 25 + 13 windows
    assert (whole.num_tokens, whole.num_bytes) == (305, 305)
    parts = [EvaluationBatches([store, second], CLM(), batch_size=4, length=8, rows=range(a, a + 2)) for a in (0, 2)]
    assert [p.num_bytes for p in parts] == [305, 305]
    for one, left, right in zip(whole, *parts, strict=True):
        same(one, {name: np.concatenate([left[name], right[name]]) for name in left})


def test_evaluation_is_the_same_each_time(store):
    evaluation = EvaluationBatches([store], Drawing(), batch_size=4, length=8)
    for one, two in zip(evaluation, evaluation, strict=True):
        same(one, two)
    rng = np.random.Generator(np.random.Philox(key=np.concatenate([hash_words(4, 0, 0, 5, half) for half in (0, 1)])))
    assert evaluation.batch(1)["drawn"][1].tolist() == rng.integers(0, 2**62, 2).tolist()


def test_fewer_evaluation_batches_are_spread_over_the_text(store, second):
    evaluation = EvaluationBatches([store, second], PLAIN, batch_size=2, length=8, windows=6)
    batches = list(evaluation)
    assert len(batches) == 3
    starts = np.concatenate([b["tokens"][:, 0] for b in batches]).tolist()
    assert starts == [0, 48, 96, 152, 1000, 1048]  # windows 0, 6, 12, 19, 25 and 31 of 38
    # 8 new tokens each, and the first token of each store, which its first window covers.
    assert (evaluation.num_tokens, evaluation.num_bytes) == (50, 50)
    assert len(EvaluationBatches([store, second], PLAIN, batch_size=2, length=8, windows=200)) == 19


def test_neither_windows_nor_corruptions_depend_on_the_batch_size(store, second):
    def rows(batch_size):
        batches = EvaluationBatches([store, second], Drawing(), batch_size=batch_size, length=8, windows=9)
        return {n: np.concatenate([b[n] for b in batches])[:9] for n in ("tokens", "drawn")}

    same(rows(3), rows(4))


def test_bytes_of_part_of_a_text_follow_its_documents(tmp_path):
    with StoreWriter(tmp_path / "s", vocab_size=9, tokenizer_fingerprint="t") as writer:
        writer.add(np.zeros(20, np.int64), 20)
        writer.add(np.zeros(20, np.int64), 100)
    store = Store.open(tmp_path / "s")
    assert EvaluationBatches([store], PLAIN, batch_size=1, length=10).num_bytes == 120
    # Windows 0 (tokens 0 to 10) and 2 (new tokens 21 to 30): 11 bytes and 10 · 5 bytes.
    assert EvaluationBatches([store], PLAIN, batch_size=1, length=10, windows=2).num_bytes == 61


def test_a_text_shorter_than_a_window_is_refused(tmp_path):
    short = make_store(tmp_path / "s", [6])
    with pytest.raises(
        UserError, match=r"training text .*s has 6 tokens, but .*length 8 needs 9; .* at most 5"
    ) as error:
        build([short])
    assert error.value.exit_status == 2
    with pytest.raises(UserError, match=r"validation text .* has 6 tokens, but .*length 8 needs 9"):
        EvaluationBatches([short], PLAIN, batch_size=1, length=8)
    assert build([short], length=5).windows_per_epoch == (1,)
    evaluation = EvaluationBatches([short], PLAIN, batch_size=1, length=8, allow_short=True)
    assert [b["labels"].tolist() for b in evaluation] == [[[1, 2, 3, 4, 5, 0, 0, 0]]]


def test_what_does_not_fit_is_refused(store):
    with pytest.raises(UserError, match="2 numbers for 1 sources"):
        build([store], weights=(1, 1))
    with pytest.raises(UserError, match="no training source"):
        build([])
    with pytest.raises(UserError, match="no validation source"):
        EvaluationBatches([], PLAIN, batch_size=1, length=8)
    for rows in (range(3, 6), range(0, 0), range(0, 4, 2)):
        with pytest.raises(UserError, match="not in a batch of 5"):
            build([store], rows=rows)


class Pairs(Objective):
    """Keeps its window, and the partner that came with it."""

    partner = True

    def raw_length(self, length):
        return length

    def fields(self, length):
        return {"tokens": ((length,), "int32"), "partner": ((length,), "int32")}

    def example(self, tokens, rng, segments=None, *, partner):
        return {"tokens": tokens, "partner": partner}


def document_of(store, token):
    return np.searchsorted(store.offsets, token, "right") - 1


def test_partners_begin_other_documents(store):
    batches = [build([store], objective=Pairs()).batch(n) for n in range(40)]
    first, partner = (np.concatenate([b[name][:, 0] for b in batches]) for name in ("tokens", "partner"))
    assert (document_of(store, first) != document_of(store, partner)).all()
    ends = np.concatenate([b["partner"] for b in batches])[partner == 37]
    np.testing.assert_array_equal(ends[0], [37, 0, 0, 0, 0, 0, 0, 0])  # that document has one token
    assert set(partner.tolist()) == {0, 7, 37, 38, 100}
    same(build([store], objective=Pairs()).batch(7), batches[7])
    whole = EvaluationBatches([store], Pairs(), batch_size=4, length=8)
    again = EvaluationBatches([store], Pairs(), batch_size=7, length=8)
    rows = [np.concatenate([b["partner"] for b in e])[: len(store.offsets)] for e in (whole, again)]
    np.testing.assert_array_equal(*rows)


def test_partners_need_a_second_document(tmp_path):
    alone = make_store(tmp_path / "s", [60])
    with pytest.raises(UserError, match="holds one document, and the objective pairs texts of different ones"):
        build([alone], objective=Pairs()).batch(0)


def test_an_objective_may_change_along_the_run(store):
    class Later(Pairs):
        partner = False
        number = 0

        def at(self, step):
            later = Later()
            object.__setattr__(later, "number", step)
            return later

        def example(self, tokens, rng, segments=None):
            return {"tokens": tokens, "partner": np.full_like(tokens, self.number)}

    assert set(build([store], objective=Later()).batch(3)["partner"].ravel().tolist()) == {3}
