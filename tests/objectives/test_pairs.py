"""Pairs of texts: where they come from, how they part, what their label says, and what else is in the row."""

import numpy as np
import pytest

from maxpretrain.data.pipeline import EvaluationBatches, Pipeline
from maxpretrain.data.store import Store, StoreWriter
from maxpretrain.errors import UserError
from maxpretrain.objectives import MLM, pairs
from maxpretrain.vocabulary import Vocabulary

# Ids from 5 on are text; 5 ends a sentence; 2 ends a document.
BOS, EOS, MASK, STOP = 1, 2, 3, 5
ENDS = np.arange(20_000) == STOP
VOCABULARY = Vocabulary(size=20_000, bos_id=BOS, eos_id=EOS, mask_id=MASK, specials=(0, 1, 2, 3, 4), sentence_ends=ENDS)
PLAIN = Vocabulary(size=20_000, bos_id=BOS, eos_id=EOS, mask_id=MASK, specials=(0, 1, 2, 3, 4))


def document(number, sentences, size=4):
    """A document whose tokens say which one it is: 100·number + 0, 1, 2, …, a stop after each sentence, eos at the
    end."""
    text = []
    for sentence in range(sentences):
        text += [100 * number + (size - 1) * sentence + i for i in range(size - 1)] + [STOP]
    return [*text, EOS]


def window(*documents, cut=None):
    tokens = np.concatenate(documents).astype(np.int32)[:cut]
    segments = np.repeat(np.arange(1, len(documents) + 1), [len(d) for d in documents])[:cut].astype(np.int32)
    return tokens, segments


def made(tokens, segments, seed, kind="nsp", *, vocabulary=VOCABULARY, partner=None, short=0.0):
    return pairs.paired(
        tokens, segments, np.random.default_rng(seed), vocabulary, kind=kind, short_share=short, partner=partner
    )


def parts_of(row):
    """A, B and the rest of a row, as lists."""
    tokens, types, first = row["tokens"], row["token_types"], row["segments"] == 1
    a, b = tokens[first & (types == 0)].tolist(), tokens[first & (types == 1)].tolist()
    assert (a[0], a[-1], b[-1]) == (BOS, EOS, EOS)
    rest = [tokens[row["segments"] == s].tolist() for s in range(2, int(row["segments"].max()) + 1)]
    assert not types[~first].any()
    return a[1:-1], b[:-1], rest


PARTNER = np.array(document(90, 10) + document(91, 10), np.int32)


def test_a_true_pair_is_the_document_and_nothing_of_the_window_is_lost():
    tokens, segments = window(document(10, 3), document(11, 2), cut=20)
    for seed in range(60):
        row = made(tokens, segments, seed, partner=PARTNER)
        if row["pair_label"]:
            continue
        a, b, rest = parts_of(row)
        number = a[0] // 100
        whole = {10: document(10, 3)[:-1], 11: tokens[13:].tolist()}
        assert a + b == whole[number]
        assert a[-1] == STOP  # they part where a sentence ends
        assert rest == [{10: tokens[13:].tolist(), 11: document(10, 3)}[number]]
        assert row["pair_weight"] == 1


def test_rows_say_where_everything_is():
    tokens, segments = window(document(10, 2), document(11, 1), cut=12)
    found = [made(tokens, segments, seed, partner=PARTNER) for seed in range(40)]
    row = next(row for row in found if not row["pair_label"] and row["tokens"][1] == 1000)
    assert row["tokens"].tolist() == [1, 1000, 1001, 1002, 5, 2, 1003, 1004, 1005, 5, 2, 1100, 1101, 1102]
    assert row["segments"].tolist() == [1] * 11 + [2] * 3
    assert row["positions"].tolist() == [*range(11), 0, 1, 2]
    assert row["token_types"].tolist() == [0] * 6 + [1] * 5 + [0] * 3
    assert (row["pair_label"].dtype.name, row["pair_weight"].dtype.name) == ("int32", "float32")


@pytest.mark.parametrize("vocabulary", [VOCABULARY, PLAIN], ids=["sentences", "tokens"])
def test_a_random_text_is_of_the_partner_document(vocabulary):
    tokens, segments = window(document(10, 6), document(11, 2))
    seen = set()
    for seed in range(200):
        row = made(tokens, segments, seed, partner=PARTNER, vocabulary=vocabulary)
        a, b, rest = parts_of(row)
        assert a[0] == tokens[0] or a[0] == 1100
        if not row["pair_label"]:
            continue
        text = document(90, 10)[:-1]
        start = next(i for i in range(len(text)) if text[i : i + len(b)] == b)
        seen.add(start)
        own = 24 if a[0] == 1000 else 8
        assert 0 < len(b) <= own - len(a)
        # The true text is no longer beside the pair, unless there was room.
        assert sum(map(len, rest)) + len(a) + len(b) + 3 <= len(tokens) + 3
        if vocabulary is VOCABULARY:
            assert text[start - 1] == STOP  # begins where a sentence does, and not where the document does
            assert b[-1] == STOP  # as the true one would end
    assert len(seen) > 5


@pytest.mark.parametrize("kind", ["nsp", "sop"])
def test_labels_are_even(kind):
    tokens, segments = window(document(10, 6), document(11, 5), document(12, 9), cut=70)
    labels = [int(made(tokens, segments, seed, kind, partner=PARTNER)["pair_label"]) for seed in range(4000)]
    assert abs(sum(labels) - 2000) < 127  # four standard deviations of a binomial(4000, 1/2)


def test_swapped_texts():
    tokens, segments = window(document(10, 4))
    # The window may begin within the first sentence, which is left to itself.
    text, orders = document(10, 4)[4:-1], set()
    for seed in range(100):
        row = made(tokens, segments, seed, "sop")
        a, b, rest = parts_of(row)
        assert (b + a if row["pair_label"] else a + b) == text
        assert rest == [document(10, 4)[:4]]
        orders.add((int(row["pair_label"]), len(a)))
    assert orders == {(label, size) for label in (0, 1) for size in (4, 8)}  # both ends of a sentence, both orders


def test_the_edges_of_a_pair_do_not_tell_its_order():
    whole = np.array(document(10, 400, size=7)[:-1], np.int32)
    rows = []
    for seed in range(600):
        start = 3 * seed  # wherever in a sentence
        rows.append(made(whole[start : start + 90], np.ones(90, np.int32), seed, "sop", short=0.1))
    rows = [row for row in rows if row["pair_weight"]]
    assert len(rows) > 550
    for row in rows:
        a, b, _ = parts_of(row)
        if STOP not in a + b:  # a short stretch within a sentence, of which any edge is like any other
            continue
        assert (a[-1], b[-1]) == (STOP, STOP)
        assert (a[0] - 1000) % 6 == (b[0] - 1000) % 6 == 0  # both begin a sentence
    assert abs(np.mean([row["pair_label"] for row in rows]) - 0.5) < 0.07


def test_without_sentences_they_part_anywhere():
    tokens, segments = np.arange(100, 108, dtype=np.int32), np.ones(8, np.int32)
    sizes = {len(parts_of(made(tokens, segments, seed, "sop", vocabulary=PLAIN))[0]) for seed in range(200)}
    assert sizes == {1, 2, 3, 4, 5, 6, 7}
    # Nor with sentences, where there is but one.
    assert {len(parts_of(made(tokens, segments, seed, "sop"))[0]) for seed in range(200)} == sizes


def test_documents_are_drawn_by_their_tokens():
    tokens, segments = window(document(10, 3), document(11, 9))
    first = [parts_of(made(tokens, segments, seed, "sop"))[0][0] < 1100 for seed in range(4000)]
    assert abs(sum(first) - 1000) < 110  # 12 of 48 tokens; four standard deviations


def test_short_pairs():
    tokens, segments = window(document(10, 25))
    lengths = []
    for seed in range(2000):
        row = made(tokens, segments, seed, "sop", vocabulary=PLAIN, short=0.1)
        a, b, rest = parts_of(row)
        lengths.append(len(a) + len(b))
        text = document(10, 25)
        assert (b + a if row["pair_label"] else a + b) == text[: lengths[-1]]
        assert rest == ([text[lengths[-1] :]] if lengths[-1] < 100 else [])  # what is cut off is still trained on
    short = np.array(lengths) < 100
    assert abs(short.sum() - 200) < 54
    assert min(lengths) < 10
    assert abs(np.array(lengths)[short].mean() - 51) < 9
    for seed in range(50):
        row = made(tokens, segments, seed, "sop", short=1.0)
        if row["pair_weight"]:  # of whole sentences, at least two
            a, b, _ = parts_of(row)
            assert a[-1] == b[-1] == STOP or STOP not in a + b


def test_a_partner_that_is_the_same_document_is_no_random_text():
    # A window holds several documents, and the pipeline's partner is only none of the first.
    tokens, segments = window(document(9, 1), document(90, 8), cut=30)
    for seed in range(100):
        assert made(tokens, segments, seed, partner=PARTNER)["tokens"][1] == 900
    for nothing in ([EOS, 0, 0], [0] * 30, document(9, 1) + document(90, 8)):
        row = made(*window(document(9, 1)), 0, partner=np.array(nothing))
        assert row["pair_weight"] == 0


def test_a_partner_ends_with_its_document():
    tokens, segments = window(document(10, 12))
    for seed in range(100):
        row = made(tokens, segments, seed, partner=np.array(document(90, 2) + document(91, 9), np.int32))
        if row["pair_label"]:
            assert set(parts_of(row)[1]) <= {9003, 9004, 9005, STOP, 9000, 9001, 9002}
    with pytest.raises(UserError, match="give `partner`"):
        made(tokens, segments, 0)


def test_windows_without_a_pair():
    for tokens, segments in (([7], [1]), ([2], [1]), ([7, 2, 8], [1, 1, 2])):
        row = made(np.array(tokens), np.array(segments), 0, "sop")
        assert row["pair_weight"] == 0
        assert row["pair_label"] == 0
        assert row["tokens"].tolist() == [1, *tokens] + ([] if tokens[-1] == 2 else [2])
        assert not row["token_types"].any()
    two = made(np.array([7, 8]), None, 0, "sop")
    assert sorted(two["tokens"].tolist()) == [1, 2, 2, 7, 8]
    assert two["pair_weight"] == 1


def test_specials_at_the_ends_of_a_document_are_no_text():
    tokens = np.array([BOS, 6, STOP, 7, STOP, 8, 9, STOP, EOS, EOS], np.int32)
    a, b, rest = parts_of(made(tokens, np.ones(10, np.int32), 3, "sop"))
    assert sorted([a, b]) == [[7, STOP], [8, 9, STOP]]
    assert rest == [[6, STOP]]


# Through the pipeline


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Forty documents, 10 … 49, of one to nine sentences."""
    texts = [document(n, 1 + n % 9) for n in range(10, 50)]
    path = tmp_path_factory.mktemp("pairs") / "store"
    lengths = np.array([len(text) for text in texts])
    with StoreWriter(path, vocab_size=20_000, tokenizer_fingerprint="t") as writer:
        writer.add_many(np.concatenate(texts), lengths, lengths)
    return Store.open(path)


def test_pairs_of_a_store(store):
    objective = MLM(pair="nsp", mask_share=0.0, random_share=0.0).bind(VOCABULARY)
    batch = Pipeline([store], (), objective, batch_size=64, length=40, seed=0, shuffle=True).batch(0)
    assert batch["tokens"].shape == (64, 40)
    assert batch["pair_label"].shape == (64,)
    assert batch["pair_weight"].tolist() == [1.0] * 64
    assert 20 <= batch["pair_label"].sum() <= 44
    for row in range(64):
        one = {name: array[row] for name, array in batch.items()}
        a, b, _ = parts_of(one)
        numbers = [{t // 100 for t in text if t != STOP} for text in (a, b)]
        if all(numbers):
            assert (numbers[0] == numbers[1]) == (one["pair_label"] == 0)
    assert (batch["segments"] > 0).mean() > 0.9  # short documents, and yet full rows


def test_evaluation_pairs_do_not_depend_on_the_batch(store):
    objective = MLM(pair="nsp").bind(VOCABULARY)
    whole, single = (EvaluationBatches([store], objective, batch_size=n, length=40) for n in (8, 1))
    batch = whole.batch(1)
    for row in range(8):
        for name, array in single.batch(8 + row).items():
            np.testing.assert_array_equal(array[0], batch[name][row])
