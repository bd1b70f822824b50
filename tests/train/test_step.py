"""One step: parts make a whole, meshes agree, state lies where its parameter lies, and what is not finite is skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain import mesh, optim
from maxpretrain.config import MeshConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from maxpretrain.models import build
from maxpretrain.nn.stack import Execution
from maxpretrain.objectives import CLM
from maxpretrain.train.state import abstract_state, init_state
from maxpretrain.train.step import accumulate, make_train_step

MODEL = ModelConfig(
    vocab_size=64, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=64, max_length=16, position="rope",
    norm="rmsnorm", gated=True, activation="silu", tie_embeddings=False,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(peak_lr=1e-2, schedule=ScheduleConfig(warmup=2))
SIZE, LENGTH, STEPS = 16, 16, 5


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        raw = rng.integers(0, 64, (SIZE, LENGTH + 1)).astype(np.int32)
        yield CLM().examples(raw, np.sort(rng.integers(1, 4, raw.shape), axis=1).astype(np.int32))


def pieces(config=MODEL, **execution):
    model = build(config, Execution(**execution))
    tx = optim.build_optimizer(
        OPTIMIZER, steps=STEPS, tokens_per_step=SIZE * LENGTH, decay_mask=optim.decay_mask(model.abstract)
    )
    rate = optim.schedule(OPTIMIZER.schedule, peak_lr=OPTIMIZER.peak_lr, steps=STEPS, tokens_per_step=SIZE * LENGTH)
    return model, tx, rate


def losses(axes, devices, *, microbatches=1, config=MODEL, **execution):
    model, tx, rate = pieces(config, **execution)
    layout = mesh.make_layout(MeshConfig(**axes), jax.devices()[:devices])
    layout.check(model.abstract, SIZE, microbatches)
    with mesh.use(layout):
        state = init_state(model, tx, layout, 0)
        step = jax.jit(
            make_train_step(model, CLM(), tx, OPTIMIZER, rate, seed=0, microbatches=microbatches), donate_argnums=0
        )
        values = []
        for batch in batches():
            state, metrics = step(state, layout.global_batch(batch, SIZE))
            values.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.asarray(values)


@pytest.fixture(scope="module")
def one_device():
    return losses({}, 1)


LAYOUTS = [
    ({"data": 8}, {}),
    ({"fsdp": 8, "data": 1}, {}),
    ({"tensor": 2}, {"devices": 2}),
    ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
    ({"fsdp": 4, "tensor": 2}, {"loss_chunk": 16, "microbatches": 2, "scan": False}),
]


@pytest.mark.parametrize(("axes", "options"), LAYOUTS, ids=lambda v: str(v))
def test_every_layout_gives_the_losses_of_one_device(axes, options, one_device):
    options = {"devices": 8, **options}
    np.testing.assert_allclose(losses(axes, **options), one_device, rtol=1e-5)


def test_microbatches_give_the_gradient_of_the_whole_batch():
    model, _, _ = pieces()
    params = model.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, next(batches()))
    batch["weights"] = batch["weights"].at[:5].set(0.0)  # parts of unequal weight
    loss_fn = lambda params, batch, key: CLM().loss(model, params, batch, None)  # noqa: E731
    run = jax.jit(lambda k: accumulate(loss_fn, params, batch, jax.random.key(0), k), static_argnums=0)
    loss, gradient = run(1)
    for parts in (2, 16):
        other, g = run(parts)
        np.testing.assert_allclose([other.sum, other.weight], [loss.sum, loss.weight], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), g, gradient)


def test_moments_lie_where_their_parameter_lies():
    model, tx, _ = pieces()
    layout = mesh.make_layout(MeshConfig(data=1, fsdp=4, tensor=2))
    with mesh.use(layout):
        state = init_state(model, tx, layout, 0)
    expected = abstract_state(model, tx, layout)
    jax.tree.map(lambda a, b: (a.sharding == b.sharding) or pytest.fail(f"{a.sharding} {b.sharding}"), state, expected)
    placed = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(state["opt_state"])}
    moments = 0
    for path, parameter in jax.tree_util.tree_leaves_with_path(state["params"]):
        name = jax.tree_util.keystr(path)
        own = [x for key, x in placed.items() if key.endswith(name)]
        assert len(own) == 2, name  # first and second moment
        for moment in own:
            assert moment.sharding == parameter.sharding, name
            assert moment.sharding.shard_shape(moment.shape) == parameter.sharding.shard_shape(parameter.shape)
            moments += 1
    assert moments == 2 * len(jax.tree.leaves(state["params"]))
    kernel = state["params"]["decoder"]["stack"]["block"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 8, 32)  # of (2, 32, 64): a quarter of D, half of F


def test_the_same_seed_gives_the_same_parameters_on_every_mesh():
    model, tx, _ = pieces()
    states = []
    for axes in ({"data": 8}, {"data": 1, "fsdp": 4, "tensor": 2}):
        layout = mesh.make_layout(MeshConfig(**axes))
        with mesh.use(layout):
            states.append(init_state(model, tx, layout, 3))
    jax.tree.map(np.testing.assert_array_equal, states[0]["params"], states[1]["params"])


def test_a_step_that_is_not_finite_changes_nothing_but_its_number():
    model, tx, rate = pieces()
    layout = mesh.make_layout(MeshConfig(), jax.devices()[:1])
    with mesh.use(layout):
        state = init_state(model, tx, layout, 0)
        step = jax.jit(make_train_step(model, CLM(), tx, OPTIMIZER, rate, seed=0, microbatches=1))
        batch = layout.global_batch(next(batches()), SIZE)
        good, metrics = step(state, batch)
        assert metrics["skipped"] == 0
        after, metrics = step(good, {**batch, "weights": batch["weights"] * np.float32(np.inf)})
        _, third = step(jax.tree.map(jnp.copy, after), batch)
    # The optimizer has made one update, so its schedule is where it was: what is logged is what was applied.
    assert float(metrics["learning_rate"]) == float(third["learning_rate"]) == pytest.approx(0.01)
    assert metrics["skipped"] == 1
    assert not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, after["params"], good["params"])
    jax.tree.map(np.testing.assert_array_equal, after["opt_state"], good["opt_state"])
    assert int(after["step"]) == int(good["step"]) + 1 == 2


def test_dropout_follows_the_step_and_the_seed():
    config = dataclasses.replace(MODEL, dropout=0.2)
    model, tx, rate = pieces(config)
    layout = mesh.make_layout(MeshConfig(), jax.devices()[:1])
    with mesh.use(layout):
        state = init_state(model, tx, layout, 0)
        step = jax.jit(make_train_step(model, CLM(), tx, OPTIMIZER, rate, seed=0, microbatches=1))
        batch = layout.global_batch(next(batches()), SIZE)
        first, again = (float(step(state, batch)[1]["loss"]) for _ in range(2))
        later = float(step({**state, "step": state["step"] + 1}, batch)[1]["loss"])
    assert first == again
    assert first != later


def test_one_layout_in_explicit_mode_resolves():
    # Every contraction goes through one einsum wrapper, so that Explicit mode stays within reach: placements must type-check.
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    explicit = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    from maxpretrain.nn.linear import einsum

    with jax.set_mesh(explicit):
        x = jax.device_put(np.ones((4, 3, 8), np.float32), NamedSharding(explicit, PartitionSpec("data")))
        w = jax.device_put(np.ones((8, 6), np.float32), NamedSharding(explicit, PartitionSpec(None, "tensor")))
        y = jax.jit(lambda x, w: einsum("...i,io->...o", x, w))(x, w)
    assert y.sharding.spec == PartitionSpec("data", None, "tensor")
