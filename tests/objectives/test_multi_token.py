"""Multi-token prediction: rows worked by hand, both forms against float64, and what may not reach the loss."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxpretrain.config import (
    BatchConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    Run,
    TokenizerConfig,
    validate,
)
from maxpretrain.errors import UserError
from maxpretrain.fingerprint import named_leaves
from maxpretrain.mesh import make_layout, use
from maxpretrain.models import build
from maxpretrain.models.multi_token import layer_config
from maxpretrain.monitor.flops import training_flops
from maxpretrain.nn.base import is_spec
from maxpretrain.nn.stack import Execution
from maxpretrain.objectives import CLM, MultiToken
from maxpretrain.train.step import make_train_step

EOS, V, T = 2, 40, 10
CONFIG = ModelConfig(
    vocab_size=V,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    mlp_dim=32,
    max_length=32,
    position="none",
    norm="rmsnorm",
    activation="relu",
    bias=False,
    tie_embeddings=False,
)
FORMS = ("parallel", "sequential")


def drawn(abstract, seed=0):
    rng = np.random.default_rng(seed)
    leaf = lambda s: jnp.asarray((s.role == "norm") + 0.3 * rng.standard_normal(s.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(leaf, abstract, is_leaf=is_spec)


def filled(batch):
    """A batch of 4 rows, the last ones empty: one shape everywhere, so that few programs are compiled."""
    return {name: jnp.pad(x, [(0, 4 - len(x))] + [(0, 0)] * (x.ndim - 1)) for name, x in batch.items()}


def made(objective, raw, segments):
    batch = filled(objective.examples(np.asarray(raw, np.int32), np.asarray(segments, np.int32)))
    return objective.normalized(batch)


def rows(objective, seed=0):
    """4 rows whose tokens all differ, of documents of a few tokens."""
    rng = np.random.default_rng(seed)
    raw = np.stack([rng.permutation(V - 3)[: objective.raw_length(T)] + 3 for _ in range(4)])
    return made(objective, raw, 1 + np.cumsum(rng.random(raw.shape) < 0.15, axis=1))


@functools.cache
def compiled(objective, config=CONFIG, **execution):
    """(params, batch) -> (sum, (loss, gradient))."""
    model = objective.build(config, Execution(**execution))

    def total(params, batch):
        loss = objective.loss(model, params, batch, None)
        return loss.sum, loss

    return model, jax.jit(jax.value_and_grad(total, has_aux=True))


def means(loss):
    return {name: float(total / weight) for name, (total, weight) in loss.metrics.items()}


# --- the host's side


def lists(example):
    return {name: array.astype(int).tolist() for name, array in example.items()}


def test_labels_stay_in_their_document():
    tokens = np.array([11, 12, 13, EOS, 21, EOS, 31, 32, 33, 34], np.uint16)
    segments = np.array([1, 1, 1, 1, 2, 2, 3, 3, 3, 3], np.int32)
    objective = MultiToken(depth=2)
    assert (objective.raw_length(7), objective.overlap) == (10, 3)
    assert lists(objective.example(tokens, None, segments)) == {
        "tokens": [11, 12, 13, EOS, 21, EOS, 31],
        "labels": [12, 13, EOS, 0, EOS, 0, 32],
        "weights": [1, 1, 1, 0, 1, 0, 1],
        "segments": [1, 1, 1, 1, 2, 2, 3],
        "positions": [0, 1, 2, 3, 0, 1, 0],
        "further_labels": [[13, EOS, 0, 0, 0, 0, 33], [EOS, 0, 0, 0, 0, 0, 34]],
        "further_weights": [[1, 1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 1]],
    }
    plain = lists(MultiToken(depth=2, mask_documents=False).example(tokens, None, segments))
    assert plain["labels"] == [12, 13, EOS, 21, EOS, 31, 32]
    assert plain["further_labels"] == [[13, EOS, 21, EOS, 31, 32, 33], [EOS, 21, EOS, 31, 32, 33, 34]]
    assert plain["further_weights"] == [[1] * 7, [1] * 7]


def test_padding_and_short_windows():
    objective = MultiToken(depth=2)
    tokens, segments = np.arange(3, 12)[None], np.array([[1, 1, 1, 1, 1, 0, 0, 0, 0]])
    batch = objective.examples(tokens, segments)
    assert {name: array[0].astype(int).tolist() for name, array in batch.items()} == {
        "tokens": [3, 4, 5, 6, 0, 0],
        "labels": [4, 5, 6, 7, 0, 0],
        "weights": [1, 1, 1, 1, 0, 0],
        "segments": [1, 1, 1, 1, 0, 0],
        "positions": [0, 1, 2, 3, 0, 0],
        "further_labels": [[5, 6, 7, 0, 0, 0], [6, 7, 0, 0, 0, 0]],
        "further_weights": [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
    }
    for size in (1, 2, 3):
        example = objective.example(np.arange(size), None)
        assert {name: array.size for name, array in example.items()} == dict.fromkeys(objective.fields(8), 0)
    full = objective.examples(np.arange(22, dtype=np.uint16).reshape(2, 11))
    assert {name: (a.shape[1:], a.dtype.name) for name, a in full.items()} == objective.fields(8)


def test_the_next_token_is_clms():
    rng = np.random.default_rng(0)
    raw, segments = rng.integers(0, 30, (4, 14)), 1 + np.cumsum(rng.random((4, 14)) < 0.2, axis=1)
    for mask in (True, False):
        ours = MultiToken(depth=3, mask_documents=mask).examples(raw, segments)
        for name, array in CLM(mask_documents=mask).examples(raw[:, :11], segments[:, :11]).items():
            assert (ours[name] == array).all()


# --- against float64


def normed(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def block(x, w, segments):
    """A layer on one row [T, D]: causal attention within segments, then the MLP."""
    project = lambda y, name: np.einsum("td,dhk->thk", y, w[f"attention/{name}/kernel"])  # noqa: E731
    y = normed(x, w["attention_norm/scale"])
    scores = np.einsum("thk,shk->hts", project(y, "query"), project(y, "key")) / np.sqrt(8)
    seen = np.tril(np.ones((len(x), len(x)), bool)) & (segments[:, None] == segments[None])
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("hts,shk->thk", weights, project(y, "value"))
    x = x + np.einsum("thk,hkd->td", y, w["attention/out/kernel"])
    return x + np.maximum(normed(x, w["mlp_norm/scale"]) @ w["mlp/up/kernel"], 0) @ w["mlp/down/kernel"]


def nll(hidden, p, labels, weights):
    logits = hidden @ p["unembed/kernel"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -(log_p[np.arange(len(labels)), labels] * weights).sum()


def by_hand(params, batch, form, depth):
    """The mean of each depth, in float64."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(params).items()}
    batch = {name: np.asarray(array) for name, array in batch.items()}
    weights = lambda path, i: {n.removeprefix(path): a[i] for n, a in p.items() if n.startswith(path)}  # noqa: E731
    sums, counts = np.zeros(depth + 1), np.zeros(depth + 1)
    for row in range(len(batch["tokens"])):
        segments = batch["segments"][row]
        trunk = block(p["embed/table"][batch["tokens"][row]], weights("decoder/stack/block/", 0), segments)
        x = normed(block(trunk, weights("decoder/stack/block/", 1), segments), p["decoder/norm/scale"])
        labels = [batch["labels"][row], *batch["further_labels"][row]]
        hidden = [x]
        for k in range(depth):
            layer = weights("multi_token/stack/block/", k)
            if form == "parallel":
                hidden.append(normed(block(trunk, layer, segments), p["decoder/norm/scale"]))
                continue
            token = normed(p["embed/table"][labels[k]], p["multi_token/join/token_norm/scale"][k])
            state = normed(x, p["multi_token/join/hidden_norm/scale"][k])
            x = block(np.concatenate([token, state], -1) @ p["multi_token/join/project/kernel"][k], layer, segments)
            hidden.append(normed(x, p["multi_token/norm/scale"][k]))
        there = [batch["weights"][row], *batch["further_weights"][row]]
        for k in range(depth + 1):
            sums[k] += nll(hidden[k], p, labels[k], there[k])
            counts[k] += there[k].sum()
    return sums / counts


@pytest.mark.parametrize("form", FORMS)
def test_equals_a_computation_by_hand(form):
    objective = MultiToken(form=form, depth=2, weight=0.3)
    model, f = compiled(objective)
    params, batch = drawn(model.abstract), rows(objective)
    (total, loss), _ = f(params, batch)
    expected = by_hand(params, batch, form, 2)
    found = means(loss)
    np.testing.assert_allclose(
        [found["cross_entropy"], found["loss_depth_2"], found["loss_depth_3"]], expected, rtol=2e-5
    )
    factor = 1.0 if form == "parallel" else 0.15
    whole = expected[0] + factor * (expected[1] + expected[2])
    np.testing.assert_allclose(float(total / loss.weight), whole, rtol=2e-5)
    np.testing.assert_allclose(objective.combined(found), whole, rtol=2e-5)
    assert float(loss.weight) == float(batch["weights"].sum())


def test_without_further_tokens_it_is_clm_to_the_bit():
    objective = MultiToken(depth=0)
    model, f = compiled(objective)
    plain, g = compiled(CLM())
    assert type(model) is type(plain) is type(MultiToken(depth=0, form="sequential").build(CONFIG))
    params, batch = drawn(model.abstract), rows(objective)
    (ours, loss), ours_gradient = f(params, batch)
    (theirs, other), their_gradient = g(params, batch)
    assert (float(ours), float(loss.weight)) == (float(theirs), float(other.weight))
    assert float(loss.metrics["cross_entropy"][0]) == float(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours_gradient, their_gradient)


@pytest.mark.parametrize("form", FORMS)
def test_the_next_token_is_predicted_by_the_decoder_itself(form):
    """The plain network takes the whole dict, and says of the next token what it says with further ones beside it."""
    objective = MultiToken(form=form, depth=2)
    model, f = compiled(objective)
    params, batch = drawn(model.abstract), rows(objective)
    plain, g = compiled(CLM())
    assert set(model.abstract) - set(plain.abstract) == {"multi_token"}
    (_, loss), _ = f(params, batch)
    seen = {name: batch[name] for name in rows(MultiToken(depth=0))}
    (clm, other), _ = g({name: params[name] for name in plain.abstract}, seen)
    np.testing.assert_allclose(means(loss)["cross_entropy"], float(clm / other.weight), rtol=1e-6)
    assert plain.apply(params, batch["tokens"]).hidden.shape == (4, T, 16)


# --- what reaches the loss


@pytest.mark.parametrize("form", FORMS)
def test_each_depth_sees_what_it_may(form):
    """The gradient of one label's loss with respect to each input: the tokens differ, each has a row of the table."""
    objective = MultiToken(form=form, depth=2)
    model, f = compiled(objective)
    params = drawn(model.abstract)
    raw = np.arange(10, 10 + T + 3)[None]
    batch = made(objective, raw, [[1] * 6 + [2] * (T - 3)])

    def seen(depth, at):
        one = np.zeros((4, 3, T), np.float32)
        one[0, depth, at] = 1
        given = {"weights": jnp.asarray(one[:, 0]), "further_weights": jnp.asarray(one[:, 1:])}
        # Scales as if there were others: of this label alone, without one of the next token, they would be 0.
        (total, _), gradient = f(params, batch | given | {"further_scales": jnp.ones((4, 2))})
        assert total > 0
        return np.flatnonzero(np.abs(gradient["embed"]["table"]).sum(-1)[raw[0]] > 0).tolist()

    assert seen(0, 2) == [0, 1, 2]
    assert seen(0, 7) == [6, 7]  # the second document begins at 6
    if form == "parallel":
        assert seen(1, 2) == seen(2, 2) == [0, 1, 2]
    else:  # the tokens in between too, but never the label
        assert seen(1, 2) == [0, 1, 2, 3]
        assert seen(2, 2) == [0, 1, 2, 3, 4]
        assert seen(2, 9) == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_part(form):
    objective = MultiToken(form=form, depth=2)
    model, f = compiled(objective)
    params = drawn(model.abstract)
    (_, _), gradient = f(params, rows(objective))
    for name, leaf in named_leaves(gradient).items():
        each = leaf if name.startswith("multi_token") else leaf[None]
        assert all(np.abs(part).max() > 0 for part in np.asarray(each)), name


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_predict_is_neither_zero_in_silence_nor_nan(form):
    objective = MultiToken(form=form, depth=2)
    model, f = compiled(objective)
    params = drawn(model.abstract)

    def measured(sizes):
        segments = np.repeat(np.arange(1, len(sizes) + 1), sizes)[None]
        (total, loss), gradient = f(params, made(objective, np.arange(5, 18)[None], segments))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        return float(total), float(loss.weight), loss.metrics, gradient

    total, weight, metrics, gradient = measured([1] * 13)  # documents of one token
    assert (total, weight) == (0, 0)
    assert all(float(part) == 0 for pair in metrics.values() for part in pair)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))
    total, weight, metrics, gradient = measured([2] * 6 + [1])  # of two: the next one only
    assert weight == 5
    assert total == pytest.approx(float(metrics["cross_entropy"][0]))
    assert total > 1
    assert [float(x) for x in metrics["loss_depth_2"]] == [0, 0]
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient["multi_token"]))
    total, weight, metrics, _ = measured([3, 3, 3, 3, 1])  # of three: two of them
    assert [int(metrics[name][1]) for name in ("cross_entropy", "loss_depth_2", "loss_depth_3")] == [7, 4, 0]
    assert float(metrics["loss_depth_2"][0]) > 1
    assert objective.combined({"cross_entropy": 2.0, "loss_depth_2": 4.0, "loss_depth_3": math.nan}) == pytest.approx(
        6.0 if form == "parallel" else 2.6
    )


# --- how it runs


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_batch_add_up_to_the_whole(form):
    objective = MultiToken(form=form, depth=2)
    model, f = compiled(objective)
    params, batch = drawn(model.abstract), rows(objective, seed=3)
    (total, loss), gradient = f(params, batch)
    halves = [f(params, filled({name: x[i::2] for name, x in batch.items()})) for i in (0, 1)]
    np.testing.assert_allclose(float(total), sum(float(half[0][0]) for half in halves), rtol=1e-5)
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=1e-3, atol=1e-5), gradient, halves[0][1], halves[1][1]
    )
    for name, (value, weight) in loss.metrics.items():
        for whole, parts in ((value, 0), (weight, 1)):
            np.testing.assert_allclose(whole, sum(h[0][1].metrics[name][parts] for h in halves), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_how_it_runs_changes_nothing(form):
    """Layers one by one and computed again, logits in chunks, everything over eight devices."""
    objective = MultiToken(form=form, depth=2)
    model, f = compiled(objective)
    params, batch = drawn(model.abstract), rows(objective)
    (total, _), gradient = f(params, batch)
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    with use(layout):
        spread = jax.device_put(params, layout.param_shardings(model.abstract))
        placed = jax.device_put(batch, layout.batch_sharding())
        (other, _), its = compiled(objective, scan=False, remat="full", loss_chunk=7)[1](spread, placed)
    np.testing.assert_allclose(float(other), float(total), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), its, gradient)


def test_logits_exist_for_a_few_positions_of_all_heads_only():
    """Those of four heads would be 4 · 256 tokens · 4096 ids · 4 bytes = 16,777,216 bytes, their gradient as much."""
    config = dataclasses.replace(CONFIG, vocab_size=4096, num_layers=1, model_dim=8, num_heads=1, mlp_dim=8)
    objective = MultiToken(depth=3)
    model, f = compiled(objective, config, loss_chunk=64)
    shapes = {n: jax.ShapeDtypeStruct((8, *s), d) for n, (s, d) in objective.fields(32).items()}
    params = jax.tree.map(lambda s: s.struct, model.abstract, is_leaf=is_spec)
    assert f.lower(params, shapes).compile().memory_analysis().temp_size_in_bytes < 6_000_000


def test_experts_of_the_further_layers_come_last():
    moe = MoEConfig(num_experts=4, top_k=2, expert_dim=8, dense_layers=(0,))
    config = dataclasses.replace(CONFIG, num_layers=3, moe=moe)
    for form in FORMS:
        objective = MultiToken(form=form, depth=2)
        model = objective.build(config)
        assert set(model.abstract["multi_token"]["stack"]) == {"experts"}
        params = jax.eval_shape(model.init, jax.random.key(0))
        loss = jax.eval_shape(lambda p, m=model, o=objective: o.loss(m, p, rows(o), None), params)
        assert loss.experts["load"].shape == (4, 4)
    dense = dataclasses.replace(config, moe=dataclasses.replace(moe, dense_layers=(2,)))
    objective = MultiToken(depth=2)
    model = objective.build(dense)
    assert set(model.abstract["multi_token"]["stack"]) == {"block"}
    params = jax.eval_shape(model.init, jax.random.key(0))
    loss = jax.eval_shape(lambda p: objective.loss(model, p, rows(objective), None), params)
    assert loss.experts["load"].shape == (2, 4)


def test_dropout_of_the_decoder_is_clms():
    config = dataclasses.replace(CONFIG, dropout=0.5)
    objective = MultiToken(depth=1)
    model, plain = objective.build(config), build(config)
    params, batch, key = drawn(model.abstract), rows(objective), jax.random.key(5)
    places = (batch["tokens"], batch["positions"], batch["segments"])

    @jax.jit
    def states(params):
        output, further = model.predict(params, places[0], batch["further_labels"], *places[1:], key)
        again = model.predict(params, places[0], batch["further_labels"], *places[1:], None)[1]
        return output.hidden, plain.apply(params, *places, key).hidden, further, again

    ours, theirs, dropped, whole = states(params)
    np.testing.assert_array_equal(ours, theirs)
    assert np.abs(dropped - whole).max() > 0.1


def test_regularizers_are_of_training_only():
    objective = MultiToken(depth=2, label_smoothing=0.1, z_loss=1e-3, form="sequential")
    assert objective.measured() == MultiToken(depth=2, form="sequential")
    model, f = compiled(objective)
    params, batch = drawn(model.abstract), rows(objective)
    (total, loss), _ = f(params, batch)
    (plain, other), _ = compiled(objective.measured())[1](params, batch)
    assert abs(float(total) - float(plain)) > 0.1
    np.testing.assert_allclose(means(loss)["loss_depth_2"], means(other)["loss_depth_2"], rtol=1e-5)


def test_the_weight_follows_its_schedule():
    """The mean of the further losses counts 0.3 until step 10, 0.1 from 20 on, in between what lies between."""
    objective = MultiToken(form="sequential", depth=2, weight=0.1, schedule=((10, 0.3), (20, 0.1)))
    model, f = compiled(objective)
    params, batch = drawn(model.abstract), rows(objective)
    plain = {name: array for name, array in batch.items() if name != "further_scales"}
    further = lambda step: objective.normalized(plain, None if step is None else jnp.int32(step))  # noqa: E731
    for step, weight in ((0, 0.3), (10, 0.3), (15, 0.2), (20, 0.1), (99, 0.1), (None, 0.1)):
        (total, loss), _ = f(params, further(step))
        each = means(loss)
        expected = each["cross_entropy"] + weight * (each["loss_depth_2"] + each["loss_depth_3"]) / 2
        np.testing.assert_allclose(float(total / loss.weight), expected, rtol=1e-5)
    each = {"cross_entropy": 2.0, "loss_depth_2": 3.0, "loss_depth_3": 5.0}
    assert objective.combined(each) == pytest.approx(2.0 + 0.1 * 4.0)


def test_training_takes_the_weight_of_its_step():
    objective = MultiToken(form="sequential", depth=1, schedule=((1, 0.3), (2, 3.0)))
    model = objective.build(CONFIG)
    batch = {name: array for name, array in rows(objective).items() if name != "further_scales"}
    rate = lambda count: 1e-3 * jnp.ones(())  # noqa: E731
    tx = optax.sgd(rate)
    step = jax.jit(make_train_step(model, objective, tx, OptimizerConfig(), rate, seed=0, microbatches=2))
    params = drawn(model.abstract)
    for number, weight in ((0, 0.3), (2, 3.0)):
        each = step({"params": params, "opt_state": tx.init(params), "step": jnp.int32(number)}, batch)[1]
        expected = each["cross_entropy"] + weight * each["loss_depth_2"]
        np.testing.assert_allclose(float(each["loss"]), float(expected), rtol=1e-5)


def test_work_and_runs_that_cannot_be():
    objective = MultiToken(depth=2)
    work = objective.work(dataclasses.replace(CONFIG, num_layers=12), 16)
    assert [(w.model.num_layers, w.length, w.predictions) for w in work] == [(12, 16, 16), (1, 16, 16), (1, 16, 16)]
    # Beside its layer each module of the sequential form has a projection [2·D, D] that every token goes through.
    sequential = MultiToken(form="sequential", depth=2)
    gap = training_flops(sequential, CONFIG, 16, True) - training_flops(objective, CONFIG, 16, True)
    assert gap == pytest.approx(2 * 6 * 2 * CONFIG.model_dim**2)
    local = dataclasses.replace(CONFIG, num_layers=4, window=8, layer_pattern=("global", "local"))
    assert layer_config(local).layer_pattern == ("local",)
    run = Run(
        name="x",
        model=dataclasses.replace(CONFIG, vocab_size=256),
        objective=objective,
        tokenizer=TokenizerConfig(kind="bytes"),
        batch=BatchConfig(size=8, length=16),
    )
    validate(run)
    ask = lambda **fields: validate(dataclasses.replace(run, objective=MultiToken(**fields)))  # noqa: E731
    with pytest.raises(UserError, match=r"objective.depth is -1; it must be at least 0"):
        ask(depth=-1)
    with pytest.raises(UserError, match=r"objective.depth is 16, and batch.length 16 tokens; predict fewer"):
        ask(depth=16)
    with pytest.raises(UserError, match=r"objective.weight is 0.0; it must be above 0"):
        ask(weight=0.0)
    with pytest.raises(UserError, match=r"objective.schedule is of the weight in the sequential form"):
        ask(schedule=((0, 0.3),))
    with pytest.raises(
        UserError, match=r"objective.schedule has the steps \[5, 5\]; they must be at least 0, and rise"
    ):
        ask(form="sequential", schedule=((5, 0.3), (5, 0.1)))
    with pytest.raises(UserError, match=r"objective.schedule is \(\(0, 0.0\),\); its weights must be above 0"):
        ask(form="sequential", schedule=((0, 0.0),))
    with pytest.raises(UserError, match=r"objective MultiToken needs a decoder; model.architecture is encoder"):
        validate(dataclasses.replace(run, model=dataclasses.replace(run.model, architecture="encoder")))
