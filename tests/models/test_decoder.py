"""The decoder: what it must and must not see, and that how it runs changes nothing."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.config import ModelConfig
from maxpretrain.models import build, parameter_count
from maxpretrain.models.families import preset
from maxpretrain.nn.base import is_spec
from maxpretrain.nn.stack import Execution

GPT = ModelConfig(vocab_size=61, num_layers=2, model_dim=32, num_heads=4, max_length=32, init_std=0.2)
LLAMA = dataclasses.replace(
    GPT,
    num_kv_heads=2,
    head_dim=12,
    position="rope",
    norm="rmsnorm",
    gated=True,
    activation="silu",
    tie_embeddings=False,
    bias=False,
    qkv_bias=True,
)
POST = dataclasses.replace(GPT, norm_placement="post", position="sinusoidal", num_kv_heads=1, activation="gelu")
CONFIGS = {"gpt": GPT, "llama": LLAMA, "post": POST}


@pytest.fixture(scope="module", params=CONFIGS)
def network(request):
    model = build(CONFIGS[request.param])
    return (
        model,
        model.init(jax.random.key(0)),
        jax.jit(lambda p, t, pos, seg: model.logits(p, model.apply(p, t, pos, seg).hidden)),
    )


@functools.cache
def parameters(config):
    return jax.jit(build(config).init)(jax.random.key(0))


@functools.cache
def value_and_gradient(config, execution):
    model = build(config, execution)
    loss = lambda p: jnp.square(model.apply(p, tokens()).hidden).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(parameters(config))


def tokens(rows=2, length=16, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 61, jnp.int32)


def test_a_token_influences_itself_and_what_follows_only(network):
    model, params, _ = network
    x = jnp.eye(61, dtype=jnp.float32)[tokens(1, 8)]  # differentiable tokens
    name = "embed"

    def hidden(onehot):
        table = params[name]["table"]
        # Shifts each position's embedding by what the one-hot says, so that its gradient is that of the input.
        return jnp.einsum("btv,vd->btd", onehot, table)

    def out(onehot, at):
        # The embedding is replaced by its differentiable form through a table of one row a position.
        rows = hidden(onehot)[0]
        moved = {**params, name: {"table": jnp.concatenate([rows, params[name]["table"][8:]])}}
        return model.apply(moved, jnp.arange(8, dtype=jnp.int32)[None]).hidden[0, at] @ jnp.arange(
            32, dtype=jnp.float32
        )  # a plain sum is constant after a norm

    gradient = jax.jit(jax.grad(out))
    for at in (0, 3, 7):
        influence = np.abs(np.asarray(gradient(x, at))).sum((0, 2))
        assert (influence[: at + 1] > 0).all(), influence
        assert (influence[at + 1 :] == 0).all(), influence


def test_packed_documents_give_what_each_gives_alone(network):
    _, params, logits = network
    parts = [tokens(1, n, seed=n) for n in (5, 7, 4)]
    packed = jnp.concatenate(parts, 1)
    segments = jnp.asarray([[1] * 5 + [2] * 7 + [3] * 4], jnp.int32)
    positions = jnp.asarray([[*range(5), *range(7), *range(4)]], jnp.int32)
    together = logits(params, packed, positions, segments)
    start = 0
    for part in parts:
        stop = start + part.shape[1]
        alone = logits(params, part, None, None)
        np.testing.assert_allclose(together[:, start:stop], alone, atol=3e-5)
        start = stop
    assert (
        np.abs(np.asarray(logits(params, packed, positions, None) - together)).max() > 0.01
    )  # the mask is what does it


@pytest.mark.parametrize(
    "execution",
    [Execution(scan=False), Execution(remat="full"), Execution(remat="dots"), Execution(remat="full", scan=False)],
    ids=lambda e: f"scan={e.scan} remat={e.remat}",
)
@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_scan_and_remat_change_neither_values_nor_gradients(execution, config):
    reference, other = build(config), build(config, execution)
    assert jax.tree.structure(reference.abstract, is_leaf=is_spec) == jax.tree.structure(
        other.abstract, is_leaf=is_spec
    )

    (value, gradient), (other_value, other_gradient) = (value_and_gradient(config, e) for e in (Execution(), execution))
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), gradient, other_gradient)


def test_dropout_is_drawn_from_the_key_and_off_without_one():
    model = build(dataclasses.replace(GPT, dropout=0.5))
    params = jax.jit(model.init)(jax.random.key(0))
    run = jax.jit(lambda key: model.apply(params, tokens(), key=key).hidden)
    first, again, other = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first - other)).max() > 0.1
    off = jax.jit(lambda: model.apply(params, tokens()).hidden)()
    plain = build(GPT)
    np.testing.assert_allclose(off, jax.jit(lambda: plain.apply(params, tokens()).hidden)(), rtol=1e-6, atol=1e-6)


def test_bfloat16_stays_near_float32(network):
    model, params, logits = network
    half = build(model.config, Execution(dtype="bfloat16"))
    low = jax.jit(lambda p: half.logits(p, half.apply(p, tokens()).hidden))(params)
    assert low.dtype == jnp.float32
    full = logits(params, tokens(), None, None)
    assert np.abs(np.asarray(low - full)).max() < 0.05 * np.abs(np.asarray(full)).max()


def test_cache_gives_what_the_whole_sequence_gives(network):
    model, params, logits = network
    ids = tokens(2, 12)
    full = logits(params, ids, None, None)
    at = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], (2, 12))

    @jax.jit
    def step(ids, at, cache):
        hidden, cache = model.decode(params, ids, at, cache)
        return model.logits(params, hidden), cache

    first, cache = step(ids[:, :7], at[:, :7], model.empty_cache(2, 14))
    parts = [first]
    for i in range(7, 12):
        logits_of_one, cache = step(ids[:, i : i + 1], at[:, i : i + 1], cache)
        parts.append(logits_of_one)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=3e-5)


def test_rotary_positions_are_relative():
    model = build(LLAMA)
    params = parameters(LLAMA)
    ids = tokens(1, 9)
    run = jax.jit(lambda at: model.apply(params, ids, at).hidden)
    at = jnp.arange(9, dtype=jnp.int32)[None]
    np.testing.assert_allclose(run(at), run(at + 1000), atol=2e-3)
    assert np.abs(np.asarray(run(at) - run(at * 2))).max() > 0.05


def test_initialization_is_of_the_size_that_the_config_says():
    config = dataclasses.replace(GPT, model_dim=128, num_heads=4, num_layers=8, init_std=0.02)
    params = jax.jit(build(config).init)(jax.random.key(0))
    block = params["decoder"]["stack"]["block"]
    assert np.std(params["embed"]["table"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(block["mlp"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    assert np.std(block["mlp"]["down"]["kernel"]) == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert np.std(block["attention"]["out"]["kernel"]) == pytest.approx(0.005, rel=0.02)
    per_layer = np.asarray(block["mlp"]["up"]["kernel"])
    assert abs(np.corrcoef(per_layer[0].ravel(), per_layer[1].ravel())[0, 1]) < 0.02  # a key a layer
    for init, size in (
        ("xavier_uniform", math.sqrt(2 / (128 + 512))),
        ("he_normal", math.sqrt(2 / 128)),
        ("truncated_normal", 0.02),
    ):
        kernel = jax.jit(build(dataclasses.replace(config, init=init)).init)(jax.random.key(0))["decoder"]["stack"][
            "block"
        ]["mlp"]["up"]["kernel"]
        assert np.std(kernel) == pytest.approx(size, rel=0.02), init
    assert np.abs(kernel).max() <= 2 * 0.02 / 0.8796 + 1e-6


def test_untrained_loss_is_the_logarithm_of_the_vocabulary():
    config = ModelConfig(vocab_size=50_257, num_layers=1, model_dim=64, num_heads=2, max_length=16)
    model = build(config)

    def loss(key):
        params = model.init(key)
        return -jax.nn.log_softmax(model.logits(params, model.apply(params, tokens(2, 16)).hidden)).mean()

    assert float(jax.jit(loss)(jax.random.key(0))) == pytest.approx(10.825, abs=0.03)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("gpt3-175b", 174_604_259_328),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count):
    assert parameter_count(preset(name)) == count


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(Exception, match='did you mean "llama-3-8b"'):
        preset("llama3-8b")
