"""The choice of experts, and the losses by their published values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.config import ModelConfig, MoEConfig
from maxpretrain.nn import base, router
from maxpretrain.nn.router import Routing

# Compiled whole: one operation at a time, each is compiled by itself.
route = jax.jit(router.route, static_argnums=1)
statistics = jax.jit(router.statistics, static_argnums=2)
LOSSES = {name: jax.jit(loss, static_argnums=1) for name, loss in router.LOSSES.items()}
smooth_load = jax.jit(router.smooth_load, static_argnums=3)

LOGITS = jnp.asarray([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0]])
P1 = np.exp([2.0, 1.0, 0.0, -1.0]) / np.exp([2.0, 1.0, 0.0, -1.0]).sum()  # .6439 .2369 .0871 .0321


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


def test_softmax_then_top_k():
    plain = route(LOGITS, MoEConfig(num_experts=4, top_k=2, renormalize=False))
    np.testing.assert_array_equal(plain.choice, [[0, 1], [2, 0]])  # of equal scores the first
    np.testing.assert_allclose(plain.weights[0], [0.6439142, 0.2368828], atol=1e-6)
    np.testing.assert_allclose(plain.probability[0], P1, atol=1e-6)
    scaled = route(LOGITS, MoEConfig(num_experts=4, top_k=2, scale=3.0))
    # Of two experts renormalized, e/(1+e) and 1/(1+e).
    np.testing.assert_allclose(scaled.weights[0], [3 * 0.7310586, 3 * 0.2689414], atol=1e-6)
    top = route(LOGITS, MoEConfig(num_experts=4, top_k=1, renormalize=False))
    np.testing.assert_allclose(top.weights[0], [0.6439142], atol=1e-6)


def test_every_expert():
    routing = route(LOGITS, MoEConfig(num_experts=4, top_k=4))
    np.testing.assert_array_equal(np.sort(routing.choice), [[0, 1, 2, 3]] * 2)
    np.testing.assert_allclose(routing.weights[0], P1, atol=1e-6)


def test_sigmoid_chooses_by_score_and_bias_and_weighs_by_score():
    config = MoEConfig(num_experts=4, top_k=2, router="sigmoid", scale=2.5)
    routing = route(LOGITS[:1], config, jnp.asarray([0.0, 0.0, 0.0, 0.7]))
    # Scores .881 .731 .5 .269, with the bias the last is .969.
    np.testing.assert_array_equal(routing.choice, [[3, 0]])
    score = sigmoid([-1.0, 2.0])
    np.testing.assert_allclose(routing.weights[0], 2.5 * score / score.sum(), rtol=1e-6)
    np.testing.assert_allclose(routing.probability[0], sigmoid(LOGITS[0]) / sigmoid(LOGITS[0]).sum(), rtol=1e-6)


def test_groups_keep_the_choice_within_them():
    # The best expert of all, 0, stands alone in its group: the two best of the second group are more together.
    logits = jnp.asarray([[3.0, -3.0, 2.0, 1.5, -2.0, 0.0]])

    def of(name, **more):
        return route(logits, MoEConfig(num_experts=6, top_k=2, groups=3, top_groups=1, router=name, **more))

    np.testing.assert_array_equal(of("sigmoid").choice, [[2, 3]])
    np.testing.assert_array_equal(of("softmax").choice, [[0, 1]])  # by the best of the group
    two = route(logits, MoEConfig(num_experts=6, top_k=3, groups=3, top_groups=2, router="sigmoid"))
    np.testing.assert_array_equal(two.choice, [[0, 2, 3]])
    # A bias moves the choice of the group as well.
    biased = route(
        logits, MoEConfig(num_experts=6, top_k=2, groups=3, router="sigmoid"), jnp.asarray([0, 0, 0, 0, 1.0, 1.0])
    )
    np.testing.assert_array_equal(biased.choice, [[5, 4]])


def test_groups_of_one_expert():
    config = MoEConfig(num_experts=4, top_k=2, groups=4, top_groups=2, router="sigmoid")
    np.testing.assert_array_equal(route(LOGITS[:1], config).choice, [[0, 1]])


def test_the_bias_gets_no_gradient():
    config = MoEConfig(num_experts=4, top_k=2, router="sigmoid", groups=2, top_groups=1)

    def loss(bias, logits):
        return jnp.sum(route(logits, config, bias).weights ** 2)

    d_bias, d_logits = jax.jit(jax.grad(loss, (0, 1)))(jnp.zeros(4), LOGITS)
    np.testing.assert_array_equal(d_bias, np.zeros(4))
    assert np.abs(d_logits).max() > 1e-3


def test_extreme_logits_stay_finite():
    for name in ("softmax", "sigmoid"):
        config = MoEConfig(num_experts=4, top_k=2, router=name)

        def loss(logits, config=config):
            routing = route(logits, config)
            return sum(jnp.sum(v) for v in statistics(routing, jnp.ones((1, 2), bool)).values()) + routing.weights.sum()

        logits = jnp.asarray([[[1e4, -1e4, 0.0, 0.0], [-40.0, -40.0, -40.0, -40.0]]])
        value, grad = jax.jit(jax.value_and_grad(loss))(logits)
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


def test_statistics_count_real_tokens_only():
    config = MoEConfig(num_experts=4, top_k=2, renormalize=False)
    logits = jnp.stack([LOGITS, LOGITS[::-1], LOGITS])  # [3, 2, 4]
    real = jnp.asarray([[True, False], [True, True], [False, False]])
    sums = statistics(route(logits, config), real)
    assert {name: value.shape for name, value in sums.items()} == {
        "load": (4,),
        "probability": (4,),
        "importance": (4,),
        "tokens": (),
        "logsumexp_squared": (),
        "entropy": (),
        "dropped": (),
        "sequences": (),
        "sequence_balance": (),
    }
    assert {value.dtype for value in sums.values()} == {jnp.dtype("float32")}
    # Twice the first token (experts 0 and 1), once the second (2 and 0).
    np.testing.assert_array_equal(sums["load"], [3, 2, 1, 0])
    p2 = np.exp([0.0, 0.0, 3.0, 0.0]) / np.exp([0.0, 0.0, 3.0, 0.0]).sum()
    np.testing.assert_allclose(sums["probability"], 2 * P1 + p2, rtol=1e-5)
    np.testing.assert_allclose(sums["importance"], [2 * P1[0] + p2[0], 2 * P1[1], p2[2], 0], rtol=1e-5)
    assert (float(sums["tokens"]), float(sums["sequences"]), float(sums["dropped"])) == (3, 2, 0)
    lse = [math.log(np.exp(row).sum()) for row in ([2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0])]
    assert float(sums["logsumexp_squared"]) == pytest.approx(2 * lse[0] ** 2 + lse[1] ** 2, rel=1e-5)
    entropies = [-(p * np.log(p)).sum() for p in (P1, p2)]
    assert float(sums["entropy"]) == pytest.approx(2 * entropies[0] + entropies[1], rel=1e-5)
    # First sequence: f = 4/(2·1)·(1,1,0,0); second: 4/(2·2)·(2,1,1,0).
    balance = 2 * (P1[0] + P1[1]) + np.dot([2, 1, 1, 0], (P1 + p2) / 2)
    assert float(sums["sequence_balance"]) == pytest.approx(balance, rel=1e-5)


def test_dropped_choices_are_counted_by_sequence():
    logits = jnp.stack([jnp.tile(LOGITS[:1], (3, 1)), jnp.tile(LOGITS[1:], (3, 1))])
    routing = route(logits, MoEConfig(num_experts=4, top_k=2))
    real = jnp.asarray([[True, True, True], [True, True, False]])
    # Three tokens want 0 and 1, two want 2 and 0; one place an expert and sequence.
    assert float(statistics(routing, real, 1)["dropped"]) == 2 + 2 + 1 + 1
    assert float(statistics(routing, real, 2)["dropped"]) == 1 + 1


def of_tokens(logits, **config):
    """Statistics of one sequence of tokens."""
    logits = jnp.asarray(logits, jnp.float32)[None]
    routing = route(logits, MoEConfig(num_experts=logits.shape[-1], **config))
    return statistics(routing, jnp.ones(logits.shape[:2], bool))


def test_importance():
    assert float(router.squared_variation(jnp.asarray([1.0, 2.0, 3.0, 4.0]))) == pytest.approx(0.20)
    assert float(router.mean_square(jnp.asarray([1.0, 2.0, 3.0, 4.0]))) == pytest.approx(7.5)
    layers = jnp.asarray([[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    np.testing.assert_allclose(router.squared_variation(layers), [0.2, 0.0], atol=1e-6)


def test_counted_load():
    def loss(load, tokens):
        return float(router.counted_load_loss(jnp.asarray(load), jnp.float32(tokens)))

    assert loss([2.0, 2.0, 2.0, 2.0], 8) == 1.0
    assert loss([8.0, 0.0, 0.0, 0.0], 8) == 4.0
    assert loss([4.0, 0.0, 2.0, 2.0], 8) == 1.5


def phi(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_smooth_load():
    clean = jnp.asarray([[1.0, 0.0, -1.0], [0.0, 0.5, 0.0]])
    noisy = jnp.asarray([[1.5, 0.5, -1.0], [0.0, 0.25, 1.0]])
    # One choice a token. First token: expert 0 against 0.5, others against 1.5. Second: 2 against 0.25, others against 1.
    expected = [
        phi((1.0 - 0.5) / 0.5) + phi(-1.0 / 0.5),
        phi(-1.5 / 0.5) + phi(-0.5 / 0.5),
        phi(-2.5 / 0.5) + phi(-0.25 / 0.5),
    ]
    np.testing.assert_allclose(smooth_load(clean, noisy, jnp.full((2, 1), 0.5), 1), expected, atol=1e-6)
    # Two choices: the first token's experts 0 and 1 against the best of the others' second, −1; expert 2 against 0.5.
    two = smooth_load(clean[:1], noisy[:1], jnp.full((1, 3), 0.5), 2)
    np.testing.assert_allclose(two, [phi(4.0), phi(2.0), phi(-3.0)], atol=1e-6)
    np.testing.assert_array_equal(smooth_load(clean, noisy, jnp.full((2, 1), 0.5), 3), [2, 2, 2])
    loss = jax.grad(lambda c: router.squared_variation(smooth_load(c, noisy, jnp.full((2, 1), 0.5), 1)))
    grad = jax.jit(loss)(clean)
    assert np.isfinite(grad).all()
    assert np.abs(grad).min() > 0


def test_smooth_load_is_how_often_an_expert_is_chosen():
    """Noise drawn again and again for one expert at a time: the share of the draws in which it is among the best two."""
    rng = np.random.default_rng(5)
    clean, std = rng.normal(size=(1, 4)), np.array([[0.5, 1.0, 0.2, 0.8]])
    noisy = clean + std * rng.normal(size=(1, 4))
    for expert in range(4):
        others = np.delete(noisy[0], expert)
        again = clean[0, expert] + std[0, expert] * rng.normal(size=200_000)
        share = (again > np.sort(others)[-2]).mean()
        found = smooth_load(*(jnp.asarray(x, jnp.float32) for x in (clean, noisy, std)), 2)[expert]
        assert float(found) == pytest.approx(share, abs=0.005)


def test_smooth_load_leaves_padding_out():
    rng = np.random.default_rng(6)
    clean, noisy = (jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32) for _ in range(2))
    real = jnp.arange(5)[None] < jnp.asarray([[5], [2]])
    std = jnp.full((1, 1, 1), 0.7)
    kept = [clean[0], clean[1, :2]], [noisy[0], noisy[1, :2]]
    expected = sum(smooth_load(c, n, std[0], 2) for c, n in zip(*kept, strict=True))
    found = jax.jit(lambda c, n: router.smooth_load(c, n, std, 2, real))(clean, noisy)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_noise_has_the_size_that_is_learned():
    """softplus(0) + 0.01 at first, for its matrix begins at 0; then what the matrix says of each token."""
    config = ModelConfig(model_dim=8, num_heads=2, moe=MoEConfig(num_experts=4, noisy=True))
    template = base.Template(router.Noise(config))
    params = base.init(template.abstract, jax.random.key(0))
    x, clean = jnp.ones((64, 32, 8)), jnp.zeros((64, 32, 4))
    noise = jax.jit(lambda params: template.bind(params)(x, clean, jax.random.key(1)))
    noisy, std = noise(params)
    np.testing.assert_allclose(std, math.log(2) + 0.01, rtol=1e-6)
    assert float(noisy.std()) == pytest.approx(math.log(2) + 0.01, rel=0.02)
    assert abs(float(noisy.mean())) < 0.02
    grown, std = noise({"kernel": jnp.full((8, 4), 0.25)})
    np.testing.assert_allclose(std, math.log1p(math.exp(2)) + 0.01, rtol=1e-6)
    assert float(grown.std()) == pytest.approx(float(std[0, 0, 0]), rel=0.02)


def test_switch():
    even = jnp.full((4,), 2.0)
    assert float(router.switch_loss(even, even, jnp.float32(8))) == 1.0
    sums = of_tokens([[10.0, 5.0, 0.0, 0.0]], top_k=2)
    assert float(LOSSES["switch"](sums, 2)) == pytest.approx(3.99964, abs=5e-6)
    assert float(LOSSES["switch_mean"](sums, 2)) == pytest.approx(1.99982, abs=5e-6)


def test_switch_gradient_is_that_of_the_probabilities():
    logits = jnp.asarray([[1.0, 0.5, 0.0], [0.0, 2.0, 0.0], [0.3, 0.2, 0.1]])

    def loss(logits):
        return LOSSES["switch"](of_tokens(logits, top_k=1), 1)

    f = jnp.asarray([2.0, 1.0, 0.0]) / 3

    def dense(logits):
        return 3 * jnp.sum(f * jnp.mean(jax.nn.softmax(logits), 0))

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(logits), jax.jit(jax.grad(dense))(logits), atol=1e-6)


def test_z_loss():
    sums = of_tokens([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], top_k=1)
    assert float(LOSSES["z"](sums, 1)) == pytest.approx(6.40936, abs=5e-6)


def test_sequence_loss():
    assert float(LOSSES["sequence"](of_tokens(np.zeros((4, 4)), top_k=4), 4)) == pytest.approx(1.0)
    # Sigmoid scores, two experts of four: f = 4/(2·1)·(1,1,0,0), P = scores over their sum.
    sums = of_tokens([[2.0, 1.0, 0.0, -1.0]], top_k=2, router="sigmoid")
    score = sigmoid([2.0, 1.0, 0.0, -1.0])
    assert float(LOSSES["sequence"](sums, 2)) == pytest.approx(2 * score[:2].sum() / score.sum(), rel=1e-6)


def test_bias_update():
    bias = router.updated_bias(jnp.zeros(4), jnp.asarray([4.0, 0.0, 2.0, 2.0]), 0.001)
    np.testing.assert_allclose(bias, [-0.001, 0.001, 0.0, 0.0], atol=1e-9)
    layers = router.updated_bias(jnp.ones((2, 2)), jnp.asarray([[1.0, 3.0], [2.0, 2.0]]), 0.5)
    np.testing.assert_allclose(layers, [[1.5, 0.5], [1.0, 1.0]])


def test_losses_keep_layers_and_add_up_over_microbatches():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 6, 5)), jnp.float32)
    real = jnp.asarray(rng.random((4, 6)) < 0.8)
    config = MoEConfig(num_experts=5, top_k=2)

    def of(rows):
        noisy = router.smooth_load(logits[rows], logits[rows], jnp.ones((1, 1, 1)), 2, real[rows])
        return statistics(route(logits[rows], config), real[rows]) | {"smooth_load": noisy}

    whole, halves = of(slice(None)), (of(slice(0, 2)), of(slice(2, 4)))
    added = jax.tree.map(jnp.add, *halves)
    layers = jax.tree.map(lambda *a: jnp.stack(a), *halves)
    for name, loss in LOSSES.items():
        assert float(loss(added, 2)) == pytest.approx(float(loss(whole, 2)), rel=1e-5), name
        np.testing.assert_allclose(loss(layers, 2), [loss(half, 2) for half in halves], rtol=1e-5)


def test_nothing_to_route_is_zero():
    logits = jnp.ones((2, 3, 4))

    def total(logits):
        real = jnp.zeros((2, 3), bool)
        sums = statistics(route(logits, MoEConfig(num_experts=4, top_k=2)), real)
        sums["smooth_load"] = router.smooth_load(logits, logits, jnp.ones((1, 1, 1)), 2, real)
        return sum(loss(sums, 2) for loss in LOSSES.values())

    value, grad = jax.jit(jax.value_and_grad(total))(logits)
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, np.zeros((2, 3, 4)))


def test_routing_is_a_plain_tuple():
    assert Routing._fields == ("choice", "weights", "logits", "probability")
