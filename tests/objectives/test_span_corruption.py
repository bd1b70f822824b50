"""T5's span corruption: published lengths, examples worked by hand, distributions, and the loss."""

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
from maxpretrain.objectives import SpanCorruption
from maxpretrain.objectives.seq2seq import shifted
from maxpretrain.objectives.span_corruption import Counts, composition, noise_mask, with_sentinels
from maxpretrain.vocabulary import Vocabulary

V, EOS = 1000, 1
VOCABULARY = Vocabulary(size=V, eos_id=EOS, specials=(0, 1, 2), sentinels=tuple(range(V - 1, V - 101, -1)))
MODEL = ModelConfig(
    architecture="encoder-decoder",
    vocab_size=48,
    num_layers=1,
    model_dim=16,
    num_heads=2,
    max_length=64,
    position="t5",
    decoder_start_id=0,
)


def bound(**fields):
    return SpanCorruption(**fields).bind(VOCABULARY)


def rng(seed=0):
    return np.random.default_rng(seed)


def parameters(model):
    """Some, drawn by numpy: nothing is compiled."""
    draw = lambda spec: jnp.asarray(rng(9).normal(0, 0.05, spec.struct.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, model.abstract, is_leaf=lambda x: hasattr(x, "struct"))


def text(length, seed=0):
    return rng(seed).integers(3, 800, length).astype(np.int32)


def restored(inputs, targets, sentinels=VOCABULARY.sentinels, eos=EOS):
    """The text again: each sentinel of the inputs replaced by what follows it in the targets."""
    assert inputs[-1] == eos
    spans, at = {}, None
    for token in targets[:-1].tolist() if len(targets) else []:
        if token in sentinels:
            at = spans.setdefault(token, [])
        else:
            at.append(token)
    assert len(targets) == 0 or targets[-1] == eos
    return [t for token in inputs[:-1].tolist() for t in (spans[token] if token in sentinels else [token])]


# (mean span, density) -> (raw, target) lengths for inputs of 128, 256, 512, 1024.
PUBLISHED = {
    (3, 0.15): [(141, 29), (284, 58), (568, 114), (1137, 229)],
    (8, 0.15): [(146, 26), (293, 51), (588, 100), (1178, 200)],
    (3, 0.5): [(190, 128), (382, 256), (766, 512), (1534, 1024)],
    (8, 0.5): [(226, 128), (454, 256), (908, 512), (1818, 1024)],
    (64, 0.15): [(149, 23), (299, 47), (600, 92), (1200, 184)],
    (64, 0.5): [(250, 128), (502, 256), (1006, 512), (2014, 1024)],
}


@pytest.mark.parametrize(("mean_span", "density"), PUBLISHED)
def test_published_lengths(mean_span, density):
    objective = SpanCorruption(mean_span=mean_span, density=density)
    lengths = [(objective.raw_length(n), objective.target_length(n)) for n in (128, 256, 512, 1024)]
    assert lengths == PUBLISHED[mean_span, density]


def test_other_published_lengths():
    for mean_span, expected in ((2.0, (70, 22)), (1.0, (63, 27))):
        objective = SpanCorruption(mean_span=mean_span, density=0.2)
        assert (objective.raw_length(64), objective.target_length(64)) == expected


@pytest.mark.parametrize(("mean_span", "density"), [*PUBLISHED, (1, 0.15), (3, 0.85), (2, 0.3)])
def test_the_raw_length_is_the_longest_that_fits(mean_span, density):
    objective = SpanCorruption(mean_span=mean_span, density=density)
    for length in range(24, 200):
        raw = objective.raw_length(length)
        counts = [objective.published(n) for n in range(raw, raw + 8)]
        fits = [c.inputs <= length and (density != 0.5 or c.targets <= c.inputs) for c in counts]
        assert fits == [True] + 7 * [False]


def test_half_to_even():
    """10 · 0.15 = 1.5 -> 2, 30 · 0.15 = 4.5 -> 4, 50 · 0.15 = 7.5 -> 8; 7.5 / 3 rounded after that: 8 / 3 -> 3."""
    objective = SpanCorruption()
    assert [objective.counts(n)[1:] for n in (10, 30, 50, 568)] == [(2, 1), (4, 1), (8, 3), (85, 28)]
    assert SpanCorruption(density=0.5, mean_span=2.0).counts(10)[1:] == (5, 2)  # 2.5 -> 2
    assert SpanCorruption(density=0.5, mean_span=2.0).counts(14)[1:] == (7, 4)  # 3.5 -> 4


def test_there_is_always_noise_and_something_beside_it():
    for density, mean_span in ((0.15, 3.0), (0.9, 1.0), (0.5, 64.0), (0.01, 3.0)):
        objective = SpanCorruption(density=density, mean_span=mean_span)
        for n in range(2, 50):
            _, noise, spans = objective.counts(n)
            assert 1 <= spans <= min(noise, n - noise)


def test_golden():
    tokens = np.arange(100, 120, dtype=np.int32)
    noise = np.isin(np.arange(20), [3, 4, 10, 18, 19])
    inputs, targets = with_sentinels(tokens, noise, np.array(VOCABULARY.sentinels))
    expected = [100, 101, 102, 999, *range(105, 110), 998, *range(111, 118), 997]
    assert inputs.tolist() == expected
    assert targets.tolist() == [999, 103, 104, 998, 110, 997, 118, 119]
    # A window that began with noise would have its sentinels off by one.
    tokens, noise = np.arange(10, 16, dtype=np.int32), np.array([1, 1, 0, 0, 1, 0], bool)
    inputs, targets = with_sentinels(tokens, noise, np.array(VOCABULARY.sentinels))
    assert inputs.tolist() == [999, 12, 13, 998, 15]
    assert targets.tolist() == [10, 11, 999, 14, 998]


def test_no_mask_begins_with_noise():
    objective, generator = SpanCorruption(), rng()
    for n in range(2, 300):
        counts = objective.counts(n)
        mask = noise_mask(counts, generator)
        assert (mask[0], mask[-1], mask.sum(), len(mask)) == (False, True, counts.noise, n)
        assert np.count_nonzero(np.diff(mask.astype(int)) == 1) == counts.spans


def test_a_full_window_fills_its_example():
    objective = bound()
    example = objective.example(text(568), rng())
    assert {name: (a.shape, a.dtype.name) for name, a in example.items()} == objective.fields(512)
    assert objective.fields(512) == {
        "tokens": ((512,), "int32"),
        "segments": ((512,), "int32"),
        "decoder_segments": ((114,), "int32"),
        "labels": ((114,), "int32"),
        "weights": ((114,), "float32"),
    }
    in_order = [999 - i for i in range(28)]
    assert [t for t in example["tokens"] if t >= 900] == in_order
    assert [t for t in example["labels"] if t >= 900] == in_order
    assert example["tokens"][-1] == example["labels"][-1] == EOS
    assert all((example[name] == 1).all() for name in ("segments", "decoder_segments", "weights"))


@pytest.mark.parametrize("fields", [{}, {"mean_span": 8.0}, {"density": 0.5}, {"density": 0.85, "mean_span": 1.0}])
def test_the_text_is_recoverable(fields):
    objective = bound(**fields)
    for n in range(31, 180):
        tokens = text(n, n)
        example = objective.example(tokens, rng(n))
        assert restored(example["tokens"], example["labels"]) == tokens.tolist()


def test_short_windows_are_examples_of_their_own():
    objective = bound()
    for n in range(2, 31):
        example = objective.example(text(n), rng(n))
        assert restored(example["tokens"], example["labels"]) == text(n).tolist()
        assert len(example["labels"]) == {True: 3, False: objective.counts(n).targets}[n < 10]
    one = objective.example(np.array([7]), rng())
    assert {name: array.tolist() for name, array in one.items()} == {
        "tokens": [7, EOS],
        "segments": [1, 1],
        "decoder_segments": [],
        "labels": [],
        "weights": [],
    }
    assert all(len(array) == 0 for array in objective.example(np.array([EOS]), rng()).values())


def test_special_tokens_and_padding_are_left_out():
    tokens = np.array([5, 6, EOS, 7, 8, 9, EOS, 10, 0, 0])
    segments = np.array([1, 1, 1, 2, 2, 2, 2, 3, 0, 0], np.int32)
    example = bound(density=0.4).example(tokens, rng(), segments)
    assert restored(example["tokens"], example["labels"]) == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("length", [32, 64, 128, 256])
@pytest.mark.parametrize(("mean_span", "density"), PUBLISHED)
def test_every_window_fits(length, mean_span, density):
    """Also where the published arithmetic forgets that there is always one span: 64 at .15 in inputs of 128."""
    objective = bound(mean_span=mean_span, density=density)
    limits = {name: shape[0] for name, (shape, _) in objective.fields(length).items()}
    raw = objective.raw_length(length)
    for n in {raw, raw - 1, raw - 7, raw // 2, raw // 5, 2}:
        example = objective.example(text(n, n), rng(n))
        assert all(len(array) <= limits[name] for name, array in example.items())
        whole = restored(example["tokens"], example["labels"])
        assert any(whole == text(n, n)[i : i + len(whole)].tolist() for i in range(n - len(whole) + 1))
        assert len(whole) == n or (mean_span >= 8 and len(whole) >= 0.6 * n)


def test_compositions_are_uniform():
    """5 in 3 parts: six sequences, each as often."""
    generator = rng(1)
    seen = Counter(tuple(composition(5, 3, generator).tolist()) for _ in range(12_000))
    assert len(seen) == 6
    assert sum((count - 2000) ** 2 / 2000 for count in seen.values()) < 20.5  # χ², 5 degrees of freedom, p = .001


def test_the_mean_span_is_what_it_says():
    generator = rng(2)
    mask = np.concatenate([noise_mask(Counts(568, 85, 28), generator) for _ in range(200)])
    starts = np.count_nonzero(mask[1:] & ~mask[:-1])
    assert mask.sum() == 17_000
    assert starts == 5600  # 85 tokens in 28 spans: 3.04
    # Each place but the ends is noise about as often: uniform lengths leave no place out.
    share = mask.reshape(200, 568)[:, 50:500].mean()
    assert share == pytest.approx(0.15, abs=0.01)


def test_the_seed_decides():
    objective = bound()
    a, b, c = (objective.example(text(300), rng(seed))["tokens"].tolist() for seed in (1, 1, 2))
    assert a == b != c


def test_symbols_end_with_the_first_sentinel():
    names = SpanCorruption(num_sentinels=3).symbols()
    assert names == ("<extra_id_2>", "<extra_id_1>", "<extra_id_0>")
    assert len(SpanCorruption().symbols()) == 100


# The loss

SMALL = Vocabulary(size=48, eos_id=1, specials=(0, 1), sentinels=tuple(range(47, 37, -1)))


def batch():
    """Examples of 20, 15 and 10 tokens, in inputs of 24."""
    objective = SpanCorruption().bind(SMALL)
    made = {name: np.zeros((3, *shape), dtype) for name, (shape, dtype) in objective.fields(24).items()}
    for row in range(3):
        tokens = rng(row).integers(2, 38, 20 - 5 * row)
        for name, array in objective.example(tokens, rng(row)).items():
            made[name][row, : len(array)] = array
    return jax.tree.map(jnp.asarray, made)


@pytest.fixture(scope="module")
def network():
    """The model, its parameters, and the loss with its gradient, compiled for batches of one shape."""
    model = build(MODEL)
    objective = SpanCorruption().bind(SMALL)

    @jax.jit
    def gradient(params, data):
        def total(params):
            loss = objective.loss(model, params, data, None)
            return loss.sum, loss

        return jax.value_and_grad(total, has_aux=True)(params)

    return model, parameters(model), gradient


@pytest.fixture(scope="module")
def logits_of(network):
    """float32 [B, U, V] as a function of the vectors that the decoder reads, and of the batch."""
    model, params, _ = network

    def logits(vectors, data):
        net = model._template.bind(params)
        memory, _ = net.encode(data["tokens"], segments=data["segments"])
        hidden, _, _ = net.decoder(
            vectors, segments=data["decoder_segments"], memory=memory, memory_segments=data["segments"]
        )
        return model.logits(params, hidden)

    return logits


def test_the_decoder_reads_the_targets_one_later():
    labels = jnp.asarray([[9, 5, 6, 1, 0, 0]], jnp.int32)
    assert shifted(labels, 0).tolist() == [[0, 9, 5, 6, 1, 0]]
    assert shifted(jnp.asarray([[0, 5, 6, 2]], jnp.int32), 2).tolist() == [[2, 0, 5, 6]]


def test_loss_is_that_of_the_plain_formula(network, logits_of):
    _, params, gradient = network
    data = batch()
    (value, loss), _ = gradient(params, data)

    @jax.jit
    def plain(data):
        vectors = params["embed"]["table"][shifted(data["labels"], 0)]
        log_p = jax.nn.log_softmax(logits_of(vectors, data))
        return -jnp.take_along_axis(log_p, data["labels"][..., None], -1)[..., 0]

    nll = np.asarray(plain(data))
    # 20 tokens: 3 of noise, a sentinel and eos; 15: 2.25 -> 2 of noise; 10: 1.5 -> 2.
    np.testing.assert_allclose(value, nll[0, :5].sum() + nll[1, :4].sum() + nll[2, :4].sum(), rtol=1e-5)
    assert float(loss.weight) == 13
    assert set(loss.metrics) == {"accuracy"}


def test_padding_does_not_matter(network):
    _, params, gradient = network
    data = batch()
    other = data | {
        "tokens": jnp.where(data["segments"] == 0, 5, data["tokens"]),
        "labels": jnp.where(data["decoder_segments"] == 0, 6, data["labels"]),
    }
    (value, _), slopes = gradient(params, data)
    (other_value, _), other_slopes = gradient(params, other)
    np.testing.assert_array_equal(other_value, value)
    jax.tree.map(np.testing.assert_array_equal, other_slopes, slopes)


def test_no_place_reads_its_label_or_what_follows(network, logits_of):
    _, params, _ = network
    data = batch()
    reads = params["embed"]["table"][shifted(data["labels"], 0)]
    score = lambda v, place: logits_of(v, data)[0, place, data["labels"][0, place]]  # noqa: E731
    slope = jax.jit(jax.grad(score))
    for place in (0, 2):
        used = np.abs(np.asarray(slope(reads, place))).sum(-1) > 0
        # The label of a place is read one place later, in its own row.
        assert used.tolist() == [[row == 0 and i <= place for i in range(used.shape[1])] for row in range(3)]


def test_nothing_to_predict_is_zero(network):
    _, params, gradient = network
    empty = jax.tree.map(jnp.zeros_like, batch())
    one = empty | {
        "tokens": empty["tokens"].at[0, :2].set(jnp.asarray([7, 1], jnp.int32)),
        "segments": empty["segments"].at[0, :2].set(1),
    }
    for nothing in (empty, one):
        (value, _), slopes = gradient(params, nothing)
        assert value == 0
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(slopes))


def test_measured_leaves_regularizers_out():
    objective = SpanCorruption(label_smoothing=0.1, z_loss=1e-4, density=0.2)
    assert objective.measured() == SpanCorruption(density=0.2)


# What is refused


def run(length=64, tokenizer=None, model=None, **fields):
    return Run(
        model=dataclasses.replace(MODEL, vocab_size=None, **(model or {})),
        objective=SpanCorruption(**fields),
        batch=BatchConfig(length=length),
        tokenizer=tokenizer or TokenizerConfig(),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 0.0}, r"^objective\.density is 0\.0; it must be between 0 and 1$"),
        ({"mean_span": 0.5}, r"^objective\.mean_span is 0\.5; it must be at least 1$"),
        ({"num_sentinels": 0}, r"^objective\.num_sentinels is 0; it must be at least 1$"),
        ({"label_smoothing": 1.0}, r"^objective\.label_smoothing is 1\.0; it must be in \[0, 1\)$"),
        (
            {"length": 2},
            "^batch.length is 2, too short for objective SpanCorruption to corrupt one span; use at least 3$",
        ),
        (
            {"length": 512, "density": 0.5},
            "^objective SpanCorruption needs 128 sentinels for inputs of length 512, one a span, and the tokenizer has "
            "100; shorten batch.length, or train a tokenizer with objective.num_sentinels 128$",
        ),
        ({"model": {"decoder_start_id": None}}, "^model.decoder_start_id is None; set it to the id"),
        (
            {"model": {"architecture": "decoder"}},
            "^objective SpanCorruption on a decoder needs an input format; ",
        ),
        (
            {"model": {"position": "learned"}, "density": 0.7},
            "^objective SpanCorruption makes targets of 112 tokens from batch.length 64, and the decoder has positions for 64;",
        ),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(UserError, match=message):
        validate(run(**changes))


def test_a_tokenizer_that_is_given_is_asked_when_it_is_there():
    validate(run(length=512, density=0.5, tokenizer=TokenizerConfig(path="t5.model")))
    objective = bound(density=0.5)
    with pytest.raises(
        UserError, match="needs 128 sentinels for inputs of length 512, one a span, and the tokenizer has 100"
    ):
        objective.fields(512)
    with pytest.raises(UserError, match="needs 128 sentinels for inputs, one a span, and the tokenizer has 100"):
        objective.example(text(766), rng())
    with pytest.raises(UserError, match="needs sentinels, and the tokenizer has none"):
        SpanCorruption().bind(Vocabulary(size=9, eos_id=1))
    with pytest.raises(UserError, match="ends its inputs and targets with eos, and the tokenizer has none"):
        SpanCorruption().bind(Vocabulary(size=9, sentinels=(8,)))


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_loss_is_that_of_transformers(kind):
    """Labels in, loss out: their shift and ours, with padding on both sides."""
    import torch
    import transformers

    from maxpretrain.convert.mapping import Mapping, as_tree
    from maxpretrain.models import families
    from maxpretrain.models.families.options import Options

    if kind == "t5":
        options = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        theirs = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**options, dropout_rate=0.0, decoder_start_token_id=0)
        )
    else:
        parts = {f"{a}_{b}": n for a in ("encoder", "decoder") for b, n in (("layers", 2), ("attention_heads", 2))}
        parts |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0, "max_position_embeddings": 32}
        config = transformers.BartConfig(vocab_size=48, d_model=16, **parts)
        theirs = transformers.BartForConditionalGeneration(config)
    family = families.by_type(kind)
    model = build(family.from_options(Options(theirs.config.to_dict())))
    weights = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    mapping = Mapping(model, family.names(model.config))
    params = as_tree({path: jnp.asarray(value) for path, value in mapping.load(weights.__getitem__, kind)})
    data = batch()
    loss = jax.jit(lambda p, b: SpanCorruption().bind(SMALL).loss(model, p, b, None))(params, data)
    torch_ids = lambda name: torch.tensor(np.asarray(data[name]).astype(np.int64))  # noqa: E731
    labels = torch.where(torch_ids("decoder_segments") > 0, torch_ids("labels"), -100)
    theirs_loss = theirs.eval()(input_ids=torch_ids("tokens"), attention_mask=torch_ids("segments"), labels=labels).loss
    np.testing.assert_allclose(float(loss.sum / loss.weight), theirs_loss.item(), rtol=2e-5)
