"""Replaced token detection: what is masked, what is drawn, who learns from what, and the losses by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain import mesh
from maxpretrain.config import BatchConfig, MeshConfig, ModelConfig, Run
from maxpretrain.errors import UserError
from maxpretrain.fingerprint import named_leaves
from maxpretrain.models import Output, families
from maxpretrain.models.families import bert_like
from maxpretrain.nn.base import is_spec
from maxpretrain.nn.stack import Execution
from maxpretrain.objectives import ELECTRA, RTD, replacing
from maxpretrain.vocabulary import Vocabulary

V, T = 40, 24
PAD, BOS, EOS, MASK = 0, 1, 2, 3
VOCABULARY = Vocabulary(size=V, pad_id=PAD, bos_id=BOS, eos_id=EOS, mask_id=MASK, specials=(PAD, BOS, EOS, MASK))
SHAPE = bert_like.shape(
    vocab_size=V,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    mlp_dim=32,
    embed_dim=8,
    max_length=T,
    token_types=2,
    heads=("replaced",),
    dropout=0.0,
)
KINDS = {"electra": ELECTRA().bind(VOCABULARY), "deberta": RTD().bind(VOCABULARY)}


def generator(seed):
    return np.random.Generator(np.random.Philox(key=seed))


def text(length, seed=0, low=4, high=V):
    return np.random.default_rng(seed).integers(low, high, length).astype(np.int32)


def stacked(rows, objective, length=T):
    """Examples, filled up with zeros as the pipeline does."""
    batch = {name: np.zeros((len(rows), *shape), dtype) for name, (shape, dtype) in objective.fields(length).items()}
    for index, row in enumerate(rows):
        for name, array in row.items():
            batch[name][(index, *map(slice, array.shape))] = array
    return jax.tree.map(jnp.asarray, batch)


def batch_of(objective, lengths=(22, 22, 9, 1, 15, 22, 3, 22)):
    """Rows of unequal length: with bos and eos 24, 24, 11, 3, …"""
    return stacked([objective.example(text(n, n), generator(i)) for i, n in enumerate(lengths)], objective)


def drawn(model, scale=0.3):
    rng = np.random.default_rng(0)

    def draw(path, spec):
        return jnp.asarray((path[-1].key == "scale") + scale * rng.standard_normal(spec.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, model.abstract, is_leaf=is_spec)


@functools.cache
def pair_of(kind):
    """An objective, its networks, their parameters, and the loss with its gradient, compiled once."""
    objective = KINDS[kind]
    model = objective.build(SHAPE)

    def total(params, batch, rtd_weight):
        loss = objective.replace(rtd_weight=rtd_weight).loss(model, params, batch, None)
        return loss.sum, loss

    compiled = jax.jit(jax.value_and_grad(total, has_aux=True))
    ask = lambda params, batch, rtd_weight=50.0: compiled(params, batch, jnp.float32(rtd_weight))  # noqa: E731
    return objective, model, drawn(model), ask


# What is masked


def test_an_exact_count_of_each_length():
    objective = ELECTRA().bind(VOCABULARY)
    counts = []
    for length in range(3, 513):
        example = objective.example(text(length - 2, length), generator(length))
        weights = example["weights"]
        assert len(example["tokens"]) == length
        counts.append(int(weights.sum()))
    # Of 0.15·n, half to even: 1.5 -> 2, 4.5 -> 4, 7.5 -> 8; never none.
    found = {length: counts[length - 3] for length in (3, 9, 10, 11, 30, 50, 64, 128, 256, 384, 512)}
    assert found == {3: 1, 9: 1, 10: 2, 11: 2, 30: 4, 50: 8, 64: 10, 128: 19, 256: 38, 384: 58, 512: 77}
    large = ELECTRA(rate=0.25).bind(VOCABULARY)
    assert int(large.example(text(510), generator(0))["weights"].sum()) == 128


@pytest.mark.parametrize(("kind", "share"), [("electra", 0.85), ("deberta", 1.0)])
def test_masks_and_kept_tokens(kind, share):
    objective = KINDS[kind]
    masked = kept = 0
    for seed in range(400):
        raw = text(254, seed)
        raw[[40, 41, 100]] = [EOS, MASK, BOS]
        example = objective.example(raw, generator(seed))
        whole = np.concatenate([[BOS], raw, [EOS]])
        places = example["places"]
        assert len(np.unique(places)) == 38
        assert not np.isin(whole[places], (BOS, EOS, MASK, PAD)).any()
        np.testing.assert_array_equal(example["labels"], whole[places])
        there = example["tokens"][places]
        masked += int((there == MASK).sum())
        kept += int((there == whole[places]).sum())
        others = np.delete(np.arange(256), places)
        np.testing.assert_array_equal(example["tokens"][others], whole[others])
    assert masked + kept == 400 * 38  # nothing is replaced at random
    expected = 400 * 38 * share
    assert abs(masked - expected) <= 3.3 * math.sqrt(expected * (1 - share))


def test_the_same_generator_makes_the_same_example():
    objective, raw = KINDS["electra"], text(22)
    a, b, c = (objective.example(raw, generator(seed)) for seed in (5, 5, 6))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(a["seeds"], c["seeds"])
    assert not np.array_equal(a["places"], c["places"])
    assert {name: (v.shape, str(v.dtype)) for name, v in a.items()} == {
        "tokens": ((24,), "int32"),
        "segments": ((24,), "int32"),
        "positions": ((24,), "int32"),
        "places": ((4,), "int32"),
        "labels": ((4,), "int32"),
        "weights": ((4,), "float32"),
        "seeds": ((2,), "uint32"),
    }


def test_documents():
    segments = np.array([1] * 8 + [2] * 14, np.int32)
    example = KINDS["electra"].example(text(22), generator(0), segments)
    assert example["segments"].tolist() == [1] * 9 + [2] * 15
    assert example["positions"].tolist() == [*range(9), *range(15)]
    whole = ELECTRA(mask_documents=False).bind(VOCABULARY).example(text(22), generator(0), segments)
    assert whole["positions"].tolist() == list(range(24))


# What is drawn


class Fixed:
    """A network whose hidden states are its logits."""

    config = ModelConfig(vocab_size=6)

    def __init__(self, chunk=1 << 30):
        self.execution = Execution(loss_chunk=chunk)

    def head(self, params):
        return params

    def logits(self, head, hidden):
        return hidden


def test_draws_follow_the_softmax():
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.05, 0.0])
    count = 20_000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (2, count // 2, 6))
    seeds = jnp.asarray([[1, 2], [1, 3]], jnp.uint32)
    tokens = np.asarray(replacing.sampled(Fixed(), {}, logits, seeds))
    assert tokens.dtype == np.int32
    found = np.bincount(tokens.ravel(), minlength=6)
    assert found[5] == 0
    expected = count * probabilities[:5]
    assert ((found[:5] - expected) ** 2 / expected).sum() < 18.47  # χ² of 4 degrees, p = 0.001
    # Rows are independent: agreement by chance is Σ p² = 0.285.
    assert (tokens[0] == tokens[1]).mean() == pytest.approx(0.285, abs=0.02)


def test_draws_depend_on_the_seed_of_the_row_alone():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((4, 7, 6)), jnp.float32)
    seeds = jnp.asarray(rng.integers(1 << 32, size=(4, 2)), jnp.uint32)
    ask = lambda logits, seeds, chunk: replacing.sampled(Fixed(chunk), {}, logits, seeds)  # noqa: E731
    draw = jax.jit(ask, static_argnums=2)
    whole = np.asarray(draw(logits, seeds, 1 << 30))
    np.testing.assert_array_equal(draw(logits, seeds, 8), whole)  # chunks of two places, and a rest
    np.testing.assert_array_equal(draw(logits[2:, :5], seeds[2:], 1 << 30), whole[2:, :5])
    flat = jnp.zeros((4, 50, 6), jnp.float32)
    one, other = (np.asarray(draw(flat, seeds.at[:, 1].add(jnp.uint32(n)), 1 << 30)) for n in (0, 1))
    assert (one == other).mean() < 0.4  # by chance 1/6


def test_places_that_are_not_real_change_nothing():
    x = jnp.asarray([[10, 11, 12, 13], [20, 21, 22, 23]], jnp.int32)
    places = jnp.asarray([[3, 1, 0], [0, 0, 0]], jnp.int32)
    real = jnp.asarray([[True, True, False], [False, False, False]])
    put = replacing.placed(x, places, jnp.full((2, 3), 7, jnp.int32), real)
    assert put.tolist() == [[10, 7, 12, 7], [20, 21, 22, 23]]


def test_binary_cross_entropy():
    logits = jnp.asarray([0.0, 0.0, 2.0, 2.0, -200.0, 200.0], jnp.float32)
    labels = jnp.asarray([True, False, True, False, True, True])
    expected = [0.6931472, 0.6931472, 0.1269280, 2.1269280, 200.0, 0.0]
    np.testing.assert_allclose(replacing.binary_cross_entropy(logits, labels), expected, rtol=1e-6, atol=1e-30)


# Losses


class Said:
    """A pair that says what it is told: the generator is certain of one token a place, the discriminator has given scores."""

    execution, config = Execution(), ModelConfig(vocab_size=6)

    def __init__(self, logits, scores):
        self.generator, self.logits, self.scores, self.read = self, logits, scores, []

    def generator_params(self, params):
        return params

    def apply(self, params, tokens, positions, segments, key):
        self.read.append(tokens)
        return Output(jnp.zeros((*tokens.shape, 1), jnp.float32), {})

    def head(self, params):
        return params

    def head_outputs(self, params, hidden):
        return {"replaced_logits": self.scores}


def test_losses_and_counts_by_hand(monkeypatch):
    """Two rows of 5 and 3 tokens, three masked places, of which the generator gets one right."""
    batch = {
        "tokens": jnp.asarray([[1, 3, 8, 3, 2], [1, 3, 2, 0, 0]], jnp.int32),
        "segments": jnp.asarray([[1] * 5, [1, 1, 1, 0, 0]], jnp.int32),
        "positions": jnp.asarray([[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]], jnp.int32),
        "places": jnp.asarray([[1, 3], [1, 0]], jnp.int32),
        "labels": jnp.asarray([[10, 11], [12, 0]], jnp.int32),
        "weights": jnp.asarray([[1, 1], [1, 0]], jnp.float32),
        "seeds": jnp.zeros((2, 2), jnp.uint32),
    }
    scores = jnp.asarray([[-1.0, 2.0, 1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, 9.0, 9.0]], jnp.float32)
    model = Said(None, scores)
    monkeypatch.setattr(replacing, "sampled", lambda *_: jnp.asarray([[10, 30], [31, 32]], jnp.int32))
    sums = {"nll": jnp.asarray([3.0, 0.75], jnp.float32), "correct": jnp.asarray([1.0, 0.0], jnp.float32)}
    monkeypatch.setattr(
        "maxpretrain.objectives.cross_entropy.token_cross_entropy", lambda *_: (jnp.float32(3.75), sums)
    )
    loss = ELECTRA().bind(VOCABULARY).loss(model, {}, batch, None)
    assert model.read[0].tolist() == batch["tokens"].tolist()
    assert model.read[1].tolist() == [[1, 10, 8, 30, 2], [1, 31, 2, 0, 0]]
    # Called replaced: places 1 (which is the original) and 2 of the first row; replaced are 3 and, of the second row, 1.
    low, high = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    rtd = 4 * low + math.log1p(math.exp(2)) + high + 2 * high  # of the 8 real tokens
    pairs = {name: (float(a), float(b)) for name, (a, b) in loss.metrics.items()}
    assert pairs["rtd_loss"] == (pytest.approx(rtd), 8)
    assert pairs["mlm_loss"] == (3.75, 3)
    assert pairs["mlm_accuracy"] == (1, 3)
    assert pairs["replaced_token_accuracy"] == (4, 8)
    assert pairs["replaced_token_precision"] == (0, 2)
    assert pairs["replaced_token_recall"] == (0, 2)
    assert float(loss.weight) == 8
    assert float(loss.sum / loss.weight) == pytest.approx(3.75 / 3 + 50 * rtd / 8)


def test_initial_loss():
    """ln 30,522 + 50·ln 2 = 10.326 + 34.657."""
    objective = ELECTRA().bind(dataclasses.replace(VOCABULARY, size=30_522))
    model = objective.build(dataclasses.replace(SHAPE, vocab_size=30_522, num_layers=1, embed_dim=None, max_length=64))
    rows = [objective.example(text(30, i, high=30_522), generator(i)) for i in range(4)]
    loss = jax.jit(lambda p, b: objective.loss(model, p, b, None))(
        jax.jit(model.init)(jax.random.key(0)), stacked(rows, objective, 32)
    )
    assert float(loss.sum / loss.weight) == pytest.approx(44.98, abs=0.1)
    assert float(loss.metrics["mlm_loss"][0] / loss.metrics["mlm_loss"][1]) == pytest.approx(10.326, abs=0.1)


def test_a_sampler_that_is_always_right_replaces_nothing(monkeypatch):
    objective, model, params, _ = pair_of("electra")
    batch = batch_of(objective)
    monkeypatch.setattr(replacing, "sampled", lambda *_: batch["labels"])
    metrics = jax.jit(lambda p: objective.loss(model, p, batch, None).metrics)(params)
    assert float(metrics["replaced_token_recall"][1]) == 0  # no token is labelled as replaced
    assert float(metrics["replaced_token_precision"][0]) == 0
    assert float(metrics["replaced_token_accuracy"][1]) == 24 + 24 + 11 + 3 + 17 + 24 + 5 + 24


@pytest.mark.parametrize("kind", KINDS)
def test_who_learns_from_what(kind):
    """Of the four gradients: the two that must be nothing are exactly nothing, and a shared table has both."""
    objective, model, params, ask = pair_of(kind)
    batch = objective.normalized(batch_of(objective))
    of_mlm = named_leaves(ask(params, batch, 0.0)[1])
    of_rtd = named_leaves(ask(params, batch | {"mlm_scale": 0 * batch["mlm_scale"]})[1])
    shared = set(model.tables) if model.sharing == "shared" else set()
    for name in named_leaves(params):
        mlm, rtd = (float(np.abs(grads[name]).max()) for grads in (of_mlm, of_rtd))
        if name.startswith("generator/"):
            assert rtd == 0, name
        elif name not in shared:
            assert mlm == 0, name
    assert all(np.abs(grads[name]).max() > 0 for name in shared for grads in (of_mlm, of_rtd))
    # A softmax does not see a constant, such as what the key's bias adds to the scores of a query.
    unseen = ("attention/key/bias", "token_types/table")
    learned = [n for n in of_mlm if n.startswith("generator/") and not n.endswith(unseen)]
    assert min(float(np.abs(of_mlm[name]).max()) for name in learned) > 0
    assert float(np.abs(of_rtd["heads/replaced/out/kernel"]).max()) > 0
    if model.sharing == "disentangled":
        assert set(model.tables) == {"embed/table", "encoder/input/positions/table", "encoder/input/token_types/table"}
        assert all(np.abs(of_rtd[name]).max() > 0 for name in model.tables)
        assert all(np.abs(of_mlm[f"generator/{name}"]).max() > 0 for name in model.tables)


def rows_of(batch, rows):
    """The batch with nothing in all other rows."""
    return {name: jnp.zeros_like(x).at[rows].set(x[rows]) for name, x in batch.items()}


def test_microbatches_of_unequal_weight():
    objective, _, params, lossy = pair_of("electra")
    batch = objective.normalized(batch_of(objective))
    (_, whole), grads = lossy(params, batch)
    parts = [lossy(params, rows_of(batch, rows)) for rows in (slice(2), slice(2, 5), slice(5, 8))]
    sums = jax.tree.map(lambda *x: sum(x), *[(loss.sum, loss.weight) for (_, loss), _ in parts])
    np.testing.assert_allclose(sums, (whole.sum, whole.weight), rtol=1e-6)
    jax.tree.map(
        lambda whole, *x: np.testing.assert_allclose(sum(x), whole, rtol=2e-4, atol=2e-4), grads, *[g for _, g in parts]
    )
    # Both means, each over all of its own.
    means = {name: float(a / b) for name, (a, b) in whole.metrics.items() if b}
    assert float(whole.sum / whole.weight) == pytest.approx(means["mlm_loss"] + 50 * means["rtd_loss"], rel=1e-6)
    assert objective.combined(means) == pytest.approx(means["mlm_loss"] + 50 * means["rtd_loss"])


def test_on_eight_devices_as_on_one():
    objective = KINDS["deberta"]
    shape = dataclasses.replace(SHAPE, num_layers=1, model_dim=32, num_heads=8, mlp_dim=64, embed_dim=None)
    model = objective.build(shape, Execution(loss_chunk=8))
    params, batch = drawn(model, 0.1), batch_of(objective)
    ask = lambda p, b: objective.loss(model, p, b, None)  # noqa: E731
    alone = jax.jit(ask)(params, batch)
    layout = mesh.make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    with mesh.use(layout):
        placed = jax.device_put((params, batch), (layout.param_shardings(model.abstract), layout.batch_sharding()))
        found = jax.jit(ask)(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, alone)


def test_evaluation_is_the_same_whatever_the_batch():
    objective, _, params, lossy = pair_of("electra")
    batch = batch_of(objective)
    whole = lossy(params, objective.normalized(batch))[0][1].metrics
    halves = [
        lossy(params, objective.normalized(rows_of(batch, rows)))[0][1].metrics for rows in (slice(4), slice(4, 8))
    ]
    for name, (total, weight) in whole.items():
        assert sum(float(half[name][1]) for half in halves) == float(weight)
        np.testing.assert_allclose(sum(float(half[name][0]) for half in halves), total, rtol=1e-5, err_msg=name)


def test_padding_and_nothing_to_predict():
    objective, _, params, lossy = pair_of("electra")
    batch = objective.normalized(batch_of(objective))
    other = batch | {"tokens": jnp.where(batch["segments"] == 0, 17, batch["tokens"])}
    assert float(lossy(params, batch)[0][0]) == pytest.approx(float(lossy(params, other)[0][0]), rel=1e-6)
    (value, _), grads = lossy(params, jax.tree.map(jnp.zeros_like, batch))
    assert float(value) == 0
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_what_a_masked_token_is_does_not_reach_its_prediction():
    """The generator reads the mask: the original's own vector has no part in its score but as an output."""
    _, model, params, _ = pair_of("deberta")
    example = KINDS["deberta"].example(text(22), generator(0))  # masks only
    batch = stacked([example], KINDS["deberta"])
    other = dict(batch, labels=jnp.where(batch["weights"] > 0, 4 + (batch["labels"] + 5) % 36, 0))
    apply = jax.jit(
        lambda p, b: model.generator.apply(model.generator_params(p), b["tokens"], None, b["segments"]).hidden
    )
    np.testing.assert_array_equal(apply(params, batch), apply(params, other))
    own = model.generator_params(params)
    unseen = int(next(t for t in batch["labels"][0] if t not in batch["tokens"][0]))
    total = lambda p: jnp.sum(model.generator.apply(p, batch["tokens"], None, batch["segments"]).hidden)  # noqa: E731
    assert not np.any(jax.jit(jax.grad(total))(own)["embed"]["table"][unseen])


# Configs


def run_of(objective, **model):
    return Run(model=dataclasses.replace(SHAPE, **model), objective=objective, batch=BatchConfig(size=8, length=24))


def test_the_usual_configs_are_valid():
    for objective in (ELECTRA(), ELECTRA(generator_share=1.0, sharing="none"), RTD(), RTD(generator_share=0.5)):
        objective.validate(run_of(objective))
    run = run_of(ELECTRA(generator_share=1 / 3))
    run.objective.validate(run.replace(model=families.preset("electra-base")))


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        (ELECTRA(), {"heads": ()}, 'needs the head "replaced"; model.heads are none'),
        (ELECTRA(), {"heads": ("lm", "replaced")}, "leave it out of model.heads"),
        (ELECTRA(), {"architecture": "decoder"}, "objective ELECTRA needs an encoder; model.architecture is decoder"),
        (RTD(), {"architecture": "decoder"}, "objective RTD needs an encoder; model.architecture is decoder"),
        (RTD(), {"mask_decoder": True}, "model.mask_decoder is on"),
        (ELECTRA(rate=0.0), {}, "objective.rate is 0.0"),
        (ELECTRA(rtd_weight=-1.0), {}, "objective.rtd_weight is -1.0; it must be at least 0"),
        (ELECTRA(generator_share=1.5), {}, "objective.generator_share is 1.5; it must be above 0 and at most 1"),
        (ELECTRA(generator_depth=0.0), {}, "objective.generator_depth is 0.0; it must be above 0"),
        (ELECTRA(sharing="all"), {}, "objective.sharing is 'all'; it must be one of shared, none, disentangled"),
        (
            ELECTRA(generator_share=0.7),
            {},
            "objective.generator_share 0.7 and objective.generator_depth 1.0 make a generator for which model.model_dim 11",
        ),
    ],
    ids=str,
)
def test_refused(objective, model, message):
    with pytest.raises(UserError, match=message):
        objective.validate(run_of(objective, **model))


def test_a_vocabulary_without_a_mask():
    with pytest.raises(UserError, match="objective ELECTRA needs a mask token"):
        ELECTRA().bind(Vocabulary(size=10))


def test_work_of_both_networks():
    discriminator, small = ELECTRA().work(SHAPE, 128)
    assert (discriminator.model, discriminator.length, discriminator.predictions) == (SHAPE, 128, 0)
    assert (small.model.model_dim, small.length, small.predictions) == (4, 128, 19)
    assert RTD().work(SHAPE, 128)[1].model.num_layers == 2  # one layer of two passes
