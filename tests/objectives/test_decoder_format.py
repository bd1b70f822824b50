"""Span corruption, denoising and UL2 in one row of a decoder: its layout, what may be seen, the loss, and generation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.config import BatchConfig, ModelConfig, Run, validate
from maxpretrain.data.pipeline import _examples
from maxpretrain.data.tokenizer import Characters
from maxpretrain.errors import UserError
from maxpretrain.generate import Generator
from maxpretrain.infill import said
from maxpretrain.models import build
from maxpretrain.objectives import BART, CLM, UL2, Mixture, SpanCorruption
from maxpretrain.objectives.base import Reading
from maxpretrain.objectives.prefix import PrefixLM
from maxpretrain.prompts import Row
from maxpretrain.vocabulary import Vocabulary, sentinels

V, EOS, MASK = 400, 1, 2
VOCABULARY = Vocabulary(
    size=V, eos_id=EOS, mask_id=MASK, specials=(0, 1, 2), sentinels=tuple(range(V - 1, V - 129, -1)), modes=(3, 4, 5)
)
MODEL = ModelConfig(vocab_size=V, num_layers=2, model_dim=16, num_heads=2, position="rope", max_length=32)
FORMATS = ("prefix", "causal")


def rng(seed=0):
    return np.random.default_rng(seed)


def text(length, seed=0):
    return rng(seed).integers(10, 250, length).astype(np.int32)


def batch_of(objective, rows, length):
    """Rows as the pipeline makes them."""
    raw = objective.raw_length(length)
    tokens = np.stack([text(raw, row) for row in range(rows)])
    made = _examples(objective, length, tokens, np.ones_like(tokens), (7, np.arange(rows)))
    return jax.tree.map(jnp.asarray, made)


@pytest.fixture(scope="module")
def network():
    model = build(MODEL)
    draw = lambda spec: jnp.asarray(rng(9).normal(0, 0.3, spec.struct.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, model.abstract, is_leaf=lambda x: hasattr(x, "struct"))

    @jax.jit
    def nll(params, tokens, labels, segments, prefix):
        """Of every place of a row, by the plain formula."""
        logits = model.logits(params, model.apply(params, tokens, segments=segments, prefix=prefix).hidden)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]

    return model, params, nll


# The layout


@pytest.mark.parametrize("objective", [SpanCorruption(), BART(), UL2()], ids=lambda o: type(o).__name__)
def test_a_row_is_the_inputs_and_then_the_targets(objective):
    apart = objective.bind(VOCABULARY)
    row = objective.replace(decoder_format="prefix").bind(VOCABULARY)
    for seed in range(20):
        tokens = text(60, seed)
        if isinstance(objective, UL2):  # the same part of the window
            number = int(row.example(tokens, rng(seed))["denoiser"])
            apart, row = apart.members[number], row.members[number]
        there, made = apart.example(tokens, rng(seed)), row.example(tokens, rng(seed))
        inputs, targets = there["tokens"].tolist(), there["labels"].tolist()
        assert made["tokens"].tolist() == inputs + targets[:-1]
        assert made["labels"].tolist() == targets
        assert made["prefix"].tolist() == [True] * len(inputs) + [False] * (len(targets) - 1)
        # The last input, which is eos, predicts the first target; each target predicts the next.
        assert inputs[-1] == EOS
        assert made["places"].tolist() == list(range(len(inputs) - 1, len(inputs) - 1 + len(targets)))
        assert made["weights"].tolist() == [1.0] * len(targets)
        apart, row = objective.bind(VOCABULARY), objective.replace(decoder_format="prefix").bind(VOCABULARY)


@pytest.mark.parametrize(
    "objective",
    [SpanCorruption(), SpanCorruption(density=0.5), SpanCorruption(density=0.15, mean_span=8.0), BART(), UL2()],
)
def test_rows_are_full_and_nothing_is_cut_off(objective):
    row = objective.replace(decoder_format="causal").bind(VOCABULARY)
    for length in (16, 31, 64, 200):
        fields = row.fields(length)
        longest = 0
        for seed in range(30):
            made = row.example(text(row.raw_length(length), seed), rng(seed))
            assert all(len(array) <= fields[name][0][0] for name, array in made.items() if array.ndim)
            longest = max(longest, len(made["tokens"]))
            assert made["tokens"][0] != EOS
            assert made["labels"][-1] == EOS
        if isinstance(objective, SpanCorruption) and length == 200:
            assert longest >= 198  # a longer text would be 3 more, in inputs and targets together


@pytest.mark.parametrize("format", ["none", "prefix"])
def test_shorter_windows_fit_too(format):
    """At lengths where a token more of noise takes the only span away, a window with an eos in it needs the most room."""
    for fields in ({}, {"mean_span": 8.0}, {"mean_span": 64.0}, {"density": 0.5, "mean_span": 64.0}, {"density": 0.3}):
        row = SpanCorruption(decoder_format=format, **fields).bind(VOCABULARY)
        for length in range(7, 40):
            room = {name: shape[0] for name, (shape, _) in row.fields(length).items()}
            for size in range(1, row.raw_length(length) + 1):
                made = row.example(text(size), rng(size))
                assert all(len(array) <= room[name] for name, array in made.items()), (fields, length, size)
    members = UL2(decoder_format=format).bind(VOCABULARY)
    for length in range(9, 24):
        batch = text(members.raw_length(length))
        for eos in range(0, len(batch), 3):
            batch[eos] = EOS
            _examples(members, length, batch[None], np.ones_like(batch[None]), (7, np.arange(1)))


def test_lengths_of_one_row():
    """Of 512: inputs of 419 and targets of 94, with the last of these not read (419 + 94 − 1 = 512)."""
    row = SpanCorruption(decoder_format="prefix")
    assert (row.input_length(512), row.target_length(512), row.raw_length(512)) == (419, 94, 465)
    counts = row.counts(465)
    assert (counts.inputs, counts.targets) == (419, 94)
    assert SpanCorruption().input_length(512) == 512
    assert [tuple(w[1:4]) for w in row.work(MODEL, 512)] == [(512, 0, 94)]
    both, causal = row.fields(512), SpanCorruption(decoder_format="causal").fields(512)
    assert both == causal | {"prefix": ((512,), "bool")}
    assert causal["places"] == causal["labels"] == ((94,), "int32")


# The loss


@pytest.mark.parametrize("format", FORMATS)
def test_loss_is_that_of_the_plain_formula(network, format):
    model, params, nll = network
    objective = SpanCorruption(decoder_format=format).bind(VOCABULARY)
    batch = batch_of(objective, 3, 32)
    prefix = batch.get("prefix", jnp.zeros((3, 32), bool))
    # Each token's own label is the one after it; the last label of a row stands in no token.
    after = np.pad(np.asarray(batch["tokens"]), [(0, 0), (0, 1)])[:, 1:]
    predicts = np.zeros((3, 32), bool)
    for row in range(3):
        count = int(batch["weights"][row].sum())
        places = np.asarray(batch["places"])[row, :count]
        predicts[row, places] = True
        assert after[row, places[:-1]].tolist() == np.asarray(batch["labels"])[row, : count - 1].tolist()
        after[row, places[-1]] = EOS
    plain = nll(params, batch["tokens"], jnp.asarray(after), batch["segments"], prefix)
    loss = jax.jit(lambda params: objective.loss(model, params, batch, None))(params)
    np.testing.assert_allclose(loss.sum, np.asarray(plain)[predicts].sum(), rtol=1e-5)
    assert float(loss.weight) == predicts.sum()


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_reads_its_label(network, format):
    """The slope of each prediction with respect to the vectors read: inputs by format, targets only from before."""
    model, params, _ = network
    objective = SpanCorruption(decoder_format=format).bind(VOCABULARY)
    batch = batch_of(objective, 1, 32)
    prefix = batch.get("prefix")
    inputs = int(batch["places"][0, 0]) + 1

    @jax.jit
    def slopes(vectors):
        def hidden(vectors):
            net = model._template.bind(params)
            return net.decoder(vectors, segments=batch["segments"], prefix=prefix)[0][0]

        slope = jax.jacrev(lambda v: (hidden(v) ** 2).sum(-1))(vectors)  # [T, 1, T, D]
        return jnp.abs(slope[:, 0]).sum(-1) > 0

    sees = np.asarray(slopes(params["embed"]["table"][batch["tokens"]]))
    real = int(batch["segments"].sum())
    expected = np.tri(real, dtype=bool)
    if format == "prefix":
        expected[:inputs, :inputs] = True
    np.testing.assert_array_equal(sees[:real, :real], expected)


# Mixtures with what a decoder learns besides


def test_a_mixture_with_the_causal_loss(network):
    model, params, _ = network
    members = (CLM(mask_documents=False), SpanCorruption(decoder_format="prefix"), PrefixLM())
    objective = Mixture(objectives=members).bind(VOCABULARY)
    validate(Run(model=dataclasses.replace(MODEL, vocab_size=None), objective=Mixture(objectives=members)))
    # A prompt with a sentinel is answered, as the second member learns to; others are continued, as the first and third learn.
    assert objective.reading(True) == Reading(both_ways=True, answers=True)
    assert objective.reading(False) == Reading()
    assert Mixture(objectives=members[1:2]).reading(False) == UL2(decoder_format="prefix").reading(False)
    assert UL2(decoder_format="prefix").reading(True) == Reading(both_ways=True, answers=True)
    assert UL2().reading(True) == Reading()
    fields = objective.fields(32)
    assert fields["places"] == fields["labels"] == fields["positions"] == ((32,), "int32")
    batch = batch_of(objective, 8, 32)
    assert {name: (array.shape[1:], array.dtype.name) for name, array in batch.items()} == fields
    assert set(batch["member"].tolist()) == {0, 1, 2}
    measure = jax.jit(lambda o, batch: o.loss(model, params, batch, None), static_argnums=0)
    together = measure(objective, batch)
    each = {0: 0.0, 1: 0.0, 2: 0.0}
    for number, member in enumerate(objective.members):
        rows = np.asarray(batch["member"]) == number
        names = member.fields(32)
        own = {n: a[rows][:, : names[n][0][0]] for n, a in batch.items() if n in names}
        if "places" not in names:
            np.testing.assert_array_equal(batch["places"][rows], np.tile(np.arange(32), (rows.sum(), 1)))
        each[number] = float(jax.jit(lambda b, m=member: m.loss(model, params, b, None).sum)(own))
    np.testing.assert_allclose(together.sum, sum(each.values()), rtol=1e-5)
    for number, name in enumerate(("clm", "span_corruption", "prefix_lm")):
        np.testing.assert_allclose(together.metrics[f"loss_{name}"][0], each[number], rtol=1e-5)


def test_a_mixture_may_be_a_member():
    """UL2 for a quarter of the examples, each of its seven denoisers for a seventh of that."""
    ul2 = UL2(decoder_format="prefix")
    mixture = Mixture(objectives=(CLM(), ul2), weights=(0.75, 0.25), schedule=((0, (1.0, 0.0)), (10, (0.5, 0.5))))
    validate(Run(model=dataclasses.replace(MODEL, vocab_size=None), objective=mixture, batch=BatchConfig(length=32)))
    assert mixture.titles == ("clm", *["ul2"] * 7)
    assert mixture.shares == pytest.approx((0.75, *[0.25 / 7] * 7))
    assert mixture.at(5).shares == pytest.approx((0.75, *[0.25 / 7] * 7))
    assert mixture.at(0).shares == (1.0, *[0.0] * 7)
    assert mixture.symbols()[:3] == ("[NLU]", "[NLG]", "[S2S]")
    assert mixture.reading(True) == Reading(both_ways=True, answers=True)
    assert mixture.reading(False) == Reading()
    bound = mixture.bind(VOCABULARY)
    batch = batch_of(bound, 60, 32)
    members = np.asarray(batch["member"])
    assert (members == 0).sum() == pytest.approx(45, abs=12)
    assert (np.asarray(batch["tokens"])[members == 7, 0] == 5).all()  # S begins with [S2S]
    with pytest.raises(UserError, match="UL2 begins its inputs with"):
        mixture.bind(dataclasses.replace(VOCABULARY, modes=()))
    bad = Mixture(objectives=(CLM(), UL2(decoder_format="prefix", weights=(0.5, 0.5))))
    with pytest.raises(
        UserError, match=r"^objective.objectives\[1\].weights has 2 numbers for 7 objectives; give one each$"
    ):
        validate(Run(model=dataclasses.replace(MODEL, vocab_size=None), objective=bad))


# What it says


LETTERS = Characters("abcdefghijklmnopqrstuvwxyz .", ["</s>"], sentinels(3))  # eos 28, sentinels 31, 30, 29


@pytest.mark.parametrize("format", FORMATS)
def test_answers_come_after_the_prompt_and_eos(format):
    model = build(dataclasses.replace(MODEL, vocab_size=32))
    draw = lambda spec: jnp.asarray(rng(3).normal(0, 0.5, spec.struct.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, model.abstract, is_leaf=lambda x: hasattr(x, "struct"))
    objective = SpanCorruption(decoder_format=format)
    assert objective.answers
    prompts = ["the <extra_id_0> sat", "a"]

    @jax.jit
    def following(tokens, length, at):
        prefix = (jnp.arange(32)[None] < length) if format == "prefix" else None
        return model.logits(params, model.apply(params, tokens[None], prefix=prefix).hidden)[0, at].argmax()

    def whole(prompt, count=6):
        ids = [*LETTERS.encode_marked(prompt).tolist(), 28]
        given = len(ids)
        while len(ids) < given + count and ids[given:][-1:] != [28]:
            padded = np.pad(np.array(ids), (0, 32 - len(ids)))
            ids.append(int(following(padded, given, len(ids) - 1)))
        return [i for i in ids[given:] if i != 28]

    generator = Generator(model, LETTERS, objective)
    ids = lambda generator, prompts: [row.made for row in generator.rows(params, prompts, max_new_tokens=6)]  # noqa: E731
    made = ids(generator, prompts)
    assert made == [whole(prompt) for prompt in prompts]
    assert generator(params, prompts, max_new_tokens=6) == [LETTERS.decode(ids) for ids in made]
    assert said(generator, params, prompts[:1], max_new_tokens=6)[0].startswith("the ")
    with pytest.raises(
        UserError, match="a suffix is for a prompt that the network goes on from, and it answers this one"
    ):
        generator(params, prompts[:1], max_new_tokens=6, suffixes=["b"])
    # Beside a prompt that goes on, each is as it would be alone.
    mixed = Generator(model, LETTERS, Mixture(objectives=(CLM(), objective)))
    assert ids(mixed, ["the", prompts[0]]) == [ids(Generator(model, LETTERS), ["the"])[0], made[0]]


def test_a_prompt_begins_as_the_rows_do():
    """Those of BART have bos around inputs and targets; the rows of span corruption none."""
    words = Characters("abcdefg", ["<s>", "</s>", "<mask>"])  # bos 7, eos 8, mask 9
    vocabulary = Vocabulary.of(words)
    for format, architecture in (("prefix", "decoder"), ("none", "encoder-decoder")):
        objective = BART(decoder_format=format, infill=0.0, permute_sentences=0.0, mask=0.01).bind(vocabulary)
        made = objective.example(words.encode("abcd"), rng())
        row = Row(words, "abcd", 8 if format == "none" else None, reading=objective.reading(False))
        given = row.source if format == "none" else row.ids
        assert given == made["tokens"][:6].tolist() == [7, 0, 1, 2, 3, 8], architecture
    assert Row(words, "ab", 8, reading=SpanCorruption().reading(False)).source == [0, 1, 8]


# What is refused


def run(objective, architecture="decoder", length=64, **model):
    start = 0 if architecture == "encoder-decoder" else None
    config = dataclasses.replace(MODEL, vocab_size=None, architecture=architecture, decoder_start_id=start, **model)
    return Run(model=config, objective=objective, batch=BatchConfig(length=length))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            run(SpanCorruption()),
            r"^objective SpanCorruption on a decoder needs an input format; set objective.decoder_format to prefix \(inputs read in "
            r"both directions\) or causal, or take an encoder-decoder$",
        ),
        (run(BART()), "^objective BART on a decoder needs an input format; "),
        (run(UL2()), "^objective UL2 on a decoder needs an input format; "),
        (
            run(SpanCorruption(decoder_format="prefix"), "encoder-decoder"),
            "^objective.decoder_format is prefix, for a decoder alone, and model.architecture is encoder-decoder; leave it none$",
        ),
        (
            run(SpanCorruption(decoder_format="prefix"), length=4),
            "^batch.length is 4, too short for objective SpanCorruption to corrupt one span; use at least 5$",
        ),
        (
            run(SpanCorruption(decoder_format="prefix"), "encoder"),
            "^objective SpanCorruption needs a decoder or encoder-decoder; model.architecture is encoder$",
        ),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(UserError, match=message):
        validate(given)


def test_good_input():
    validate(run(SpanCorruption(decoder_format="prefix"), length=5))
    validate(run(UL2(decoder_format="causal")))
    validate(run(BART(decoder_format="prefix")))
