"""The balance losses in a step: what they add, what they report, and the bias that follows the load."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain import mesh, optim
from maxpretrain.config import (
    BalanceConfig,
    BatchConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    Run,
    ScheduleConfig,
    validate,
)
from maxpretrain.errors import UserError
from maxpretrain.models import build
from maxpretrain.objectives import CLM, Loss
from maxpretrain.objectives.balance import balanced, of_whole, spread, with_updated_bias
from maxpretrain.train.state import abstract_state, init_state
from maxpretrain.train.step import make_train_step

MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=16, balance_bias=True)
MODEL = ModelConfig(
    vocab_size=32, num_layers=2, model_dim=16, num_heads=2, mlp_dim=16, max_length=16, moe=MOE, init_std=0.2
)
OPTIMIZER = OptimizerConfig(peak_lr=1e-2, schedule=ScheduleConfig(warmup=0))


def said(load, probability, tokens=8.0):
    """Statistics of one layer as nn.router makes them."""
    one = lambda x: jnp.asarray([x], jnp.float32)  # noqa: E731
    return {
        "load": one(load),
        "probability": one(probability),
        "importance": one(probability),
        "tokens": one(tokens),
        "logsumexp_squared": one(6.40936 * tokens),
        "entropy": one(0.5 * tokens),
        "dropped": one(4.0),
        "sequences": one(1.0),
        "sequence_balance": one(1.25),
        "smooth_load": one([1.0, 2.0, 3.0, 4.0]),
    }


def loss_with(statistics):
    return Loss(jnp.float32(30.0), jnp.float32(10.0), {}, statistics)


def means(loss):
    return {name: np.asarray(total / weight) for name, (total, weight) in loss.metrics.items()}


@pytest.mark.parametrize(
    ("kind", "expected"),
    # load [4, 0, 2, 2] of 4 tokens with 2 choices, probability even: 4·Σ f·P with f [1, 0, .5, .5], P .25 each.
    # Smooth load [1, 2, 3, 4]: CV² is 1.25/2.5² = 0.2.
    [
        ("switch", 2.0),
        ("switch_mean", 1.0),
        ("importance", 0.0),
        ("importance_mean_square", 1.0),
        ("smooth_load", 0.2),
        ("importance_load", 0.2),
        ("sequence", 1.25),
    ],
)
def test_what_each_kind_adds(kind, expected):
    config = BalanceConfig(loss=kind, weight=0.5)
    loss = balanced(loss_with(said([4, 0, 2, 2], [1, 1, 1, 1], 4.0)), config, MOE)
    assert float(loss.sum / loss.weight) == pytest.approx(3.0 + 0.5 * expected, rel=1e-6)
    assert means(loss)["load_balance"] == pytest.approx(expected, abs=1e-6)


def test_what_is_reported():
    config = BalanceConfig(loss="none", z_weight=0.1)
    moe = dataclasses.replace(MOE, capacity=1.0)
    loss = balanced(loss_with(said([4, 0, 2, 2], [1, 1, 1, 1], 4.0)), config, moe)
    found = means(loss)
    assert "load_balance" not in found
    assert found["router_z"] == pytest.approx(6.40936)
    assert float(loss.sum / loss.weight) == pytest.approx(3.0 + 0.640936)
    assert found["router_entropy"] == pytest.approx(0.5)
    np.testing.assert_allclose(found["expert_load"], [2.0, 0.0, 1.0, 1.0])  # of an even share
    assert float(spread(loss.experts)["expert_load_spread"]) == pytest.approx(0.7071068)  # √(2/4)
    assert found["dropped"] == pytest.approx(0.5)  # 4 of 8 choices


def test_no_experts_no_change():
    plain = Loss(jnp.float32(1.0), jnp.float32(1.0), {})
    assert balanced(plain, BalanceConfig(), MOE) is plain


def test_the_bias_moves_against_the_load():
    bias = jnp.zeros((2, 4))
    params = {"decoder": {"stack": {"experts": {"mlp": {"balance_bias": bias, "x": 1}}, "y": 2}}, "z": 3}
    load = jnp.asarray([[4.0, 0.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]])
    new = with_updated_bias(params, {"load": load}, BalanceConfig(bias_rate=0.001))
    np.testing.assert_allclose(
        new["decoder"]["stack"]["experts"]["mlp"]["balance_bias"], [[-0.001, 0.001, 0, 0], [0, 0, 0, 0]], atol=1e-9
    )
    assert new["decoder"]["stack"]["y"] == 2
    assert new["z"] == 3
    assert with_updated_bias(params, {"load": load}, BalanceConfig(bias_rate=0.0)) is params
    assert with_updated_bias(params, {}, BalanceConfig()) is params


def train(axes, devices, *, balance, microbatches=1, steps=3, noisy=False):
    model = build(dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, noisy=noisy)))
    how = {"steps": steps, "tokens_per_step": 128}
    tx = optim.build_optimizer(OPTIMIZER, decay_mask=optim.decay_mask(model.abstract), **how)
    rate = optim.schedule(OPTIMIZER.schedule, peak_lr=OPTIMIZER.peak_lr, **how)
    layout = mesh.make_layout(MeshConfig(**axes), jax.devices()[:devices])
    rng = np.random.default_rng(0)
    with mesh.use(layout):
        state = init_state(model, tx, layout, 0)
        make = make_train_step(model, CLM(), tx, OPTIMIZER, rate, seed=0, microbatches=microbatches, balance=balance)
        step = jax.jit(make)
        for _ in range(steps):
            raw = rng.integers(0, 32, (8, 17)).astype(np.int32)
            # Documents of two tokens in every other pair of rows: half the labels, and so microbatches of unequal weight.
            segments = 1 + np.where((np.arange(8) // 2 % 2 == 1)[:, None], np.arange(17)[None] // 2, 0)
            segments[7, 9:] = 0
            state, metrics = step(state, layout.global_batch(CLM().examples(raw, segments.astype(np.int32)), 8))
    return jax.device_get(metrics), np.asarray(state["params"]["decoder"]["stack"]["experts"]["mlp"]["balance_bias"])


@pytest.mark.parametrize(("kind", "noisy"), [("switch", False), ("importance_load", True)])
def test_statistics_are_of_the_global_batch(kind, noisy):
    balance = BalanceConfig(loss=kind, weight=0.1, bias_rate=0.01)
    one, bias = train({}, 1, balance=balance, noisy=noisy)
    many, bias_of_many = train({"data": 2, "expert": 2, "fsdp": 2}, 8, balance=balance, noisy=noisy)
    assert one["total_loss"] == pytest.approx(one["loss"] + 0.1 * one["load_balance"], rel=1e-6)
    for name in ("loss", "total_loss", "load_balance", "router_entropy", "expert_load", "expert_load_spread"):
        np.testing.assert_allclose(many[name], one[name], rtol=2e-5, err_msg=name)
    np.testing.assert_array_equal(bias, bias_of_many)
    assert np.abs(bias).max() == pytest.approx(0.03)  # three steps the same way for some expert
    assert one["expert_load"].shape == (4,)
    assert one["expert_load"].mean() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("given", "needs"),
    [
        ({"loss": "none"}, "nothing"),
        ({"loss": "switch", "weight": 0.0}, "nothing"),
        ({"loss": "none", "z_weight": 0.1}, "counts"),
        ({"loss": "switch", "weight": 0.0, "z_weight": 0.1}, "counts"),
        ({"loss": "sequence"}, "counts"),
        ({"loss": "importance", "z_weight": 0.1}, "all"),
        ({"loss": "importance", "over": "microbatch"}, "nothing"),
    ],
)
def test_what_a_microbatch_needs_of_the_whole(given, needs):
    assert of_whole(BalanceConfig(**given), MOE) == needs
    assert of_whole(BalanceConfig(**given), MoEConfig()) == "nothing"


def test_counting_tokens_is_no_forward_pass():
    """XLA drops what nothing needs: where tokens are only counted, a step has fewer products than with all statistics."""

    def products(**given):
        tx = optim.build_optimizer(OPTIMIZER, decay_mask=None, steps=3, tokens_per_step=128)
        rate = optim.schedule(OPTIMIZER.schedule, peak_lr=OPTIMIZER.peak_lr, steps=3, tokens_per_step=128)
        model = build(MODEL)
        layout = mesh.make_layout(MeshConfig(), jax.devices()[:1])
        balance = BalanceConfig(**given)
        with mesh.use(layout):
            make = make_train_step(model, CLM(), tx, OPTIMIZER, rate, seed=0, microbatches=2, balance=balance)
            batch = {n: jax.ShapeDtypeStruct((8, *shape), dtype) for n, (shape, dtype) in CLM().fields(16).items()}
            return jax.jit(make).lower(abstract_state(model, tx, layout), batch).compile().as_text().count(" dot(")

    assert products(loss="sequence", z_weight=0.1) < 0.85 * products(loss="switch")


def test_noise_is_of_training_and_learned():
    model = build(dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, noisy=True)))
    params = jax.jit(model.init)(jax.random.key(0))
    plain = jax.tree.map(lambda x: x, params)
    noise = plain["decoder"]["stack"]["experts"]["mlp"].pop("noise")["kernel"]
    assert noise.shape == (2, 16, 4)
    assert not noise.any()
    batch = CLM().examples(np.random.default_rng(0).integers(0, 32, (4, 17)).astype(np.int32))
    balance = BalanceConfig(loss="smooth_load", weight=1.0)

    @jax.jit
    def measured(params, key):
        def total(params):
            loss = balanced(CLM().loss(model, params, batch, key), balance, model.config.moe)
            return loss.sum, loss

        return jax.grad(total, has_aux=True)(params)

    quiet = CLM().loss(build(MODEL), plain, batch, None)
    slope, loss = measured(params, None)
    np.testing.assert_allclose(loss.metrics["task_loss"][0], quiet.sum, rtol=1e-6)
    assert not np.asarray(slope["decoder"]["stack"]["experts"]["mlp"]["noise"]["kernel"]).any()
    slope, drawn = measured(params, jax.random.key(1))
    assert abs(float(drawn.metrics["task_loss"][0] / quiet.sum) - 1) > 1e-4
    for part in ("noise", "router"):
        assert np.abs(slope["decoder"]["stack"]["experts"]["mlp"][part]["kernel"]).max() > 0
    assert means(drawn)["load_balance"] > 0


def test_a_loss_of_noise_needs_it():
    run = Run(model=dataclasses.replace(MODEL, vocab_size=None), balance=BalanceConfig(loss="smooth_load"))
    message = r'^balance.loss "smooth_load" goes by the noise on the router\'s logits, and model.moe.noisy is off; turn it on, or use'
    with pytest.raises(UserError, match=message):
        validate(run.replace(batch=BatchConfig(length=16)))
    for more in ({}, {"balance_bias": False, "groups": 2, "top_groups": 1, "top_k": 1}):  # chosen by more than logits
        moe = dataclasses.replace(MOE, noisy=True, **more)
        noisy = run.replace(model=dataclasses.replace(run.model, moe=moe), batch=BatchConfig(length=16))
        with pytest.raises(
            UserError, match=r'^balance\.loss "smooth_load" is of a choice by logits alone; turn model.moe.bal'
        ):
            validate(noisy)


def test_a_sum_over_microbatches_is_refused_where_there_are_some():
    balance = BalanceConfig(loss="importance_mean_square", over="microbatch")
    run = Run(model=dataclasses.replace(MODEL, vocab_size=None), balance=balance, batch=BatchConfig(length=16))
    validate(run)
    several = run.replace(batch=BatchConfig(length=16, microbatches=2))
    validate(several.replace(model=dataclasses.replace(run.model, moe=MoEConfig())))
    validate(several.replace(balance=dataclasses.replace(balance, over="batch")))
    with pytest.raises(
        UserError, match=r"grows with the tokens of a microbatch, and batch\.microbatches is 2; use balance\.over"
    ):
        validate(several)


@pytest.mark.parametrize("kind", ["switch", "sequence"])
def test_microbatches_balance_the_whole_batch(kind):
    # So heavy that the third loss would be another, were the statistics those of two sequences.
    balance = BalanceConfig(loss=kind, weight=1.0, z_weight=0.1 if kind == "sequence" else 0.0, bias_rate=0.01)
    whole, bias = train({}, 1, balance=balance)
    parts, bias_of_parts = train({}, 1, balance=balance, microbatches=4)
    np.testing.assert_array_equal(bias, bias_of_parts)
    names = ["loss", "total_loss", "load_balance", "expert_load", "expert_load_spread", "grad_norm"]
    for name in names + ["router_z"] * (kind == "sequence"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=2e-5, err_msg=name)
    alone, _ = train({}, 1, balance=dataclasses.replace(balance, over="microbatch"), microbatches=4)
    assert abs(float(alone["grad_norm"]) / float(whole["grad_norm"]) - 1) > 1e-3
