"""Mixtures of experts against a loop over tokens in float64, and on meshes against one device."""

import functools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain import mesh
from maxpretrain.config import MeshConfig, ModelConfig, MoEConfig
from maxpretrain.nn import base
from maxpretrain.nn.linear import PRODUCT
from maxpretrain.nn.mlp import MLP
from maxpretrain.nn.moe import MoE, _sorted, dropless, limited, num_places

D, X = 12, 8
SWIGLU = {"gated": True, "activation": "silu", "bias": False}
KINDS = {
    "mixtral": (MoEConfig(num_experts=X, top_k=2), SWIGLU),
    "olmoe": (MoEConfig(num_experts=X, top_k=3, renormalize=False), SWIGLU),
    "deepseek": (
        MoEConfig(
            num_experts=X,
            top_k=3,
            router="sigmoid",
            groups=4,
            top_groups=2,
            balance_bias=True,
            scale=2.5,
            shared_dim=20,
        ),
        SWIGLU,
    ),
    "switch": (
        MoEConfig(num_experts=X, top_k=1, renormalize=False, capacity=1.25),
        {"activation": "relu", "bias": True},
    ),
    "capacity": (
        MoEConfig(num_experts=X, top_k=2, capacity=1.0, shared_dim=8),
        {"activation": "gelu_tanh", "mlp_bias": False},
    ),
    "all": (MoEConfig(num_experts=X, top_k=X), SWIGLU),
}


class Case:
    """A layer, its parameters, inputs and which of them are real."""

    def __init__(self, moe, more, rows=8, length=10):
        self.config = ModelConfig(vocab_size=9, num_layers=1, model_dim=D, num_heads=2, mlp_dim=16, moe=moe, **more)
        self.template = base.Template(MoE(self.config))
        rng = np.random.default_rng(0)
        draw = lambda spec: jnp.asarray(0.3 * rng.normal(size=spec.shape), jnp.float32)  # noqa: E731
        self.params = jax.tree.map(draw, self.template.abstract, is_leaf=base.is_spec)
        self.x = jnp.asarray(rng.normal(size=(rows, length, D)), jnp.float32)
        # Padding within rows too, a row of nothing else, a row without.
        real = rng.random((rows, length)) < 0.7
        real[0], real[1] = True, False
        self.real, self.all = jnp.asarray(real), jnp.ones((rows, length), bool)
        self._step = jax.jit(jax.value_and_grad(self.loss, (0, 1), has_aux=True))

    def apply(self, params, x, real=None):
        return self.template.bind(params)(x, real)

    def loss(self, params, x, real):
        """Something with a gradient through the outputs and the statistics."""
        y, sums = self.apply(params, x, real)
        waves = jnp.sin(jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape))
        return jnp.sum(y * waves) + sum(jnp.sum(s) for s in sums.values()), (y, sums)

    def run(self, real, *, params=None, x=None):
        """(Loss, (y, sums)), gradients by parameters and x."""
        return self._step(self.params if params is None else params, self.x if x is None else x, real)


@functools.cache
def case_of(kind):
    return Case(*KINDS[kind])


def expert_mlp(config, kernels, x):
    act = {"silu": lambda h: h / (1 + np.exp(-h)), "relu": lambda h: np.maximum(h, 0)}.get(
        config.activation,
        lambda h: 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    )
    up = x @ kernels["up"]
    return (act(x @ kernels["gate"]) * up if config.gated else act(up)) @ kernels["down"]


def choose(moe, scores, bias):
    """Expert numbers, best first, by sorting; of equal scores the first."""
    wanted = scores + bias
    best = lambda a, n: np.argsort(-a, kind="stable")[:n]  # noqa: E731
    if moe.groups > 1:
        groups = wanted.reshape(moe.groups, -1)
        kept = best(np.sort(groups, -1)[:, -2:].sum(-1), moe.top_groups)
        allowed = np.repeat(np.isin(np.arange(moe.groups), kept), groups.shape[1])
        wanted = np.where(allowed, wanted, -np.inf)
    return best(wanted, moe.top_k)


def by_token(case, real):
    """Output, load and number of dropped choices."""
    config, moe = case.config, case.config.moe
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), case.params)
    x = np.asarray(case.x, np.float64)
    y, load, dropped = np.zeros_like(x), np.zeros(X), 0
    kernels = {name: params["experts"][name]["kernel"] for name in params["experts"]}
    places = math.inf if moe.capacity is None else math.ceil(moe.capacity * x.shape[1] * moe.top_k / X)
    for b in range(x.shape[0]):
        taken = np.zeros(X)
        for t in range(x.shape[1]):
            if "shared" in params:
                y[b, t] = expert_mlp(config, {name: p["kernel"] for name, p in params["shared"].items()}, x[b, t])
            if not real[b, t]:
                continue
            logits = x[b, t] @ params["router"]["kernel"]
            scores = 1 / (1 + np.exp(-logits)) if moe.router == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
            choice = choose(moe, scores, params.get("balance_bias", 0.0))
            weights = scores[choice]
            if moe.renormalize:
                weights = weights / weights.sum()
            for e, weight in zip(choice, weights * moe.scale, strict=True):
                load[e] += 1
                if taken[e] == places:
                    dropped += 1
                    continue
                taken[e] += 1
                y[b, t] += weight * expert_mlp(config, {n: k[e] for n, k in kernels.items()}, x[b, t])
    return y, load, dropped


@pytest.mark.parametrize("kind", KINDS)
def test_against_a_loop_over_tokens(kind):
    case = case_of(kind)
    for real in (case.all, case.real):
        (_, (y, sums)), _ = case.run(real)
        mask = np.asarray(real)
        expected, load, dropped = by_token(case, mask)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, expected, atol=5e-6)
        np.testing.assert_array_equal(sums["load"], load)
        assert float(sums["dropped"]) == dropped
        assert float(sums["tokens"]) == mask.sum()
        assert (dropped > 0) == (case.config.moe.capacity is not None)


def choices(case):
    """Which experts each token chooses: bool [B, T, X]."""
    moe, params = case.config.moe, case.params
    logits = np.asarray(case.x, np.float64) @ np.asarray(params["router"]["kernel"], np.float64)
    scores = logits if moe.router == "softmax" else 1 / (1 + np.exp(-logits))
    rows = (scores + np.asarray(params.get("balance_bias", 0.0))).reshape(-1, X)
    chosen = np.zeros(rows.shape, bool)
    for row, wanted in zip(chosen, rows, strict=True):
        row[choose(moe, wanted, 0.0)] = True
    return chosen.reshape(scores.shape)


def dense(case, chosen, params, x, real):
    """The layer as every token through every expert, weighted by zero where not chosen."""
    config, moe = case.config, case.config.moe
    logits = x @ params["router"]["kernel"]
    scores = jax.nn.softmax(logits) if moe.router == "softmax" else jax.nn.sigmoid(logits)
    probability = scores / scores.sum(-1, keepdims=True)
    weights = jnp.where(chosen, scores, 0.0)
    if moe.renormalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    weights = weights * moe.scale
    importance = weights.sum((0, 1))
    if moe.capacity is not None:
        places = num_places(moe.capacity, x.shape[1], moe.top_k, X)
        weights = jnp.where(np.cumsum(chosen, 1) - chosen < places, weights, 0.0)
    kernels = {name: p["kernel"] for name, p in params["experts"].items()}
    act = {"silu": jax.nn.silu, "relu": jax.nn.relu, "gelu_tanh": jax.nn.gelu}[config.activation]
    hidden = jnp.einsum("btd,xdf->btxf", x, kernels["up"])
    if config.gated:
        hidden = act(jnp.einsum("btd,xdf->btxf", x, kernels["gate"])) * hidden
    else:
        hidden = act(hidden)
    y = jnp.einsum("btx,btxf,xfd->btd", weights, hidden, kernels["down"])
    if "shared" in params:
        shared = base.Template(MLP(config, moe.shared_dim)).bind(params["shared"])
        y = y + shared(x)
    waves = jnp.sin(jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape))
    mask = jnp.asarray(real, jnp.float32)
    lengths = jnp.maximum(mask.sum(1), 1.0)[:, None]
    probabilities = (probability * mask[..., None]).sum(1)
    sums = jnp.sum(probabilities) + jnp.sum(importance)
    sums = sums + jnp.sum(mask * jax.nn.logsumexp(logits, -1) ** 2)
    sums = sums - jnp.sum(mask[..., None] * probability * jnp.log(probability))
    sums = sums + jnp.sum((X / moe.top_k) * chosen.sum(1) / lengths * probabilities / lengths)
    return jnp.sum(y * waves) + sums


@pytest.mark.parametrize("kind", ["olmoe", "deepseek", "capacity"])
def test_gradients_against_a_dense_formula(kind):
    case = case_of(kind)
    _, (d_params, d_x) = case.run(case.real)
    chosen = choices(case) & np.asarray(case.real)[..., None]
    f = jax.jit(jax.grad(partial(dense, case, chosen), (0, 1)))
    expected, expected_x = f(case.params, case.x, case.real)
    np.testing.assert_allclose(d_x, expected_x, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), d_params, expected)
    if "balance_bias" in d_params:
        np.testing.assert_array_equal(d_params["balance_bias"], np.zeros(X))


@pytest.mark.parametrize("kind", ["mixtral", "capacity"])
def test_padding_disturbs_nothing(kind):
    case = case_of(kind)
    garbage = jnp.where(case.real[..., None], case.x, 100.0 * jnp.ones_like(case.x))
    (_, (y, sums)), (d_params, _) = case.run(case.real)
    (_, (other, other_sums)), (other_d_params, _) = case.run(case.real, x=garbage)
    np.testing.assert_array_equal(np.asarray(y)[case.real], np.asarray(other)[case.real])
    for name, value in sums.items():
        np.testing.assert_array_equal(value, other_sums[name], err_msg=name)
    if kind == "mixtral":  # nothing shared: experts and router see real tokens alone
        np.testing.assert_array_equal(np.asarray(y)[~np.asarray(case.real)], 0.0)
        jax.tree.map(np.testing.assert_array_equal, d_params, other_d_params)


def test_a_token_finds_a_place_whatever_comes_later():
    case = case_of("capacity")
    (_, (whole, _)), _ = case.run(case.all)
    changed = np.array(case.x)
    changed[:, 6:], changed[2] = -3.0, 1.0
    (_, (y, _)), _ = case.run(case.all, x=jnp.asarray(changed))
    np.testing.assert_array_equal(y[0, :6], whole[0, :6])


def test_places():
    assert num_places(1.25, 10, 1, 8) == 2  # 1.5625
    assert num_places(1.0, 16, 2, 8) == 4
    assert num_places(0.01, 16, 2, 8) == 1
    assert num_places(100.0, 16, 2, 8) == 16
    assert num_places(1.1, 100, 1, 11) == 10


def test_order_of_choices():
    experts = jnp.asarray([[3, 1, 3, 0, 1], [2, 2, 0, 9, 2]], jnp.int32)
    for num_experts in (9, 2**30):  # by one number, and by two where one would not hold them
        order, by_expert = _sorted(experts, num_experts)
        np.testing.assert_array_equal(order, [[3, 1, 4, 0, 2], [2, 0, 1, 4, 3]])
        np.testing.assert_array_equal(by_expert, [[0, 1, 1, 3, 3], [0, 2, 2, 2, 9]])


def test_slots():
    choice = jnp.asarray([[1, 0], [1, 2], [3, 3], [0, 1]], jnp.int32)  # of three experts; the third token has none
    slots, sizes = dropless(choice, 3)
    np.testing.assert_array_equal(sizes, [2, 3, 1])
    np.testing.assert_array_equal(slots.of_choice, [[2, 0], [3, 5], [8, 8], [1, 4]])
    np.testing.assert_array_equal(slots.choice, [1, 6, 0, 2, 7, 3, 8, 8])
    # Two sequences, one place an expert: slots of expert 0 are 0 and 1.
    slots = limited(choice.reshape(2, 2, 2), 3, 1)
    np.testing.assert_array_equal(slots.of_choice, [[2, 0], [6, 4], [6, 6], [1, 3]])
    np.testing.assert_array_equal(slots.choice, [1, 6, 0, 7, 3, 8])


def test_places_enough_for_all_are_dropless():
    dropless, roomy = case_of("mixtral"), Case(MoEConfig(num_experts=X, top_k=2, capacity=100.0), SWIGLU)
    (_, (y, _)), grads = dropless.run(dropless.real)
    (_, (other, sums)), other_grads = roomy.run(dropless.real)
    np.testing.assert_allclose(y, other, atol=1e-6)
    assert float(sums["dropped"]) == 0.0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, other_grads)


def test_experts_without_a_token():
    case = case_of("mixtral")
    # All positive inputs, and a router that likes experts 2 and 5 and no other.
    x = jnp.abs(case.x)
    liked = jnp.zeros((D, X)).at[:, jnp.asarray([2, 5])].set(1.0)
    params = case.params | {"router": {"kernel": liked}}
    (_, (y, sums)), (grads, _) = case.run(case.all, params=params, x=x)
    np.testing.assert_array_equal(sums["load"], [0, 0, 80, 0, 0, 80, 0, 0])
    kernels = {n: np.asarray(p["kernel"], np.float64) for n, p in params["experts"].items()}
    expected = sum(
        0.5 * expert_mlp(case.config, {n: k[e] for n, k in kernels.items()}, np.asarray(x, np.float64)) for e in (2, 5)
    )
    np.testing.assert_allclose(y, expected, atol=5e-6)
    for name in kernels:
        grad = np.asarray(grads["experts"][name]["kernel"])
        np.testing.assert_array_equal(grad[[0, 1, 3, 4, 6, 7]], 0.0)
        assert np.abs(grad[[2, 5]]).min(axis=(1, 2)).max() > 0


MESHES = {
    "data fsdp expert": {"data": 2, "fsdp": 2, "expert": 2},
    "fsdp expert tensor": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    "expert": {"data": 1, "expert": 8},
}


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("mixtral", "data fsdp expert"),
        ("deepseek", "fsdp expert tensor"),
        ("deepseek", "expert"),
        ("capacity", "fsdp expert tensor"),
    ],
)
def test_on_a_mesh_as_on_one_device(kind, axes):
    case = case_of(kind)
    (loss, (y, sums)), grads = case.run(case.real)
    layout = mesh.make_layout(MeshConfig(**MESHES[axes]))
    layout.check(case.template.abstract, case.x.shape[0])
    place = lambda value, sharding: jax.tree.map(jax.device_put, value, sharding)  # noqa: E731
    shardings = layout.param_shardings(case.template.abstract)
    tokens = layout.batch_sharding()
    f = jax.jit(jax.value_and_grad(case.loss, (0, 1), has_aux=True), out_shardings=(None, (shardings, tokens)))
    with mesh.use(layout):
        inputs = place(case.params, shardings), place(case.x, tokens), place(case.real, tokens)
        compiled = f.lower(*inputs).compile()
        (got_loss, (got_y, got_sums)), got_grads = compiled(*inputs)
    # No device gathers the whole batch of anything.
    assert re.findall(r"\[8,10,\d+\]\S* all-(?:gather|to-all|reduce)", compiled.as_text()) == []
    np.testing.assert_allclose(got_y, y, atol=2e-6)
    np.testing.assert_array_equal(got_sums["load"], sums["load"])
    np.testing.assert_allclose(got_loss, loss, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got_sums, sums)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), got_grads, grads)
    got_up = got_grads[0]["experts"]["up"]["kernel"]
    cut = [MESHES[axes].get(axis, 1) for axis in ("expert", "fsdp", "tensor")]
    assert got_up.sharding.shard_shape(got_up.shape) == (X // cut[0], D // cut[1], 16 // cut[2])


def test_in_a_stack_with_remat_on_a_mesh():
    config = case_of("mixtral").config

    class Layers(base.Module):
        def __init__(self):
            with base.stacked(2):
                self.moe = MoE(config)

    template = base.Template(Layers())
    rng = np.random.default_rng(0)
    draw = lambda spec: jnp.asarray(0.3 * rng.normal(size=spec.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, template.abstract, is_leaf=base.is_spec)
    x = jnp.asarray(rng.normal(size=(8, 6, D)), jnp.bfloat16)

    def loss(params, remat):
        body = lambda layer, x, _: (lambda y, sums: (x + y, sums))(*layer(x))  # noqa: E731
        policy = jax.checkpoint_policies.save_only_these_names(PRODUCT)
        y, sums = base.scan(template.bind(params).moe, body, x, None, loop=True, remat=remat, checkpoint_policy=policy)
        assert sums["load"].shape == (2, X)
        assert y.dtype == jnp.bfloat16
        return jnp.sum(jnp.square(y.astype(jnp.float32))) / x.size

    f = jax.jit(jax.grad(loss), static_argnums=1)
    plain = f(params, False)
    with mesh.use(mesh.make_layout(MeshConfig(data=2, expert=2, tensor=2))):
        other = f(params, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max()), other, plain)


def test_parameters():
    deepseek = case_of("deepseek").template.abstract
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="."): (spec.shape, spec.axes, spec.role)
        for path, spec in jax.tree_util.tree_leaves_with_path(deepseek, is_leaf=base.is_spec)
    }
    assert shapes == {
        "router.kernel": ((12, 8), ("embed", None), "matrix"),
        "balance_bias": ((8,), (None,), "buffer"),
        "experts.gate.kernel": ((8, 12, 16), ("expert", "embed", "mlp"), "matrix"),
        "experts.up.kernel": ((8, 12, 16), ("expert", "embed", "mlp"), "matrix"),
        "experts.down.kernel": ((8, 16, 12), ("expert", "mlp", "embed"), "matrix"),
        "shared.gate.kernel": ((12, 20), ("embed", "mlp"), "matrix"),
        "shared.up.kernel": ((12, 20), ("embed", "mlp"), "matrix"),
        "shared.down.kernel": ((20, 12), ("mlp", "embed"), "matrix"),
    }
    switch = case_of("switch").template.abstract
    assert set(switch) == {"router", "experts"}
    assert set(switch["experts"]) == {"up", "down"}
    assert set(switch["experts"]["up"]) == {"kernel"}  # biases are for plain MLPs


def test_expert_width_is_its_own():
    case = Case(MoEConfig(num_experts=4, expert_dim=20), SWIGLU)
    assert case.template.abstract["experts"]["down"]["kernel"].shape == (4, 20, 12)


def test_nothing_said_of_padding_is_none():
    case = case_of("mixtral")
    y, sums = jax.jit(case.apply)(case.params, case.x)
    np.testing.assert_array_equal(y, case.run(case.all)[0][1][0])
    assert float(sums["tokens"]) == 80
