"""Prefix LM: rows worked by hand, the published mask, and what may not reach the loss."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.config import BatchConfig, ModelConfig, Run, TokenizerConfig, validate
from maxpretrain.errors import UserError
from maxpretrain.models import build
from maxpretrain.nn.attend import Context, visible
from maxpretrain.nn.stack import Execution
from maxpretrain.objectives import PrefixLM
from maxpretrain.objectives.prefix import encoder_decoder, shift_right
from maxpretrain.vocabulary import Vocabulary

DECODER = ModelConfig(
    vocab_size=32, num_layers=1, model_dim=16, num_heads=2, max_length=16, tie_embeddings=False, init_std=0.3
)
BOTH = dataclasses.replace(
    DECODER, architecture="encoder-decoder", position="t5", decoder_start_id=3, position_offset=0
)


class Cuts:
    """In the place of a generator: the cuts that a test wants."""

    def __init__(self, *cuts):
        self.cuts = cuts

    def integers(self, low, high):
        assert low == 1
        assert (np.array(self.cuts) < high).all()
        return np.array(self.cuts)


def lists(arrays):
    return {name: np.asarray(array).astype(int).tolist() for name, array in arrays.items()}


def batch_of(*examples):
    return {name: jnp.asarray(np.stack([e[name] for e in examples])) for name in examples[0]}


def test_mask_of_the_specification():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 0]], jnp.int32)
    prefix = jnp.asarray([[1, 1, 0, 1, 1, 0, 0]], bool)
    mask = visible(Context(causal=True, segments=segments, prefix=prefix), 7, 7)
    rows = ["".join(map(str, row)) for row in np.asarray(mask[0]).astype(int).tolist()]
    assert rows == ["1100000", "1100000", "1110000", "0001100", "0001100", "0001110", "0000000"]


def test_shift_right_of_the_specification():
    tokens, segments = jnp.asarray([[3, 9, 1, 4, 1, 0, 0]]), jnp.asarray([[1, 1, 1, 2, 2, 0, 0]])
    assert shift_right(tokens, segments, 0).tolist() == [[0, 3, 9, 0, 4, 0, 0]]
    assert shift_right(tokens, segments, 7).tolist() == [[7, 3, 9, 7, 4, 0, 0]]


def test_an_example_worked_by_hand():
    tokens = np.array([11, 12, 13, 14, 2, 21, 2, 31, 32, 2], np.uint16)
    segments = np.array([1, 1, 1, 1, 1, 2, 2, 3, 3, 3], np.int32)
    assert lists(PrefixLM().example(tokens, Cuts(3, 1, 2), segments)) == {
        "tokens": [11, 12, 13, 14, 2, 21, 2, 31, 32, 2],
        "labels": [0, 0, 14, 2, 0, 2, 0, 0, 2, 0],
        "weights": [0, 0, 1, 1, 0, 1, 0, 0, 1, 0],
        "segments": [1, 1, 1, 1, 1, 2, 2, 3, 3, 3],
        "positions": [0, 1, 2, 3, 4, 0, 1, 0, 1, 2],
        "prefix": [1, 1, 1, 0, 0, 1, 0, 1, 1, 0],
    }


def test_what_an_encoder_decoder_reads():
    tokens = np.array([11, 12, 13, 14, 2, 21, 2, 31, 32, 2, 41, 0], np.int32)
    segments = np.array([1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 4, 0], np.int32)
    batch = batch_of(PrefixLM().example(tokens, Cuts(3, 1, 2, 1, 1), segments))
    assert {name: row[0] for name, row in lists(encoder_decoder(batch, start_id=5, eos_id=2)).items()} == {
        "tokens": [11, 12, 13, 2, 0, 21, 2, 31, 32, 2, 41, 0],
        "segments": [1, 1, 1, 1, 0, 2, 2, 3, 3, 3, 4, 0],
        "positions": [0, 1, 2, 3, 0, 0, 1, 0, 1, 2, 0, 0],
        "decoder_tokens": [0, 0, 5, 14, 0, 5, 0, 0, 5, 0, 0, 0],
        "decoder_segments": [0, 0, 1, 1, 0, 2, 0, 0, 3, 0, 0, 0],
        "decoder_positions": [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    }
    without = lists(encoder_decoder(batch, start_id=5, eos_id=None))
    assert without["tokens"][0] == [11, 12, 13, 0, 0, 21, 0, 31, 32, 0, 41, 0]
    assert without["segments"][0] == [1, 1, 1, 0, 0, 2, 0, 3, 3, 0, 4, 0]


def test_fields_edges_and_padding():
    objective = PrefixLM()
    assert objective.raw_length(512) == 512
    example = objective.example(np.arange(8, dtype=np.uint16), np.random.default_rng(0), np.ones(8, np.int32))
    assert {name: (a.shape, a.dtype.name) for name, a in example.items()} == objective.fields(8)
    alone = lists(objective.example(np.array([7]), np.random.default_rng(0)))
    assert alone == {"tokens": [7], "labels": [0], "weights": [0], "segments": [1], "positions": [0], "prefix": [1]}
    padded = objective.example(np.array([7, 8, 9, 5, 5]), np.random.default_rng(0), np.array([1, 1, 1, 0, 0]))
    assert not np.concatenate([array[3:] for array in padded.values()]).any()
    tokens = np.arange(5)
    one, two = (objective.example(tokens, np.random.default_rng(3)) for _ in range(2))
    assert lists(one) == lists(two)
    assert tokens.tolist() == [0, 1, 2, 3, 4]


def test_cuts_are_uniform_and_leave_neither_part_empty():
    """χ² of 6,000 cuts of documents of 7 tokens over its 6 inner places: 5 degrees of freedom, 20.5 at p = 0.001."""
    rng, segments = np.random.default_rng(0), np.repeat(np.arange(1, 11), 7)
    counts = Counter()
    for _ in range(600):
        example = PrefixLM().example(np.arange(70), rng, segments)
        counts.update(example["prefix"].reshape(10, 7).sum(1).tolist())
        assert (example["weights"].reshape(10, 7).sum(1) + example["prefix"].reshape(10, 7).sum(1) == 7).all()
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 20.5


def row(tokens, *cuts, segments=None):
    return PrefixLM().example(np.asarray(tokens), Cuts(*cuts), segments)


@pytest.fixture(scope="module", params=[DECODER, BOTH], ids=("decoder", "encoder-decoder"))
def measure(request):
    """(row of 10) -> its loss, weight, and |gradient| with respect to each row of the embedding; compiled once."""
    model = build(request.param)
    params = jax.jit(model.init)(jax.random.key(1))
    objective = PrefixLM().bind(Vocabulary(size=32, eos_id=2))

    def total(params, batch):
        loss = objective.loss(model, params, batch, None)
        return loss.sum, loss.weight

    compiled = jax.jit(jax.value_and_grad(total, has_aux=True))

    def measured(example):
        (value, weight), gradient = compiled(params, batch_of(example))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        return float(value), float(weight), np.abs(gradient["embed"]["table"]).sum(-1)

    return measured


def test_no_label_reaches_its_own_prediction(measure):
    """Two documents, 10 … 15 cut after three and 20 … 23 cut after one; each label's loss by itself.

    The tokens all differ, so that the gradient of a row of the table is that of one input.
    """
    example = row([*range(10, 16), *range(20, 24)], 3, 1, segments=np.array([1] * 6 + [2] * 4))
    assert example["weights"].astype(int).tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 1, 0]

    def seen(at):
        gradient = measure(example | {"weights": np.eye(10, dtype=np.float32)[at]})[2]
        return (gradient[example["tokens"]] > 0).astype(int).tolist()

    # The whole prefix, in both directions, is seen from its last token on; then everything up to the token before.
    assert seen(2) == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert seen(4) == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert seen(6) == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert seen(8) == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0]


def test_packed_documents_are_as_if_alone(measure):
    one, two = [10, 11, 12, 13, 14, 2], [20, 21, 22, 2]
    pad = lambda x: [*x, *[0] * (10 - len(x))]  # noqa: E731
    first = measure(row(pad(one), 3, 1, segments=np.array(pad([1] * 6))))
    second = measure(row(pad(two), 1, 1, segments=np.array(pad([1] * 4))))
    packed = measure(row([*one, *two], 3, 1, segments=np.array([1] * 6 + [2] * 4)))
    assert (first[1], second[1], packed[1]) == (3, 3, 6)
    np.testing.assert_allclose(packed[0], first[0] + second[0], rtol=1e-5)


def test_nothing_to_predict_is_zero_and_not_nan(measure):
    example = PrefixLM().example(np.arange(3, 13), np.random.default_rng(0), np.arange(1, 11))
    value, weight, gradient = measure(example)
    assert (value, weight, gradient.sum()) == (0, 0, 0)


def test_prefix_tokens_see_what_follows_them():
    """The state of the first token of a prefix depends on its third."""
    model = build(DECODER)
    params = jax.jit(model.init)(jax.random.key(0))
    hidden = jax.jit(lambda tokens, prefix: model.apply(params, tokens, prefix=prefix).hidden)
    tokens, others = jnp.asarray([[5, 6, 7, 8]]), jnp.asarray([[5, 6, 9, 8]])
    both, none = jnp.asarray([[True, True, True, False]]), jnp.zeros((1, 4), bool)
    assert (np.abs(hidden(tokens, both) - hidden(others, both))[0, 0] > 1e-4).all()
    assert (hidden(tokens, none)[0, 0] == hidden(others, none)[0, 0]).all()


def test_a_kernel_is_told_of_the_prefix(monkeypatch):
    """cuDNN's attention gets the mask itself, and is not asked for a causal one."""
    asked = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **how: asked.append(how) or q)
    model = build(DECODER, Execution(attention="cudnn", scan=False))
    prefix = jnp.asarray([[True, True, True, False, False]])

    def mask(params):
        model.apply(params, jnp.zeros((1, 5), jnp.int32), prefix=prefix)
        return asked[0].pop("mask")

    params = jax.eval_shape(model.init, jax.random.key(0))
    rows = jax.jit(lambda: mask(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params)))()
    assert asked[0]["implementation"] == "cudnn"
    assert asked[0]["is_causal"] is False
    assert ["".join(map(str, r)) for r in rows.astype(int)[0, 0].tolist()] == [
        "11100",
        "11100",
        "11100",
        "11110",
        "11111",
    ]


def test_runs_that_cannot_be():
    run = Run(
        name="x",
        model=DECODER,
        objective=PrefixLM(),
        tokenizer=TokenizerConfig(kind="bytes"),
        batch=BatchConfig(size=8, length=16),
    )
    both = dataclasses.replace(BOTH, vocab_size=256)
    ask = lambda **changes: validate(dataclasses.replace(run, **changes))  # noqa: E731
    ask(model=dataclasses.replace(DECODER, vocab_size=256))
    with pytest.raises(
        UserError, match=r"objective PrefixLM needs a decoder or encoder-decoder; model.architecture is encoder"
    ):
        ask(model=dataclasses.replace(DECODER, vocab_size=256, architecture="encoder"))
    with pytest.raises(UserError, match=r"batch.length is 1; a prefix and something to predict need at least 2 tokens"):
        ask(batch=BatchConfig(size=8, length=1))
    with pytest.raises(
        UserError, match=r"model.decoder_start_id is None; set it to the id that the decoder begins with"
    ):
        ask(model=dataclasses.replace(both, decoder_start_id=None))
    with pytest.raises(UserError, match=r"objective.label_smoothing is 1.0"):
        ask(objective=PrefixLM(label_smoothing=1.0))
    assert [w.decoder_length for w in PrefixLM().work(BOTH, 16)] == [16]
