"""The causal loss against float64, in chunks and whole, with and without what regularizes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.config import ModelConfig
from maxpretrain.models import build
from maxpretrain.nn.stack import Execution
from maxpretrain.objectives import CLM
from maxpretrain.objectives.cross_entropy import cross_entropy_sums, num_chunks, token_cross_entropy

CONFIG = ModelConfig(vocab_size=37, num_layers=1, model_dim=16, num_heads=2, max_length=16)


def reference(logits, labels, weights, smoothing, z):
    x = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
    nll = log_z - np.take_along_axis(x, np.asarray(labels)[..., None], -1)[..., 0]
    loss = (1 - smoothing) * nll + smoothing * (log_z - x.mean(-1)) + z * log_z**2
    return (loss * weights).sum(), (nll * weights).sum(), ((x.argmax(-1) == labels) * weights).sum()


@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-4), (0.1, 1e-2)])
def test_sums_match_float64(smoothing, z):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 37)).astype(np.float32) * 4
    labels = rng.integers(0, 37, (3, 5)).astype(np.int32)
    weights = rng.integers(0, 2, (3, 5)).astype(np.float32)
    sums = cross_entropy_sums(
        jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights), label_smoothing=smoothing, z_loss=z
    )
    loss, nll, correct = reference(logits, labels, weights, smoothing, z)
    found = [float(sums[name].sum()) for name in ("loss", "nll", "correct")]
    np.testing.assert_allclose(found, [loss, nll, correct], rtol=2e-6)


def test_literal_values():
    logits = jnp.log(jnp.asarray([[0.7, 0.2, 0.1]], jnp.float32))
    label, weight = jnp.asarray([0], jnp.int32), jnp.ones(1, jnp.float32)
    assert float(cross_entropy_sums(logits, label, weight)["loss"]) == pytest.approx(0.35667494, rel=1e-6)  # −ln 0.7
    smoothed = cross_entropy_sums(logits, label, weight, label_smoothing=0.3)["loss"]
    assert float(smoothed) == pytest.approx(
        0.67654225, rel=1e-6
    )  # 0.7·0.35667494 + 0.3·(0.35667494+1.60943791+2.30258509)/3
    shifted = cross_entropy_sums(logits + 2.0, label, weight, z_loss=0.1)["loss"]
    assert float(shifted) == pytest.approx(0.35667494 + 0.1 * 4.0, rel=1e-6)


def batch(rows=4, length=12, seed=0):
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 37, (rows, length + 1)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, raw.shape), axis=1).astype(np.int32)
    return jax.tree.map(jnp.asarray, CLM().examples(raw, segments))


def loss_and_gradient(chunk, objective=None, **execution):
    objective = objective or CLM()
    model = build(CONFIG, Execution(loss_chunk=chunk, **execution))
    params = jax.jit(model.init)(jax.random.key(0))
    data = batch()

    def total(params):
        loss = objective.loss(model, params, data, None)
        return loss.sum, (loss.weight, loss.metrics)

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)


@pytest.mark.parametrize("objective", [CLM(), CLM(label_smoothing=0.1, z_loss=1e-3)], ids=["plain", "regularized"])
def test_chunks_change_nothing(objective):
    (whole, (weight, metrics)), gradient = loss_and_gradient(1 << 20, objective)
    # Of 48 tokens: a number that does not divide, and one position a chunk.
    for chunk in (7,) if objective.z_loss else (7, 1):
        (value, (w, other)), g = loss_and_gradient(chunk, objective)
        np.testing.assert_allclose([value, w, other["accuracy"][0]], [whole, weight, metrics["accuracy"][0]], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), g, gradient)


def test_gradient_is_that_of_the_plain_formula():
    (_, _), gradient = loss_and_gradient(16)
    model, data = build(CONFIG), batch()
    params = jax.jit(model.init)(jax.random.key(0))

    def plain(params):
        hidden = model.apply(params, data["tokens"], data["positions"], data["segments"]).hidden
        log_p = jax.nn.log_softmax(model.logits(params, hidden))
        return -(jnp.take_along_axis(log_p, data["labels"][..., None], -1)[..., 0] * data["weights"]).sum()

    expected = jax.jit(jax.grad(plain))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected)


def test_chunks_are_few_and_hold_no_more_than_asked():
    assert num_chunks(batch=8, length=128, chunk_tokens=256, shards=1) == 4
    assert num_chunks(batch=8, length=128, chunk_tokens=256, shards=4) == 1
    assert num_chunks(batch=1, length=10, chunk_tokens=1, shards=1) == 10
    assert num_chunks(batch=8, length=100, chunk_tokens=96, shards=1) == 9


def test_logits_of_the_whole_batch_never_exist():
    model = build(dataclasses.replace(CONFIG, vocab_size=1009), Execution(loss_chunk=64))
    params = jax.tree.map(lambda s: s.struct, model.abstract, is_leaf=lambda x: hasattr(x, "struct"))
    fields = {"tokens": "int32", "labels": "int32", "weights": "float32", "segments": "int32", "positions": "int32"}
    data = {name: jax.ShapeDtypeStruct((32, 16), dtype) for name, dtype in fields.items()}
    text = jax.jit(jax.grad(lambda p, b: CLM().loss(model, p, b, None).sum)).lower(params, data).compile().as_text()
    assert "f32[32,2,1009]" in text or "f32[64,1009]" in text
    assert "[32,16,1009]" not in text
    assert "[512,1009]" not in text


def test_nothing_to_predict_is_zero_and_not_nan():
    model = build(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    hidden = jnp.full((1, 3, 16), jnp.nan).at[0, 0].set(0.5)
    labels, weights = jnp.asarray([[3, -1, 99]], jnp.int32), jnp.asarray([[1.0, 0.0, 0.0]], jnp.float32)

    def total(hidden, weights):
        return token_cross_entropy(model, params, hidden, labels, weights)[0]

    value, gradient = jax.value_and_grad(total)(hidden, weights)
    assert np.isfinite(value)
    assert value > 0
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[0, 1:] == 0).all()
    value, gradient = jax.value_and_grad(total)(hidden, weights * 0)
    assert value == 0
    assert (np.asarray(gradient) == 0).all()


def test_measured_leaves_regularizers_out():
    assert CLM(label_smoothing=0.1, z_loss=1e-4, mask_documents=False).measured() == CLM(mask_documents=False)
    (_, (_, metrics)), _ = loss_and_gradient(64, CLM(label_smoothing=0.1))
    (plain, _), _ = loss_and_gradient(64)
    np.testing.assert_allclose(metrics["cross_entropy"][0], plain, rtol=1e-6)
