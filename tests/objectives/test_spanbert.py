"""SpanBERT: lengths and places of spans, what stands for them, and the objective of their boundaries."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain import mesh
from maxpretrain.config import BatchConfig, MeshConfig, ModelConfig, Run
from maxpretrain.errors import UserError
from maxpretrain.models import build
from maxpretrain.models.heads import SPAN_POSITIONS
from maxpretrain.nn.stack import Execution
from maxpretrain.objectives import SpanBERT, masking, spanbert
from maxpretrain.train.step import accumulate
from maxpretrain.vocabulary import Vocabulary

SIZE = 62
STARTS = np.arange(SIZE) % 3 != 0
VOCABULARY = Vocabulary(
    size=SIZE, pad_id=0, bos_id=1, eos_id=2, mask_id=3, specials=(0, 1, 2, 3, 4), word_starts=STARTS
)
PLAIN = Vocabulary(size=SIZE, mask_id=3, specials=(3,))  # a token is a word; no bos, no eos
MODEL = ModelConfig(
    architecture="encoder", vocab_size=SIZE, num_layers=1, model_dim=16, num_heads=2, mlp_dim=32, max_length=32,
    heads=("lm", "span_boundary"), lm_transform=True, lm_bias=True, init_std=0.5,
)  # fmt: skip
SPANBERT = SpanBERT().bind(VOCABULARY)
SHARES = [0.2241, 0.1792, 0.1434, 0.1147, 0.0918, 0.0734, 0.0587, 0.0470, 0.0376, 0.0301]


def generator(seed=0):
    return np.random.default_rng(seed)


def window(length, seed=0, every=17):
    tokens = generator(seed).integers(5, SIZE, length).astype(np.int32)
    segments = 1 + np.arange(length, dtype=np.int32) // every
    tokens[every - 1 :: every] = 2
    return tokens, segments


def made(length, seed=0, objective=SPANBERT):
    tokens, segments = window(objective.raw_length(length), seed)
    return objective.example(tokens, generator(seed), segments), tokens, segments


def spans_of(places):
    """[first, last] of each run of places."""
    return [(int(run[0]), int(run[-1])) for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)]


def chi_square(found, shares):
    found, expected = np.asarray(found, float), np.sum(found) * np.asarray(shares) / np.sum(shares)
    return float(((found - expected) ** 2 / expected).sum())


def test_shares_of_span_lengths():
    shares = SPANBERT.span_shares()
    np.testing.assert_allclose(shares, SHARES, atol=5e-5)
    assert float((shares * np.arange(1, 11)).sum()) == pytest.approx(3.797, abs=5e-4)


def test_lengths_as_drawn():
    rng = generator()
    drawn = np.array([size for _ in range(2000) for _, size in SPANBERT._draws(5, rng)])
    assert chi_square(np.bincount(drawn, minlength=11)[1:], SHARES) < 27.9  # 9 degrees of freedom, 1 in 1000
    assert drawn.mean() == pytest.approx(3.797, abs=0.03)
    assert set(SpanBERT(max_span=2)._draws(1, rng)) == {(0, 1), (0, 2)}


def test_lengths_in_a_text():
    # So few spans that hardly two touch; the last of a row is cut to what is left, and stands for itself.
    objective = SpanBERT(rate=0.004).bind(PLAIN)
    tokens, counts = np.full(10_000, 30, np.int32), np.zeros(11)
    for seed in range(150):
        spans = spans_of(np.flatnonzero(objective.hidden(tokens, np.ones(10_000, np.int32), generator(seed))))
        lengths = [last - first + 1 for first, last in spans]
        assert sum(lengths) == 40
        np.add.at(counts, [n for n in lengths if n <= 10], 1)
    means = (counts * np.arange(11)).sum() / counts.sum()
    assert 3.4 < means < 3.8
    assert (np.abs(counts[1:] / counts.sum() - SHARES) < 0.04).all()


def test_the_budget_is_met_exactly():
    for length in range(12, 129, 4):
        example, _, _ = made(length, length)
        row = int((example["segments"] > 0).sum())
        assert int(example["weights"].sum()) == -(-3 * row // 20)  # ⌈0.15·n⌉
    assert SPANBERT.budget(512) == 77
    assert SPANBERT.fields(128)["places"] == ((20,), "int32")


def test_spans_begin_with_words_between_neighbours_of_their_document():
    cut = 0
    for seed in range(200):
        example, tokens, segments = made(64, seed)
        row = masking.framed(tokens, segments, VOCABULARY)
        whole, segment = row["tokens"], row["segments"]
        real = example["weights"] > 0
        places, left, right, inside = (example[name][real] for name in ("places", "left", "right", "span_places"))
        assert (whole[places] == example["labels"][real]).all()
        assert (whole[places] >= 5).all()
        spans = spans_of(places)
        for first, last in spans:
            own = (places >= first) & (places <= last)
            assert set(left[own].tolist()) == {first - 1}
            assert set(right[own].tolist()) == {last + 1}
            assert inside[own].tolist() == list(range(last - first + 1))
            assert segment[first - 1] == segment[first] == segment[last + 1]
            assert STARTS[whole[first]] or whole[first - 1] < 5  # what follows a special token begins a word
            cut += not (STARTS[whole[last + 1]] or whole[last + 1] < 5)
        assert not np.isin([first - 1 for first, _ in spans] + [last + 1 for _, last in spans], places).any()
        changed = np.flatnonzero(example["tokens"][: len(whole)] != whole)
        assert np.isin(changed, places).all()
    assert cut < 200  # at most the last drawn of a row ends within a word


def test_one_token_stays_on_each_side_without_bos_and_eos():
    objective = SpanBERT(rate=0.9).bind(PLAIN)
    for seed in range(20):
        tokens = generator(seed).integers(5, SIZE, 20)
        example = objective.example(tokens, generator(seed), np.repeat([1, 2], 10))
        assert example["places"][example["weights"] > 0].tolist() == [*range(1, 9), *range(11, 19)]
    for length in (1, 2):
        short = objective.example(np.arange(5, 5 + length), generator())
        assert short["weights"].sum() == 0
    assert objective.example(np.arange(5, 8), generator())["places"].tolist()[0] == 1


def test_what_stands_for_a_span_is_drawn_once():
    counts = np.zeros(3)
    for seed in range(3000):
        example, _, _ = made(64, seed)
        real = example["weights"] > 0
        places, labels = example["places"][real], example["labels"][real]
        for first, last in spans_of(places):
            own = (places >= first) & (places <= last)
            now, before = example["tokens"][first : last + 1], labels[own]
            masked, kept = (now == 3).all(), (now == before).all()
            assert masked or kept or ((now != 3).all() and (now >= 5).all())
            counts += [masked, kept, not masked and not kept]
    assert abs(counts[0] / counts.sum() - 0.8) < 0.015
    assert abs(counts[1] / counts.sum() - 0.1) < 0.015


def test_at_most_fifteen_targets_a_span():
    example, _, _ = made(128, 1, SpanBERT(rate=0.6, mask_documents=False).bind(VOCABULARY))
    places, real = example["places"], example["weights"] > 0
    longest = max(last - first + 1 for first, last in spans_of(places[real]))
    assert longest > 15
    assert example["span_places"].max() == 14
    for first, last in spans_of(places[real]):
        own = real & (places >= first) & (places <= last)
        assert example["span_weights"][own].sum() == min(15, last - first + 1)
        assert example["span_weights"][own][:15].all()
    assert not example["span_weights"][~real].any()


def test_shapes_dtypes_and_determinism():
    for length in (3, 16, 64):
        first, tokens, segments = made(length, 5)
        assert {k: (a.shape, a.dtype.name) for k, a in first.items()} == SpanBERT().fields(length)
    again, other = made(64, 5)[0], SPANBERT.example(tokens, generator(6), segments)
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["places"] != other["places"]).any()


# The loss. All batches have one shape.

HERE = build(MODEL, Execution(scan=False))


@pytest.fixture(scope="module")
def params():
    return jax.jit(HERE.init)(jax.random.key(0))


def rows(count=4, length=32, objective=SPANBERT):
    examples = [made(length, seed, objective)[0] for seed in range(count)]
    return {name: jnp.asarray(np.stack([row[name] for row in examples])) for name in examples[0]}


@functools.cache
def program():
    def total(params, batch):
        loss = SpanBERT().loss(HERE, params, SpanBERT().normalized(batch), None)
        return loss.sum, loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(abs(b).max()) + 1e-5)


def test_the_boundary_predicts_from_its_two_states_alone(params):
    batch = rows()
    hidden = jax.random.normal(jax.random.key(1), (4, 32, 16))
    chunked = build(MODEL, Execution(scan=False, loss_chunk=4))

    def plain(params, hidden):
        at = lambda side: jnp.take_along_axis(hidden, batch[side][..., None], 1)  # noqa: E731
        scores = HERE.span_logits(params, at("left"), at("right"), batch["span_places"])
        log_p = jnp.take_along_axis(jax.nn.log_softmax(scores), batch["labels"][..., None], -1)[..., 0]
        return -(log_p * batch["span_weights"]).sum()

    def ours(params, hidden, model):
        return spanbert.boundary_cross_entropy(model, params, hidden, batch)[0]

    expected, gradients = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(params, hidden)
    for model in (HERE, chunked):
        value, found = jax.jit(jax.value_and_grad(functools.partial(ours, model=model), argnums=(0, 1)))(params, hidden)
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
        close(found, gradients)
    reached = (np.asarray(found[1]) != 0).any(-1)
    for row in range(4):
        real = np.asarray(batch["weights"][row]) > 0
        neighbours = {int(p) for side in ("left", "right") for p in np.asarray(batch[side][row])[real]}
        assert set(np.flatnonzero(reached[row]).tolist()) == neighbours
        assert not reached[row][np.asarray(batch["places"][row])[real]].any()  # inside, exactly nothing


def test_scores_of_all_targets_never_exist():
    # 32 targets of 4 rows, 4 of each at a time.
    model = build(dataclasses.replace(MODEL, vocab_size=997), Execution(scan=False, loss_chunk=16))
    params = jax.tree.map(lambda s: s.struct, model.abstract, is_leaf=lambda x: hasattr(x, "struct"))
    fields = SpanBERT(rate=0.25).fields(32)
    batch = {name: jax.ShapeDtypeStruct((4, *shape), jnp.dtype(dtype)) for name, (shape, dtype) in fields.items()}
    text = jax.jit(lambda p, b: SpanBERT().loss(model, p, b, None).sum).lower(params, batch).as_text()
    assert "4x4x997xf32" in text
    assert "4x8x997xf32" not in text


def test_both_means_are_exact_in_microbatches(params):
    batch = rows()
    batch["span_weights"] = batch["span_weights"].at[1, 1:].set(0.0)  # unequal parts
    (_, whole), gradient = program()(params, batch)
    fn = lambda params, batch, key: SpanBERT().loss(HERE, params, batch, None)  # noqa: E731
    parts, of_parts = jax.jit(lambda p, b: accumulate(fn, p, SpanBERT().normalized(b), jax.random.key(0), 2))(
        params, batch
    )
    said = {name: float(total / weight) for name, (total, weight) in whole.metrics.items()}
    assert set(said) == {"accuracy", "mlm_loss", "span_boundary_loss", "span_boundary_accuracy"}
    assert float(whole.metrics["span_boundary_loss"][1]) == float(batch["span_weights"].sum())
    for loss in (whole, parts):
        assert float(loss.sum / loss.weight) == pytest.approx(said["mlm_loss"] + said["span_boundary_loss"], rel=1e-5)
    close(of_parts, gradient)
    assert SpanBERT().combined(said) == pytest.approx(said["mlm_loss"] + said["span_boundary_loss"])
    assert SpanBERT(boundary_weight=0.5).combined({"mlm_loss": 3.0, "span_boundary_loss": 4.0}) == 5.0
    assert SpanBERT(boundary_weight=0.0).combined({"mlm_loss": 3.0}) == 3.0


def test_each_decoder_has_its_own_bias(params):
    batch = rows()
    no_spans = batch | {"span_weights": jnp.zeros_like(batch["span_weights"])}
    _, both = program()(params, batch)
    _, alone = program()(params, no_spans)
    assert (np.asarray(both["heads"]["span_boundary"]["bias"]) != 0).all()
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(alone["heads"]["span_boundary"]))
    np.testing.assert_array_equal(both["lm"]["bias"], alone["lm"]["bias"])


def test_nothing_to_predict_is_zero_and_not_nan(params):
    batch = {name: jnp.zeros((4, *shape), jnp.dtype(dtype)) for name, (shape, dtype) in SpanBERT().fields(32).items()}
    (value, _), gradient = program()(params, batch)
    assert float(value) == 0.0
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))


def test_the_same_on_a_mesh(params):
    batch = rows()
    (value, _), gradient = program()(params, batch)
    layout = mesh.make_layout(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    with mesh.use(layout):
        spread = jax.device_put(params, layout.param_shardings(HERE.abstract))
        placed = layout.global_batch({name: np.asarray(array) for name, array in batch.items()}, 4)
        (other, _), other_gradient = jax.jit(program().__wrapped__)(spread, placed)
    assert float(other) == pytest.approx(float(value), rel=1e-5)
    close(other_gradient, gradient)


# What is refused


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        (SpanBERT(geometric=0.0), r"objective\.geometric is 0\.0"),
        (SpanBERT(max_span=0), r"objective\.max_span is 0"),
        (SpanBERT(max_targets=0), r"objective\.max_targets is 0"),
        (SpanBERT(max_targets=201), "must be between 1 and 200"),
        (SpanBERT(boundary_weight=-1.0), r"objective\.boundary_weight is -1\.0"),
        (SpanBERT(rate=1.5), r"objective\.rate is 1\.5"),
    ],
)
def test_fields_are_checked(objective, sentence):
    with pytest.raises(UserError, match=sentence):
        objective.validate(Run(objective=objective, model=MODEL, batch=BatchConfig(length=32)))


def test_the_head_is_asked_for():
    without = dataclasses.replace(MODEL, heads=("lm",))
    SpanBERT().validate(Run(model=MODEL, batch=BatchConfig(length=32)))
    SpanBERT(boundary_weight=0.0).validate(Run(model=without, batch=BatchConfig(length=32)))
    with pytest.raises(
        UserError,
        match=r'objective SpanBERT needs the head "span_boundary"; model\.heads are lm; add it to model\.heads',
    ):
        SpanBERT().validate(Run(model=without, batch=BatchConfig(length=32)))
    assert spanbert.SPAN_POSITIONS == SPAN_POSITIONS == 200
    assert not SpanBERT.perplexity
    assert not SpanBERT.whole_text
