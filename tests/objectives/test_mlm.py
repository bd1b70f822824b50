"""Masked language modelling: how many and which tokens, what the loss is, and that nothing predicted is seen."""

import dataclasses
import functools
import importlib.util
import math
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain import mesh
from maxpretrain.config import BatchConfig, MeshConfig, ModelConfig, Run
from maxpretrain.convert.mapping import Mapping, as_tree
from maxpretrain.errors import UserError
from maxpretrain.models import build
from maxpretrain.nn.stack import Execution
from maxpretrain.objectives import MLM, masking
from maxpretrain.train.step import accumulate
from maxpretrain.vocabulary import Vocabulary

SIZE = 64
STARTS = np.arange(SIZE) % 3 == 0
VOCABULARY = Vocabulary(
    size=SIZE, pad_id=0, bos_id=1, eos_id=2, mask_id=3, specials=(0, 1, 2, 3, 4), word_starts=STARTS,
    sentence_ends=np.arange(SIZE) >= 58,
)  # fmt: skip
MODEL = ModelConfig(
    architecture="encoder", vocab_size=SIZE, num_layers=1, model_dim=16, num_heads=2, max_length=64, token_types=2,
    heads=("lm", "pooler", "pair"), lm_transform=True, lm_bias=True, tie_embeddings=False, init_std=0.5,
)  # fmt: skip
PAIRED = {"pair": "nsp", "short_share": 0.2}
VARIANTS = {
    "bert": MLM(),
    "limited": MLM(max_predictions=5),
    "roberta": MLM(count="roberta"),
    "bernoulli": MLM(count="bernoulli"),
    "whole": MLM(whole_word=True),
    "bernoulli-whole": MLM(count="bernoulli", whole_word=True),
    "ngram": MLM(ngram=3),
    "albert": MLM(ngram=3, whole_word=True, pair="sop"),
    "nsp": MLM(**PAIRED),
}


def generator(seed=0):
    return np.random.default_rng(seed)


def window(length, seed=0, documents=3):
    """Random tokens, each document but the last with its eos."""
    rng = generator(seed)
    tokens = rng.integers(5, SIZE, length).astype(np.int32)
    ends = np.sort(rng.choice(np.arange(1, length), documents - 1, replace=False)) if length > documents else []
    segments = np.ones(length, np.int32)
    for end in ends:
        tokens[end - 1] = 2
        segments[end:] += 1
    return tokens, segments


def make(objective, length, seed=0, raw=None):
    objective = objective.bind(VOCABULARY)
    raw = objective.raw_length(length) if raw is None else raw
    tokens, segments = window(raw, seed)
    partner = {"partner": window(raw, seed + 1000)[0]} if objective.partner else {}
    return objective.example(tokens, generator(seed), segments, **partner), tokens, segments


def rows(objective, count, length, first=0):
    made = [make(objective, length, seed)[0] for seed in range(first, first + count)]
    return {name: jnp.asarray(np.stack([row[name] for row in made])) for name in made[0]}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("length", [5, 16, 64])
def test_shapes_and_dtypes_are_the_declared_fields(name, length):
    for seed in range(5):
        example = make(VARIANTS[name], length, seed)[0]
        assert {k: (a.shape, a.dtype.name) for k, a in example.items()} == VARIANTS[name].fields(length)


def test_budgets():
    assert MLM().budget(512) == 77
    assert MLM().fields(128)["places"] == ((19,), "int32")
    assert MLM(max_predictions=20).budget(512) == 20
    assert MLM(rate=0.3).budget(1024) == 307
    assert MLM(count="roberta").budget(512) == 77
    assert MLM(count="roberta").budget(20) == 3  # 0.15·20 is whole: nothing to round
    assert MLM(count="bernoulli").budget(512) == 512


@pytest.mark.parametrize("name", VARIANTS)
def test_predicts_what_it_hides_and_changes_nothing_else(name):
    for seed in range(20):
        example, tokens, segments = make(VARIANTS[name], 60, seed)
        count = int(example["weights"].sum())
        places, labels = example["places"][:count], example["labels"][:count]
        assert example["weights"].tolist() == [1.0] * count + [0.0] * (len(example["weights"]) - count)
        assert not example["labels"][count:].any()
        assert not example["places"][count:].any()
        assert len(set(places.tolist())) == count
        assert (labels >= 5).all()  # no special token is predicted, bos, eos and padding least of all
        original = example["tokens"].copy()
        original[places] = labels
        assert ((example["tokens"] != 3) | np.isin(np.arange(60), places)).all()
        if VARIANTS[name].pair == "none":
            row = masking.framed(tokens, segments, VOCABULARY)
            real = len(row["tokens"])
            assert original.tolist() == row["tokens"].tolist() + [0] * (60 - real)
            assert example["segments"].tolist() == row["segments"].tolist() + [0] * (60 - real)


def test_exact_count_whatever_the_length():
    for raw in range(1, 511):
        example, tokens, _ = make(MLM(), None, raw, raw=raw)
        row = int((example["segments"] > 0).sum())
        assert row == raw + 2
        expected = min(max(1, round(0.15 * row)), int((tokens >= 5).sum()))
        assert int(example["weights"].sum()) == expected
    assert int(make(MLM(), 512)[0]["weights"].sum()) == 77
    assert int(make(MLM(max_predictions=20), 512)[0]["weights"].sum()) == 20


def test_roberta_rounds_at_random():
    counts = [int(make(MLM(count="roberta"), 64, seed)[0]["weights"].sum()) for seed in range(2000)]
    assert set(counts) == {9, 10}
    assert abs(np.mean(counts) - 9.6) < 0.045  # 0.15·64; four standard errors


def test_bernoulli_masks_each_by_itself():
    examples = [make(MLM(count="bernoulli"), 64, seed) for seed in range(2000)]
    counts = np.array([example["weights"].sum() for example, _, _ in examples])
    candidates = np.array([(tokens >= 5).sum() for _, tokens, _ in examples])
    assert abs((counts - 0.15 * candidates).mean()) < 0.25  # four standard errors of a binomial(60, 0.15)
    assert 6.9 < (counts - 0.15 * candidates).var() < 8.4  # 60·0.15·0.85 = 7.65; that of an exact count is 0


def test_words_are_never_split():
    split = 0
    for seed in range(200):
        for objective in (VARIANTS["whole"], VARIANTS["bernoulli-whole"], MLM(whole_word=True, ngram=3)):
            example, tokens, segments = make(objective, 64, seed)
            row = masking.framed(tokens, segments, VOCABULARY)
            hidden = np.zeros(len(row["tokens"]), bool)
            hidden[example["places"][example["weights"] > 0]] = True
            begins = STARTS[row["tokens"]] | (row["tokens"] < 5)
            begins[1:] |= (row["tokens"] < 5)[:-1]
            begins[1:] |= np.diff(row["segments"]) != 0
            for word in np.split(hidden, np.flatnonzero(begins)[1:]):
                assert word.all() or not word.any()
            if objective.count == "exact":
                assert hidden.sum() <= 10
        plain = make(MLM(), 64, seed)[0]["places"]
        split += any(STARTS[tokens[p - 2]] and p - 1 not in plain and not STARTS[tokens[p - 1]] for p in plain if p > 1)
    assert split > 100  # which without whole_word happens all the time


def test_ngrams_lie_together():
    def runs(objective):
        total = 0
        for seed in range(200):
            example = make(objective, 64, seed)[0]
            total += int((np.diff(example["places"][example["weights"] > 0]) > 1).sum()) + 1
        return total

    assert runs(MLM(ngram=3)) < 0.75 * runs(MLM())


def test_same_seed_same_example_another_seed_another():
    for name, objective in VARIANTS.items():
        first, tokens, segments = make(objective, 64, 7)
        again, _, _ = make(objective, 64, 7)
        partner = window(len(tokens), 1007)[0]
        other = objective.bind(VOCABULARY).example(tokens, generator(8), segments, partner=partner)
        assert all((first[k] == again[k]).all() for k in first), name
        assert (first["tokens"] != other["tokens"]).any(), name


@pytest.mark.parametrize("name", VARIANTS)
def test_short_windows(name):
    for raw in (1, 2, 3):
        for seed in range(10):
            example, _, _ = make(VARIANTS[name], None, seed, raw=raw)
            assert example["segments"].max() >= 1
            assert example["weights"].sum() <= 2
    special = VARIANTS[name].bind(VOCABULARY).example(np.array([2]), generator(), np.array([1]), partner=window(30)[0])
    assert special["weights"].sum() == 0
    assert special["tokens"][:2].tolist() == [1, 2]


# The loss. All batches have one shape, so that few programs are compiled.

MODEL_HERE = build(MODEL, Execution(scan=False))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL_HERE.init)(jax.random.key(0))


@functools.cache
def program(objective):
    def total(params, batch):
        loss = objective.loss(MODEL_HERE, params, objective.normalized(batch), None)
        return loss.sum, loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def close(found, expected):
    """Trees of gradients, against the largest of each; that of the keys' bias is 0 but for rounding."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(abs(b).max()) + 1e-5)


def test_loss_at_places_is_that_of_all_logits(params):
    batch = rows(MLM(), 4, 24)

    def full(params):
        output = MODEL_HERE.apply(params, batch["tokens"], batch["positions"], batch["segments"])
        log_p = jax.nn.log_softmax(MODEL_HERE.logits(params, output.hidden))
        wanted = np.full((4, 24), -1)
        for row in range(4):
            wanted[row, np.asarray(batch["places"])[row]] = np.asarray(batch["labels"])[row]
        at_label = jnp.take_along_axis(log_p, jnp.asarray(np.maximum(wanted, 0))[..., None], -1)[..., 0]
        return -jnp.sum(jnp.where(jnp.asarray(wanted) >= 0, at_label, 0.0))

    (value, loss), _ = program(MLM())(params, batch)
    expected = jax.jit(full)(params)
    assert float(loss.weight) == 16  # round(0.15·24) in each row
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert set(loss.metrics) == {"accuracy"}
    assert loss.metrics["accuracy"][1] == 16


def test_logits_are_computed_at_places_only():
    model = build(dataclasses.replace(MODEL, vocab_size=67), Execution())
    params = jax.tree.map(lambda s: s.struct, model.abstract, is_leaf=lambda x: hasattr(x, "struct"))
    batch = {
        name: jax.ShapeDtypeStruct((4, *shape), jnp.dtype(dtype)) for name, (shape, dtype) in MLM().fields(40).items()
    }
    text = jax.jit(lambda p, b: MLM().loss(model, p, b, None).sum).lower(params, batch).as_text()
    assert "4x6x67xf32" in text  # [B, M, V]
    assert "x40x67xf32" not in text


class Given:
    """The model, with hidden states of our choice."""

    execution, head, logits = MODEL_HERE.execution, staticmethod(MODEL_HERE.head), staticmethod(MODEL_HERE.logits)
    aux: ClassVar = {}

    def __init__(self, hidden):
        self.hidden = hidden

    def apply(self, *_, **__):
        return self


def test_only_masked_places_carry_loss(params):
    batch = rows(MLM(), 4, 24)
    hidden = jax.random.normal(jax.random.key(1), (4, 24, 16))
    gradient = jax.jit(jax.grad(lambda h: MLM().loss(Given(h), params, batch, None).sum))(hidden)
    for row, reached in enumerate((np.asarray(gradient) != 0).any(-1)):
        assert np.flatnonzero(reached).tolist() == np.asarray(batch["places"])[row].tolist()


@pytest.mark.parametrize("objective", [MLM(), MLM(**PAIRED)], ids=["alone", "paired"])
def test_nothing_to_predict_is_zero_and_not_nan(objective, params):
    batch = {name: jnp.zeros((4, *shape), jnp.dtype(dtype)) for name, (shape, dtype) in objective.fields(24).items()}
    (value, _), gradient = program(objective)(params, batch)
    assert float(value) == 0.0
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))


def once_each(raw=22):
    """Four rows in which no token comes twice, all predictions masks: where a token is masked, it is nowhere."""
    objective = MLM(mask_share=1.0, random_share=0.0).bind(VOCABULARY)
    tokens, segments = np.arange(5, 5 + raw, dtype=np.int32), np.repeat([1, 2], raw // 2)
    made = [objective.example(tokens, generator(3), segments)] * 4
    return {name: jnp.asarray(np.stack([row[name] for row in made])) for name in made[0]}


def visible(gradient):
    """The tokens that the input is seen to hold: the unembedding has a table of its own here."""
    return np.flatnonzero((np.asarray(gradient["embed"]["table"]) != 0).any(-1)).tolist()


def test_a_label_is_not_in_its_own_input(params):
    batch = once_each()
    hidden = set(np.asarray(batch["labels"][0]).tolist())
    assert len(hidden) == 4
    _, gradient = program(MLM())(params, batch)
    assert visible(gradient) == sorted({1, 2, 3, *range(5, 27)} - hidden)


def test_packed_documents_do_not_see_each_other(params):
    batch = once_each()
    first = batch["places"] < 12
    assert 0 < int(first[0].sum()) < 4
    batch["weights"] = first.astype(jnp.float32)
    others = set(range(16, 27))
    assert not others & set(visible(program(MLM())(params, batch)[1]))
    batch["segments"] = jnp.ones_like(batch["segments"])
    assert others & set(visible(program(MLM())(params, batch)[1]))


def reference():
    """The module of the families' goldens."""
    spec = importlib.util.spec_from_file_location("families", Path(__file__).parents[1] / "models" / "test_families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loss_and_gradient_of_the_reference():
    families = reference()
    golden = dict(np.load(next(path for path in families.GOLDENS if path.stem == "bert-pretraining")))
    family, config = families.config_of(golden)
    model = build(config)
    mapping = Mapping(model, family.names(config))
    weights = {name.removeprefix("weights/"): value for name, value in golden.items() if name.startswith("weights/")}
    params = as_tree({name: jnp.asarray(value) for name, value in mapping.load(weights.__getitem__, "golden")})
    batch = families.inputs_of(golden)
    labels = golden["labels"]
    size = int((labels != -100).sum(1).max())
    predicted = {name: np.zeros((len(labels), size), np.int32) for name in ("places", "labels", "weights")}
    for row, wanted in enumerate(labels):
        places = np.flatnonzero(wanted != -100)
        predicted["places"][row, : len(places)], predicted["labels"][row, : len(places)] = places, wanted[places]
        predicted["weights"][row, : len(places)] = 1
    batch |= {name: jnp.asarray(array) for name, array in predicted.items()}
    batch["weights"] = batch["weights"].astype(jnp.float32)
    batch["pair_label"] = jnp.asarray(golden["pair_labels"].reshape(-1), jnp.int32)
    batch["pair_weight"] = jnp.ones(len(labels), jnp.float32)

    def total(params):
        loss = MLM(pair="nsp").loss(model, params, batch, None)
        return loss.sum / loss.weight

    value, gradient = jax.jit(jax.value_and_grad(total))(params)
    assert float(value) == pytest.approx(float(golden["loss"]), rel=1e-5)
    ours = {name: make for name, _, make in mapping.store(gradient)}
    named = [name for name in golden if name.startswith("grad/")]
    assert len(named) == 3
    for name in named:
        expected = golden[name]
        found = ours[name.removeprefix("grad/")]()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_initial_loss_of_bert():
    # ln 30,522 + ln 2 = 10.3262 + 0.6931
    size = 30_522
    vocabulary = Vocabulary(size=size, bos_id=1, eos_id=2, mask_id=3, specials=(0, 1, 2, 3))
    model = build(
        ModelConfig(
            architecture="encoder", vocab_size=size, num_layers=1, model_dim=8, num_heads=2, max_length=64,
            token_types=2, heads=("lm", "pooler", "pair"), lm_transform=True, lm_bias=True,
        ),
        Execution(scan=False),
    )  # fmt: skip
    objective = MLM(pair="nsp").bind(vocabulary)
    made = [
        objective.example(
            generator(i).integers(4, size, 61), generator(i), partner=generator(i + 100).integers(4, size, 61)
        )
        for i in range(8)
    ]
    batch = {name: jnp.asarray(np.stack([row[name] for row in made])) for name in made[0]}
    params = jax.jit(model.init)(jax.random.key(0))
    loss = jax.jit(lambda p: objective.loss(model, p, batch, None))(params)
    assert float(loss.sum / loss.weight) == pytest.approx(11.02, abs=0.02)
    assert float(loss.metrics["mlm_loss"][0] / loss.metrics["mlm_loss"][1]) == pytest.approx(10.326, abs=0.02)
    assert float(loss.metrics["pair_loss"][0] / loss.metrics["pair_loss"][1]) == pytest.approx(0.693, abs=0.01)


def with_a_row_without_pair():
    batch = rows(MLM(count="roberta", **PAIRED), 4, 24, first=2)
    return batch | {"pair_weight": batch["pair_weight"].at[3].set(0.0)}


def test_both_means_are_exact_in_microbatches(params):
    objective, batch = MLM(**PAIRED), with_a_row_without_pair()
    assert float(batch["pair_weight"].sum()) == 3
    assert len(set(np.asarray(batch["weights"]).sum(1).tolist())) > 1

    def means(params):
        inputs = (batch[name] for name in ("tokens", "positions", "segments"))
        hidden = MODEL_HERE.apply(params, *inputs, token_types=batch["token_types"]).hidden
        log_p = jax.nn.log_softmax(MODEL_HERE.logits(params, hidden))
        at = jnp.take_along_axis(log_p, batch["places"][..., None], 1)
        nll = -jnp.take_along_axis(at, batch["labels"][..., None], -1)[..., 0]
        pair = jax.nn.log_softmax(MODEL_HERE.head_outputs(params, hidden)["pair_logits"])
        pairs = -jnp.take_along_axis(pair, batch["pair_label"][:, None], -1)[:, 0]
        mean = lambda x, w: (x * w).sum() / w.sum()  # noqa: E731
        return mean(nll, batch["weights"]) + mean(pairs, batch["pair_weight"])

    expected = jax.jit(means)(params)
    fn = lambda params, batch, key: objective.loss(MODEL_HERE, params, batch, None)  # noqa: E731
    (_, whole), of_whole = program(objective)(params, batch)
    in_parts = jax.jit(lambda p, b: accumulate(fn, p, objective.normalized(b), jax.random.key(0), 4))(params, batch)
    for loss in (whole, in_parts[0]):
        assert float(loss.sum / loss.weight) == pytest.approx(float(expected), rel=1e-5)
    close(in_parts[1], of_whole)
    said = {name: float(total / weight) for name, (total, weight) in loss.metrics.items()}
    assert set(said) == {"accuracy", "mlm_loss", "pair_loss", "pair_accuracy"}
    assert float(loss.metrics["pair_accuracy"][1]) == 3
    assert objective.combined(said) == pytest.approx(float(expected), rel=1e-5)
    assert objective.combined(said | {"pair_loss": math.nan}) == pytest.approx(said["mlm_loss"])
    assert objective.combined(said | {"mlm_loss": math.nan}) == pytest.approx(said["pair_loss"])
    assert MLM().combined({"loss": 2.5}) == 2.5


def test_pairs_count_where_nothing_is_masked(params):
    objective, batch = MLM(**PAIRED), with_a_row_without_pair()
    batch |= {"weights": jnp.zeros_like(batch["weights"])}
    (_, loss), grads = program(objective)(params, batch)
    nll, number = loss.metrics["pair_loss"]
    assert float(loss.weight) == float(number) == 3
    assert float(loss.sum) == pytest.approx(float(nll))
    assert float(jnp.abs(grads["heads"]["pair"]["kernel"]).max()) > 0


def test_the_same_on_a_mesh(params):
    objective, batch = MLM(**PAIRED), with_a_row_without_pair()
    (value, loss), _ = program(objective)(params, batch)
    layout = mesh.make_layout(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    with mesh.use(layout):
        spread = jax.device_put(params, layout.param_shardings(MODEL_HERE.abstract))
        placed = layout.global_batch({name: np.asarray(array) for name, array in batch.items()}, 4)
        mine = lambda p, b: objective.loss(MODEL_HERE, p, objective.normalized(b), None)  # noqa: E731
        other = jax.jit(mine)(spread, placed)
    assert float(other.sum) == pytest.approx(float(value), rel=1e-5)
    assert float(other.metrics["accuracy"][0]) == float(loss.metrics["accuracy"][0])
    assert float(other.metrics["pair_accuracy"][0]) == float(loss.metrics["pair_accuracy"][0])


# What is refused


def check(objective, model=MODEL, length=64):
    objective.validate(Run(objective=objective, model=model, batch=BatchConfig(length=length)))


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        (MLM(ngram=0), r"objective\.ngram is 0"),
        (MLM(max_predictions=0), r"objective\.max_predictions is 0"),
        (MLM(count="bernoulli", max_predictions=9), r"objective\.max_predictions is 9"),
        (MLM(count="bernoulli", ngram=2), r"objective\.ngram is 2"),
        (MLM(short_share=1.5), r"objective\.short_share is 1\.5"),
        (MLM(pair="sop", mask_documents=False), r"leave objective\.mask_documents on"),
    ],
)
def test_fields_are_checked(objective, sentence):
    with pytest.raises(UserError, match=sentence):
        check(objective)


def test_pairs_need_their_parts():
    check(MLM(pair="nsp"))
    check(MLM(), ModelConfig(architecture="encoder", vocab_size=SIZE))
    with pytest.raises(
        UserError, match=r'needs the heads "pooler" and "pair"; model.heads are lm; add them to model.heads'
    ):
        check(MLM(pair="nsp"), ModelConfig(architecture="encoder", vocab_size=SIZE, token_types=2))
    one = ModelConfig(architecture="encoder", vocab_size=SIZE, heads=("lm", "pooler", "pair"), token_types=1)
    with pytest.raises(UserError, match=r"model\.token_types is 1, use 2"):
        check(MLM(pair="sop"), one)
    with pytest.raises(UserError, match=r"batch\.length is 4"):
        check(MLM(pair="sop"), length=4)
    plain = Vocabulary(size=9, mask_id=3, eos_id=2, specials=(2, 3))
    MLM().bind(plain)
    with pytest.raises(UserError, match="the tokenizer has no bos"):
        MLM(pair="sop").bind(plain)
    assert MLM(pair="nsp").partner
    assert not MLM(pair="sop").partner
    assert not MLM().partner


def test_no_perplexity_and_no_bits_per_byte():
    assert not MLM.perplexity
    assert not MLM.whole_text


# The reference collator


@pytest.mark.parity
def test_masks_like_the_hugging_face_collator():
    import torch
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<mask>", "<unk>", *(f"w{i}" for i in range(5, SIZE))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="<mask>", unk_token="<unk>",
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.15)
    torch.manual_seed(0)
    count, length = 4000, 62
    texts = generator().integers(5, SIZE, (count, length))
    framed = np.concatenate([np.full((count, 1), 1), texts, np.full((count, 1), 2)], 1)
    theirs = collator([{"input_ids": torch.tensor(row)} for row in framed])
    labels, inputs = theirs["labels"].numpy(), theirs["input_ids"].numpy()
    objective = MLM(count="bernoulli").bind(VOCABULARY)
    ours = [objective.example(text, generator(seed)) for seed, text in enumerate(texts)]

    def summary(inputs, labels):
        """How many a row has, where they are, and what stands there: masks, other tokens, the same token."""
        asked = labels != -100
        masked, kept = asked & (inputs == 3), asked & (inputs == labels)
        # Their random tokens may be special ones.
        what = [masked.sum(), kept.sum(), (asked & ~masked & ~kept).sum()]
        sizes = np.bincount(np.clip(asked.sum(1), 4, 15), minlength=16)[4:]
        return [np.array(what), sizes, asked.sum(0)[1:-1]], asked

    own = np.full(framed.shape, -100)
    for row, example in enumerate(ours):
        real = example["weights"] > 0
        own[row, example["places"][real]] = example["labels"][real]
    (found, asked), (expected, theirs_asked) = (
        summary(np.stack([e["tokens"] for e in ours]), own),
        summary(inputs, labels),
    )
    assert not theirs_asked[:, [0, -1]].any()
    assert not asked[:, [0, -1]].any()
    for a, b, critical in zip(
        found, expected, (13.8, 31.3, 103.4), strict=True
    ):  # 2, 11 and 62 degrees of freedom, 1 in 1000
        ratio = math.sqrt(b.sum() / a.sum())
        assert float(((a * ratio - b / ratio) ** 2 / (a + b)).sum()) < critical
