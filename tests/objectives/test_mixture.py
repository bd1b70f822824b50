"""Mixtures: which member makes an example, how the members' batches merge, the schedule, and the one loss of all."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain import configio
from maxpretrain.config import BatchConfig, ModelConfig, Run, validate
from maxpretrain.data.pipeline import _examples
from maxpretrain.errors import UserError
from maxpretrain.models import build
from maxpretrain.objectives import BART, CLM, MLM, UL2, Mixture, SpanBERT, SpanCorruption
from maxpretrain.objectives.prefix import PrefixLM
from maxpretrain.overrides import render_fields
from maxpretrain.vocabulary import Vocabulary

V, EOS, MASK = 64, 1, 2
VOCABULARY = Vocabulary(size=V, eos_id=EOS, mask_id=MASK, specials=(0, 1, 2), sentinels=tuple(range(63, 43, -1)))
DECODER = ModelConfig(vocab_size=V, num_layers=1, model_dim=16, num_heads=2, max_length=32)
SEQ2SEQ = dataclasses.replace(DECODER, architecture="encoder-decoder", decoder_start_id=0)
ENCODER = dataclasses.replace(DECODER, architecture="encoder")


def rng(seed=0):
    return np.random.default_rng(seed)


def parameters(model):
    """Some, drawn by numpy: nothing is compiled."""
    draw = lambda spec: jnp.asarray(rng(9).normal(0, 0.05, spec.struct.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, model.abstract, is_leaf=lambda x: hasattr(x, "struct"))


def text(length, seed=0):
    return rng(seed).integers(3, 40, length).astype(np.int32)


def mixed(*objectives, **fields):
    return Mixture(objectives=objectives, **fields).bind(VOCABULARY)


def batch_of(objective, rows, length):
    """Rows as the pipeline makes them."""
    raw = objective.raw_length(length)
    tokens = np.stack([text(raw, row) for row in range(rows)])
    return _examples(objective, length, tokens, np.ones_like(tokens), (7, np.arange(rows)))


# Which member


def test_members_come_by_their_weights():
    objective = mixed(SpanCorruption(), BART(), SpanCorruption(density=0.5), weights=(0.5, 0.2, 0.3))
    seen = Counter(int(objective.example(text(20), rng(seed))["member"]) for seed in range(1000))
    expected = {0: 500, 1: 200, 2: 300}
    assert sum((seen[i] - n) ** 2 / n for i, n in expected.items()) < 13.8  # χ², 2 degrees of freedom, p = .001
    equal = mixed(SpanCorruption(), BART())
    seen = Counter(int(equal.example(text(20), rng(seed))["member"]) for seed in range(1000))
    assert seen[0] == pytest.approx(500, abs=55)


def test_a_row_is_an_example_of_its_member():
    objective = mixed(BART(rotate=1.0), BART())
    for seed in range(20):
        made = objective.example(text(12), rng(seed))
        generator = rng(seed)
        generator.random()  # what chose the member
        alone = objective.members[int(made.pop("member"))].example(text(12), generator)
        assert {n: a.tolist() for n, a in made.items()} == {n: a.tolist() for n, a in alone.items()}


def test_a_shorter_member_takes_some_part():
    """Raw lengths for inputs of 32: 30 (BART) and 34 (span corruption: 5 of noise in 2 spans)."""
    objective = mixed(BART(infill=0.0, permute_sentences=0.0, mask=0.1), SpanCorruption())
    assert [member.raw_length(32) for member in objective.members] == [30, 34]
    assert objective.raw_length(32) == 34
    tokens, segments = np.arange(3, 37, dtype=np.int32), np.repeat([4, 5], 17).astype(np.int32)
    first = set()
    for seed in range(200):
        made = objective.example(tokens, rng(seed), segments)
        if made["member"] == 0:
            labels = made["labels"].tolist()
            assert labels == [*range(labels[0], labels[0] + 30), EOS]
            first.add(labels[0])
    assert first == set(range(3, 8))


def test_fields_merge_to_the_largest():
    objective = mixed(BART(), SpanCorruption())
    assert objective.fields(32) == {
        "tokens": ((32,), "int32"),
        "segments": ((32,), "int32"),
        "decoder_segments": ((32,), "int32"),
        "labels": ((32,), "int32"),
        "weights": ((32,), "float32"),
        "member": ((), "int32"),
    }
    data = batch_of(objective, 40, 32)
    assert {name: (array.shape[1:], array.dtype.name) for name, array in data.items()} == objective.fields(32)
    assert set(data["member"].tolist()) == {0, 1}
    with_prefix = mixed(CLM(), PrefixLM())
    assert with_prefix.fields(16).keys() == {*PrefixLM().fields(16), "member"}
    assert (with_prefix.raw_length(16), with_prefix.overlap) == (17, 1)


def test_what_the_members_share_is_theirs():
    assert mixed(CLM(), CLM(mask_documents=True)).whole_text
    assert not mixed(CLM(), PrefixLM()).whole_text
    assert mixed(CLM(), PrefixLM()).perplexity
    assert not mixed(MLM(), MLM(rate=0.3)).perplexity
    work = mixed(BART(), SpanCorruption()).work(SEQ2SEQ, 32)
    assert [tuple(w[1:4]) for w in work] == [(32, 32, 32)]


def test_names():
    assert mixed(SpanCorruption(), BART(), SpanCorruption()).titles == (
        "span_corruption_1",
        "bart",
        "span_corruption_2",
    )
    assert mixed(CLM(), PrefixLM()).titles == ("clm", "prefix_lm")
    assert mixed(CLM(), CLM(), names=("a", "a")).titles == ("a", "a")


def test_symbols_are_all_and_end_with_the_first_sentinel():
    mixture = Mixture(
        objectives=(SpanCorruption(num_sentinels=2), BART(), UL2(num_sentinels=3), SpanCorruption(num_sentinels=1))
    )
    assert mixture.symbols() == ("<mask>", "[NLU]", "[NLG]", "[S2S]", "<extra_id_2>", "<extra_id_1>", "<extra_id_0>")


def test_binding_asks_for_what_each_member_needs():
    with pytest.raises(UserError, match="objective SpanCorruption needs sentinels"):
        Mixture(objectives=(BART(), SpanCorruption())).bind(dataclasses.replace(VOCABULARY, sentinels=()))
    assert all(member.vocabulary is VOCABULARY for member in mixed(BART(), SpanCorruption()).members)


# The schedule


def test_schedule_is_linear_between_its_points():
    objective = mixed(
        CLM(), PrefixLM(), weights=(0.5, 0.5), schedule=((10, (1.0, 0.0)), (20, (0.5, 0.5)), (30, (0.0, 1.0)))
    )
    shares = {step: objective.at(step).shares for step in (0, 10, 15, 20, 22, 30, 99)}
    expected = {0: (1, 0), 10: (1, 0), 15: (0.75, 0.25), 20: (0.5, 0.5), 22: (0.4, 0.6), 30: (0, 1), 99: (0, 1)}
    for step, weights in expected.items():
        assert shares[step] == pytest.approx(weights)
    early = {int(objective.at(0).example(text(17), rng(seed))["member"]) for seed in range(50)}
    late = {int(objective.at(30).example(text(17), rng(seed))["member"]) for seed in range(50)}
    assert (early, late) == ({0}, {1})
    # Evaluation has no step: by `weights`.
    whole = {int(objective.measured().example(text(17), rng(seed))["member"]) for seed in range(50)}
    assert whole == {0, 1}
    plain = mixed(CLM(), PrefixLM())
    assert plain.at(7) is plain


# The loss


@pytest.fixture(scope="module")
def decoder():
    model = build(DECODER)
    return model, parameters(model)


def compiled(objective, model):
    return jax.jit(lambda params, data: objective.loss(model, params, data, None))


def check_parts(objective, model, params, length, rows=12):
    """One pass gives the sum of what the members give for their own rows; their metrics are those."""
    data = jax.tree.map(jnp.asarray, batch_of(objective, rows, length))
    whole = compiled(objective, model)(params, data)
    total = weight = 0.0
    for number, (member, title) in enumerate(zip(objective.members, objective.titles, strict=True)):
        its = {
            name: data[name][:, : shape[0]] * (data["member"] == number)[:, None].astype(data[name].dtype)
            for name, (shape, dtype) in member.fields(length).items()
        }
        alone = compiled(member, model)(params, its)
        assert float(alone.weight) > 0
        np.testing.assert_allclose(whole.metrics[f"loss_{title}"], (alone.sum, alone.weight), rtol=1e-5)
        total, weight = total + float(alone.sum), weight + float(alone.weight)
    np.testing.assert_allclose([whole.sum, whole.weight], [total, weight], rtol=1e-5)
    return whole


def test_decoders(decoder):
    model, params = decoder
    whole = check_parts(mixed(CLM(), PrefixLM()), model, params, 16)
    assert set(whole.metrics) == {"accuracy", "loss_clm", "loss_prefix_lm"}


def test_encoders():
    model = build(ENCODER)
    params = parameters(model)
    whole = check_parts(mixed(MLM(), MLM(rate=0.4, count="roberta"), names=("low", "high")), model, params, 24)
    assert set(whole.metrics) == {"accuracy", "loss_low", "loss_high"}


def test_encoder_decoders_regularized():
    model = build(SEQ2SEQ)
    params = parameters(model)
    objective = mixed(BART(), SpanCorruption())
    whole = check_parts(objective, model, params, 24)
    data = jax.tree.map(jnp.asarray, batch_of(objective, 12, 24))
    smooth = mixed(BART(label_smoothing=0.2), SpanCorruption(label_smoothing=0.2))
    other = compiled(smooth, model)(params, data)
    assert float(other.sum) != float(whole.sum)
    # The losses of the members are cross entropies, whatever regularizes the sum.
    np.testing.assert_allclose(other.metrics["cross_entropy"][0], whole.sum, rtol=1e-5)
    np.testing.assert_allclose(other.metrics["loss_bart"], whole.metrics["loss_bart"], rtol=1e-5)
    assert smooth.measured() == objective


def test_no_member_no_weight(decoder):
    model, params = decoder
    objective = mixed(CLM(), PrefixLM(), names=("a", "b"))
    data = jax.tree.map(jnp.asarray, batch_of(objective, 12, 16))
    data["member"] = jnp.zeros_like(data["member"])
    metrics = compiled(objective, model)(params, data).metrics
    assert [float(x) for x in metrics["loss_b"]] == [0.0, 0.0]
    assert float(metrics["loss_a"][1]) == float(data["weights"].sum())


# The config, and what is refused


def run(*objectives, model=SEQ2SEQ, length=32, **fields):
    return Run(
        model=dataclasses.replace(model, vocab_size=None),
        objective=Mixture(objectives=objectives, **fields),
        batch=BatchConfig(length=length),
    )


def test_the_config_comes_back_and_takes_flags():
    schedule = ((0, (1.0, 0.0)), (100, (0.5, 0.5)))
    a = run(SpanCorruption(density=0.3), BART(rotate=0.5), weights=(0.25, 0.75), schedule=schedule, names=("a", "b"))
    validate(a)
    assert configio.from_json(configio.to_json(a)) == a
    assert configio.checked(a) == a
    b = configio.apply_overrides(a, ["--objective.weights", "0.5", "0.5", "--steps", "7"])
    assert b.objective == a.objective.replace(weights=(0.5, 0.5))
    assert b.steps == 7
    with pytest.raises(
        UserError, match=r"^--objective\.schedule holds several values in each of its items; give it in"
    ):
        configio.apply_overrides(a, ["--objective.schedule", "1"])
    for name in ("objectives", "schedule"):
        assert f"--objective.{name}" not in render_fields(a)


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (run(), r"^objective.objectives is empty; give the objectives to mix, such as \(CLM\(\), PrefixLM\(\)\)$"),
        (
            run(BART(), SpanCorruption(), weights=(0.5, 0.6)),
            r"^objective.weights add up to 1\.1; they must add up to 1$",
        ),
        (run(BART(), weights=(0.5, 0.5)), "^objective.weights has 2 numbers for 1 objectives; give one each$"),
        (
            run(BART(), SpanCorruption(), weights=(1.0, 0.0)),
            "^objective.weights has 0; a weight must be above 0$",
        ),
        (
            run(BART(), SpanCorruption(), schedule=((0, (0.5, 0.5)), (9, (0.5, 0.4)))),
            r"^objective.schedule\[1\]'s weights add up to 0\.9; they must add up to 1$",
        ),
        (
            run(BART(), SpanCorruption(), schedule=((9, (0.5, 0.5)), (9, (1.0, 0.0)))),
            r"^objective.schedule has the steps \[9, 9\]; they must be at least 0, and rise$",
        ),
        (run(BART(), names=("a", "b")), "^objective.names has 2 names for 1 objectives; give one each$"),
        (
            run(MLM(), CLM(), model=DECODER),
            "^objective MLM needs an encoder; model.architecture is decoder$",
        ),
        (
            run(BART(), SpanCorruption(density=2.0)),
            r"^objective.objectives\[1\]\.density is 2\.0; it must be between 0 and 1$",
        ),
        (
            run(BART(), SpanCorruption(z_loss=0.1)),
            r"^objective Mixture mixes BART and SpanCorruption with z_loss 0 and 0\.1; give all members the same$",
        ),
        (
            run(MLM(), SpanBERT(), model=dataclasses.replace(ENCODER, heads=("lm", "span_boundary"))),
            "^objective Mixture mixes losses that are the cross entropy of labels; SpanBERT also reads left, so train it",
        ),
        (
            run(PrefixLM(), PrefixLM()),
            "^objective Mixture cannot mix PrefixLM on an encoder-decoder; use a decoder, or train it alone$",
        ),
    ],
)
def test_bad_input(a, message):
    with pytest.raises(UserError, match=message):
        validate(a)
