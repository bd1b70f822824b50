"""UL2: seven denoisers in one static shape, their mode tokens, and the loss of each kind."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain import configio
from maxpretrain.config import BatchConfig, ModelConfig, Run, validate
from maxpretrain.errors import UserError
from maxpretrain.models import build
from maxpretrain.objectives import UL2
from maxpretrain.vocabulary import Vocabulary

V, EOS = 1200, 1
NLU, NLG, S2S = 1050, 1051, 1052
SENTINELS = tuple(range(V - 1, V - 129, -1))
VOCABULARY = Vocabulary(size=V, eos_id=EOS, specials=(0, 1), sentinels=SENTINELS, modes=(NLU, NLG, S2S))
MODEL = ModelConfig(
    architecture="encoder-decoder",
    vocab_size=V,
    num_layers=1,
    model_dim=16,
    num_heads=2,
    position="t5",
    decoder_start_id=0,
)
# What each of the seven makes of its part of a window, where the inputs are 512 long: tokens of noise, spans.
NOISE = [(85, 28), (88, 11), (382, 127), (453, 57), (90, 1), (502, 8), (170, 0)]
RATES = [0.15, 0.15, 0.5, 0.5, 0.15, 0.5, 0.25]


def rng(seed=0):
    return np.random.default_rng(seed)


def parameters(model):
    """Some, drawn by numpy: nothing is compiled."""
    draw = lambda spec: jnp.asarray(rng(9).normal(0, 0.05, spec.struct.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, model.abstract, is_leaf=lambda x: hasattr(x, "struct"))


def bound(**fields):
    return UL2(**fields).bind(VOCABULARY)


def text(length):
    """Tokens that say where they stand."""
    return np.arange(2, 2 + length, dtype=np.int32)


def examples(objective, length, number=300):
    raw = objective.raw_length(length)
    return [objective.example(text(raw), rng(seed)) for seed in range(number)]


def test_lengths_are_those_of_the_longest_denoiser():
    """T5's lengths for μ 64, r .5, with one place less for the mode token: 1006 raw and 512 target tokens without."""
    assert UL2(mode_tokens=False).raw_length(512) == 1006
    assert UL2(mode_tokens=False).fields(512)["labels"] == ((512,), "int32")
    assert UL2().raw_length(512) == 1004
    assert UL2().fields(512) == {
        "tokens": ((512,), "int32"),
        "segments": ((512,), "int32"),
        "decoder_segments": ((511,), "int32"),
        "labels": ((511,), "int32"),
        "weights": ((511,), "float32"),
        "denoiser": ((), "int32"),
    }
    # T5's arithmetic for inputs of 511 (568, 588, 766, 908, 600, 1006 for 512), and 680 · 0.75 + 2 = 512 for S.
    assert [d.raw_length(512) for d in UL2().parts] == [567, 587, 765, 906, 599, 1004, 680]
    assert [d.target_length(512) for d in UL2().parts] == [114, 100, 510, 511, 92, 511, 171]


@pytest.mark.parametrize("length", [128, 512])
def test_each_denoiser_has_its_share_of_noise_and_its_mode(length):
    fields = bound().fields(length)
    seen = Counter()
    for made in examples(bound(), length):
        kind = int(made["denoiser"])
        seen[kind] += 1
        assert all(len(made[n]) <= shape[0] for n, (shape, _) in fields.items() if shape)
        assert made["denoiser"].dtype == np.int32
        assert made["tokens"][0] == [NLU, NLU, NLG, NLG, NLG, NLG, S2S][kind]
        assert made["tokens"][-1] == made["labels"][-1] == EOS
        inputs, targets = made["tokens"][1:-1], made["labels"][:-1]
        sentinels = [t for t in inputs if t in SENTINELS]
        assert sentinels == [t for t in targets if t in SENTINELS] == list(SENTINELS[: len(sentinels)])
        hidden = len(targets) - len(sentinels)
        assert hidden / (len(inputs) - len(sentinels) + hidden) == pytest.approx(RATES[kind], abs=0.005)
        assert length != 512 or (hidden, len(sentinels)) == NOISE[kind]
    assert sorted(seen) == list(range(7))
    assert sum((count - 300 / 7) ** 2 / (300 / 7) for count in seen.values()) < 22.5  # χ², 6 degrees, p = .001


def test_the_sequential_denoiser_goes_on_where_the_prefix_ends():
    for made in examples(bound(), 64, 100):
        if made["denoiser"] == 6:
            prefix, rest = made["tokens"][1:-1].tolist(), made["labels"][:-1].tolist()
            whole = prefix + rest
            assert whole == list(range(whole[0], whole[0] + len(whole)))
            assert len(prefix) == 62
            assert len(rest) == 21  # round(83 · 0.25); 84 · 0.75 = 63 would not fit


def test_no_part_of_the_window_is_left_unseen():
    objective = bound()
    raw = objective.raw_length(128)
    seen = np.zeros((2, raw + 2), int)
    for made in examples(objective, 128, 600):
        if made["denoiser"] in (0, 6):
            there = np.concatenate([made["tokens"], made["labels"]])
            seen[int(made["denoiser"] == 6), there[(there >= 2) & (there < raw + 2)]] += 1
    assert (seen[:, 12:-10] > 0).all()


def test_it_says_what_stood_there():
    """Inputs and targets together are a stretch of the text."""
    for made in examples(bound(), 128, 100):
        runs, at = {}, None
        for token in made["labels"][:-1].tolist():
            if token in SENTINELS:
                at = runs.setdefault(token, [])
            elif at is not None:
                at.append(token)
        if made["denoiser"] < 6:
            whole = [t for x in made["tokens"][1:-1].tolist() for t in (runs[x] if x in SENTINELS else [x])]
            assert whole == list(range(whole[0], whole[0] + len(whole)))


def test_short_windows():
    objective = bound()
    limits = objective.fields(128)
    for n in (1, 2, 3, 5, 20, 60, 149, 200, 246):
        for seed in range(20):
            made = objective.example(text(n), rng(seed))
            assert all(len(made[name]) <= shape[0] for name, (shape, _) in limits.items() if shape)
            assert (len(made["labels"]) > 0) == (n > 1)
            assert made["tokens"][0] in (NLU, NLG, S2S)


def test_weights_choose():
    only = (0.0000005, 0.0000005, 0.25, 0.25, 0.25, 0.249999, 0.0000000001)
    kinds = {int(e["denoiser"]) for e in examples(bound(weights=only), 64, 200)}
    assert kinds == {2, 3, 4, 5}
    assert UL2().shares == (1 / 7,) * 7


def test_without_mode_tokens():
    vocabulary = dataclasses.replace(VOCABULARY, modes=())
    made = UL2(mode_tokens=False).bind(vocabulary).example(text(254), rng())
    assert made["tokens"][0] < 300


def test_symbols():
    names = UL2(num_sentinels=2).symbols()
    assert names == ("[NLU]", "[NLG]", "[S2S]", "<extra_id_1>", "<extra_id_0>")
    assert UL2(mode_tokens=False, num_sentinels=1).symbols() == ("<extra_id_0>",)


def test_the_loss_of_each_kind():
    model = build(MODEL)
    params = parameters(model)
    objective = bound()
    rows = {0: 3, 1: 3, 2: 5, 3: 3}  # row -> the seed; the last row of the batch stays empty
    data = {name: np.zeros((5, *shape), dtype) for name, (shape, dtype) in objective.fields(32).items()}
    for row, seed in enumerate(rows.values()):
        for name, array in objective.example(text(objective.raw_length(32)) + row, rng(seed)).items():
            data[name][(row, *map(slice, array.shape))] = array
    data["denoiser"][:] = [0, 1, 6, 6, 0]
    data = jax.tree.map(jnp.asarray, data)

    @jax.jit
    def loss(data):
        return objective.loss(model, params, data, None)

    whole = loss(data)
    assert set(whole.metrics) == {"accuracy", "loss_r", "loss_x", "loss_s"}
    assert [float(x) for x in whole.metrics["loss_x"]] == [0.0, 0.0]  # no such row: left out of the record
    weights = np.asarray(data["weights"]).sum(-1)
    r, s = whole.metrics["loss_r"], whole.metrics["loss_s"]
    assert float(r[1]) == weights[0] + weights[1]
    assert float(s[1]) == weights[2] + weights[3]
    np.testing.assert_allclose(r[0] + s[0], whole.sum, rtol=1e-6)
    # What a kind loses is what its rows lose alone.
    alone = loss({name: array.at[2:].set(0) for name, array in data.items()})
    np.testing.assert_allclose(alone.sum, r[0], rtol=1e-5)
    assert float(whole.sum / whole.weight) == pytest.approx(7.09, abs=0.05)  # ln 1200 before training


def test_measured_leaves_regularizers_out():
    assert UL2(label_smoothing=0.1, z_loss=1e-4, num_sentinels=7).measured() == UL2(num_sentinels=7)


# What is refused


def run(length=128, model=None, **fields):
    return Run(
        model=dataclasses.replace(MODEL, vocab_size=None, **(model or {})),
        objective=UL2(**fields),
        batch=BatchConfig(length=length),
    )


def test_the_config_comes_back():
    a = run(weights=(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4))
    assert configio.from_json(configio.to_json(a)) == a
    validate(a)
    validate(run(length=512))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (0.5, 0.5)}, "^objective.weights has 2 numbers for 7 objectives; give one each$"),
        ({"weights": (0.2,) * 7}, "^objective.weights add up to 1.4; they must add up to 1$"),
        ({"length": 3}, "^batch.length is 3, too short for objective UL2 to corrupt one span; use at least 4$"),
        (
            {"num_sentinels": 20},
            "^objective UL2 needs 31 sentinels for inputs of length 128, one a span, and the tokenizer has 20; ",
        ),
        (
            {"model": {"architecture": "decoder"}},
            "^objective UL2 on a decoder needs an input format; ",
        ),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(UserError, match=message):
        validate(run(**changes))


def test_bad_vocabulary():
    with pytest.raises(UserError, match=r"^objective UL2 begins its inputs with"):
        UL2().bind(dataclasses.replace(VOCABULARY, modes=()))
    with pytest.raises(UserError, match=r"^objective UL2 needs sentinels, and the tokenizer has none"):
        UL2().bind(dataclasses.replace(VOCABULARY, sentinels=()))
