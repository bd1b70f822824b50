"""BART's five noises: each by itself, their order, and what a decoder learns from."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.config import BatchConfig, ModelConfig, Run, validate
from maxpretrain.errors import UserError
from maxpretrain.models import build
from maxpretrain.objectives import BART
from maxpretrain.objectives.bart import infilled, permuted, sentence_starts, span_lengths
from maxpretrain.objectives.seq2seq import shifted
from maxpretrain.vocabulary import Vocabulary

V, BOS, EOS, MASK, STOP = 600, 0, 2, 599, 10
SPECIALS = (0, 1, 2, 3, MASK)
# Even tokens begin a word; STOP ends a sentence.
VOCABULARY = Vocabulary(
    size=V,
    pad_id=1,
    bos_id=BOS,
    eos_id=EOS,
    mask_id=MASK,
    specials=SPECIALS,
    word_starts=np.arange(V) % 2 == 0,
    sentence_ends=np.arange(V) == STOP,
)
NONE = {"infill": 0.0, "permute_sentences": 0.0}


def rng(seed=0):
    return np.random.default_rng(seed)


def parameters(model):
    """Some, drawn by numpy: nothing is compiled."""
    draw = lambda spec: jnp.asarray(rng(9).normal(0, 0.05, spec.struct.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, model.abstract, is_leaf=lambda x: hasattr(x, "struct"))


def bound(**fields):
    return BART(**fields).bind(VOCABULARY)


def example(tokens, seed=0, segments=None, **fields):
    made = bound(**fields).example(np.asarray(tokens), rng(seed), segments)
    return made["tokens"].tolist(), made["labels"].tolist()


def text(length, seed=0):
    return rng(seed).integers(20, 590, length)


def test_the_recipe_is_infilling_thirty_percent_and_all_sentences():
    assert BART() == BART(infill=0.3, poisson=3.0, permute_sentences=1.0, mask=0.0, delete=0.0, rotate=0.0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {**NONE, "mask": 0.3},
        {**NONE, "delete": 0.3},
        {**NONE, "rotate": 1.0},
        {"mask": 0.1, "delete": 0.1, "rotate": 1.0},
    ],
)
def test_targets_are_the_text_and_ends_stay(fields):
    for seed in range(30):
        tokens = text(40, seed)
        inputs, labels = example(tokens, seed, **fields)
        assert labels == [BOS, *tokens.tolist(), EOS]
        assert (inputs[0], inputs[-1]) == (BOS, EOS)
        assert len(inputs) <= len(labels)
        assert not {BOS, EOS} & set(inputs[1:-1])


def test_specials_and_padding_are_left_out():
    tokens, segments = [BOS, 20, 21, EOS, 30, MASK, 32, EOS, 1, 1], np.array([1, 1, 1, 1, 2, 2, 2, 2, 0, 0], np.int32)
    assert example(tokens, 0, segments, **NONE | {"rotate": 1e-9})[1] == [BOS, 20, 21, 30, 32, EOS]
    without_bos = dataclasses.replace(VOCABULARY, bos_id=None)
    made = BART(**NONE, rotate=1e-9).bind(without_bos).example(np.array([20, 21]), rng())
    assert made["labels"].tolist() == made["tokens"].tolist() == [20, 21, EOS]


# Infilling


def test_poisson_lengths():
    """.0498 .1494 .2240 .2240 .1680 .1008 .0504 .0216 for 0 … 7 words, over 1e5 spans; the last of a text is cut, so left out."""
    generator = rng(3)
    counts = Counter(generator.poisson(3.0, 100_000).tolist())
    drawn = Counter(np.concatenate([span_lengths(3000, 3.0, generator) for _ in range(100)]).tolist())
    total = sum(drawn.values())
    assert total == pytest.approx(100_000, rel=0.01)
    for length, share in enumerate([0.0498, 0.1494, 0.2240, 0.2240, 0.1680, 0.1008, 0.0504, 0.0216]):
        assert counts[length] / 100_000 == pytest.approx(share, abs=0.005)  # numpy's Poisson
        assert drawn[length] / total == pytest.approx(share, abs=0.005)


def test_the_budget_is_exact():
    generator = rng(4)
    for budget in range(1, 60):
        lengths = span_lengths(budget, 3.0, generator)
        assert lengths.sum() == budget
        assert 1 <= len(lengths) <= budget
    assert {len(span_lengths(3, 0.1, generator)) for _ in range(50)} <= {1, 2, 3}


def test_infilling_takes_the_budget_in_whole_words():
    for seed in range(200):
        words = rng(seed).integers(1, 60)
        sizes = rng(seed).integers(1, 4, words)
        begins = np.zeros(sizes.sum(), bool)
        begins[np.cumsum(sizes) - sizes] = True
        number = np.repeat(np.arange(words), sizes)  # each token says its word
        kept = infilled(number.astype(np.int32), begins, np.int32(-1), share=0.3, rate=3.0, rng=rng(seed))
        there = Counter(kept[kept >= 0].tolist())
        assert words - len(there) == -(-3 * words // 10)
        assert all(count == sizes[word] for word, count in there.items())
        assert (np.diff(kept[kept >= 0]) >= 0).all()


def test_one_mask_a_span_and_one_between_words_for_none():
    """Every order of the spans among the words that stay is as likely: 3 of 10 words in spans."""
    generator = rng(5)
    inserted = runs = masks = 0
    first = Counter()
    for _ in range(4000):
        kept = infilled(
            np.arange(10, dtype=np.int32), np.ones(10, bool), np.int32(-1), share=0.3, rate=3.0, rng=generator
        )
        assert (kept >= 0).sum() == 7
        masks += int((kept < 0).sum())
        runs += 1
        first[int(kept[0])] += 1
        # A mask between neighbours of the text stands for no word.
        inserted += sum(
            kept[i] < 0 and kept[i - 1] >= 0 and kept[i + 1] == kept[i - 1] + 1 for i in range(1, len(kept) - 1)
        )
    assert inserted > 100
    assert masks / runs == pytest.approx(1.486, abs=0.04)  # draws from Poisson(3) until they reach 3, at most 3
    assert 0.1 < first[-1] / runs < 0.3


def test_all_words_can_go():
    assert example([20, 22, 24], infill=1.0, permute_sentences=0.0, poisson=1000.0) == (
        [BOS, MASK, EOS],
        [BOS, 20, 22, 24, EOS],
    )


# Sentences


def test_sentences_begin_after_stops_and_with_documents():
    ends = np.array([0, 1, 1, 0, 0, 1, 0, 0], bool)
    documents = np.array([1, 1, 1, 1, 2, 2, 2, 2])
    assert sentence_starts(ends, documents).tolist() == [0, 3, 4, 6]
    assert sentence_starts(np.zeros(3, bool), np.array([7, 7, 8])).tolist() == [0, 2]


def test_sentences_change_places_within_their_document():
    tokens = [20, STOP, 30, 31, STOP, 40, STOP, EOS, 50, STOP, 60, EOS]
    segments = np.array([1] * 8 + [2] * 4, np.int32)
    seen = Counter(
        tuple(example(tokens, seed, segments, infill=0.0)[0][1:-1]) for seed in range(1200)
    )  # three sentences, and two: 3!·2! orders
    assert len(seen) == 12
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 31.3  # χ², 11 degrees of freedom, p = .001
    assert (30, 31, STOP, 20, STOP, 40, STOP, 60, 50, STOP) in seen


def test_a_share_of_the_sentences():
    starts, documents = np.arange(0, 40, 4), np.ones(40, np.int32)
    moved = []
    for seed in range(300):
        order = permuted(starts, documents, 0.3, rng(seed)).reshape(10, 4)
        assert sorted(order[:, 0].tolist()) == starts.tolist()
        assert (np.diff(order, axis=1) == 1).all()
        moved.append(int((order[:, 0] != starts).sum()))
    assert set(moved) == {0, 2, 3}  # three are chosen: of their 6 orders 1 moves none, 3 two, 2 three
    assert np.mean(moved) == pytest.approx(2.0, abs=0.2)


def test_without_sentences_nothing_moves():
    vocabulary = dataclasses.replace(VOCABULARY, sentence_ends=None)
    made = BART(infill=0.0, permute_sentences=1.0).bind(vocabulary).example(text(20), rng())
    assert made["tokens"].tolist() == made["labels"].tolist()


# The other noises


def test_masking_and_deletion_are_exact():
    tokens = text(50).tolist()
    inputs, _ = example(tokens, **NONE | {"mask": 0.3})
    assert inputs.count(MASK) == 15
    assert len(inputs) == 52
    assert all(a in (b, MASK) for a, b in zip(inputs[1:-1], tokens, strict=True))
    inputs, _ = example(tokens, **NONE | {"delete": 0.3})
    assert len(inputs) == 37
    rest = iter(tokens)
    assert all(token in rest for token in inputs[1:-1])  # in order
    inputs, _ = example(tokens, **NONE | {"mask": 0.2, "delete": 0.5})
    assert inputs.count(MASK) == 10  # masks are not deleted
    assert len(inputs) == 2 + 10 + 20


def test_rotation_is_uniform():
    tokens = text(5).tolist()
    seen = Counter(tuple(example(tokens, seed, **NONE | {"rotate": 1.0})[0][1:-1]) for seed in range(1000))
    assert set(seen) == {(*tokens[i:], *tokens[:i]) for i in range(5)}
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 18.5  # χ², 4 degrees of freedom, p = .001
    half = [example(tokens, seed, **NONE | {"rotate": 0.5})[0][1:-1] == tokens for seed in range(1000)]
    assert np.mean(half) == pytest.approx(0.5 + 0.5 / 5, abs=0.05)


def test_short_windows():
    for n in range(1, 12):
        for seed in range(20):
            inputs, labels = example(text(n, seed), seed)
            assert labels == [BOS, *text(n, seed).tolist(), EOS]
            assert 3 <= len(inputs) <= n + 2
            assert MASK in inputs
    assert example([EOS]) == ([], [])


def test_lengths_and_determinism():
    objective = bound()
    assert objective.raw_length(512) == 510
    assert objective.fields(512) == {
        "tokens": ((512,), "int32"),
        "segments": ((512,), "int32"),
        "decoder_segments": ((512,), "int32"),
        "labels": ((512,), "int32"),
        "weights": ((512,), "float32"),
    }
    a, b, c = (objective.example(text(510), rng(seed)) for seed in (1, 1, 2))
    assert {name: array.dtype.name for name, array in a.items()} == {
        name: dtype for name, (_, dtype) in objective.fields(512).items()
    }
    assert a["tokens"].tolist() == b["tokens"].tolist() != c["tokens"].tolist()
    assert len(a["labels"]) == 512
    # Words of two tokens on average: 30 % of the text gone, and a mask for six tokens of that.
    assert 350 < len(a["tokens"]) < 420


def test_it_learns_what_stood_there():
    """The decoder begins with eos, and the loss is over the whole text."""
    model = build(
        ModelConfig(
            architecture="encoder-decoder",
            vocab_size=V,
            num_layers=1,
            model_dim=16,
            num_heads=2,
            max_length=16,
            decoder_start_id=2,
        )
    )
    params = parameters(model)
    objective = bound()
    made = objective.example(text(9), rng())
    data = {name: np.zeros((1, *shape), dtype) for name, (shape, dtype) in objective.fields(16).items()}
    for name, array in made.items():
        data[name][0, : len(array)] = array
    data = jax.tree.map(jnp.asarray, data)
    assert shifted(data["labels"], 2)[0, :3].tolist() == [2, 0, made["labels"][1]]
    loss = jax.jit(lambda p, b: objective.loss(model, p, b, None))(params, data)
    assert float(loss.weight) == 11
    assert float(loss.sum / loss.weight) == pytest.approx(6.4, abs=0.1)  # ln 600 = 6.397 before training


# What is refused


@pytest.mark.parametrize(
    ("fields", "length", "message"),
    [
        ({"infill": 1.5}, 64, r"^objective.infill is 1\.5; it is a share, in \[0, 1\]$"),
        (
            NONE,
            64,
            "^objective BART corrupts nothing: infill, permute_sentences, mask, delete, rotate are all 0; set one",
        ),
        ({"poisson": 0.0}, 64, r"^objective.poisson is 0\.0; it must be in \[0\.1, 1000\], and 3 is published$"),
        ({}, 2, "^batch.length is 2, too short for objective BART to corrupt one span; use at least 3$"),
    ],
)
def test_bad_fields(fields, length, message):
    model = ModelConfig(architecture="encoder-decoder", decoder_start_id=2)
    with pytest.raises(UserError, match=message):
        validate(Run(model=model, objective=BART(**fields), batch=BatchConfig(length=length)))


def test_bad_vocabulary():
    assert BART().symbols() == ("<mask>",)
    with pytest.raises(UserError, match="BART needs a mask token, and the tokenizer has none; use one with <mask> or"):
        BART().bind(Vocabulary(size=9, eos_id=2))
    with pytest.raises(UserError, match="BART ends its inputs and targets with eos, and the tokenizer has none"):
        BART().bind(Vocabulary(size=9, mask_id=8))
    BART(infill=0.0).bind(Vocabulary(size=9, eos_id=2))
