"""The evaluator against a float64 computation in numpy, on any batch size and mesh."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.config import MeshConfig, ModelConfig
from maxpretrain.data.pipeline import EvaluationBatches
from maxpretrain.data.store import Store, StoreWriter
from maxpretrain.errors import UserError
from maxpretrain.evaluate.perplexity import Evaluator, bits_per_byte
from maxpretrain.mesh import make_layout
from maxpretrain.models import build
from maxpretrain.nn.base import is_spec
from maxpretrain.objectives import CLM

CONFIG = ModelConfig(
    vocab_size=13, num_layers=1, model_dim=8, num_heads=2, max_length=8, position="learned", dropout=0.3
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    lengths = np.array([7, 1, 19, 4])
    tokens = np.random.default_rng(0).integers(0, 13, lengths.sum())
    path = tmp_path_factory.mktemp("store") / "s"
    with StoreWriter(path, vocab_size=13, tokenizer_fingerprint="t") as writer:
        writer.add_many(tokens, lengths, 3 * lengths)
    return Store.open(path)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda s: jnp.asarray((s.role == "norm") + 0.5 * rng.standard_normal(s.shape), jnp.float32),
        build(CONFIG).abstract,
        is_leaf=is_spec,
    )


def evaluate(store, params, *, batch_size, devices=1, objective=None, length=8, **how):
    objective = objective or CLM()
    layout = make_layout(MeshConfig(), jax.devices()[:devices])
    batches = EvaluationBatches([store], objective, batch_size=batch_size, length=length, **how)
    params = jax.device_put(params, layout.param_shardings(build(CONFIG).abstract))
    return Evaluator(build(CONFIG), objective, layout, batches, batch_size)(params)


def in_numpy(store, params, length, mask_documents):
    """Mean negative log-likelihood and accuracy over the store, window by window, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layer = jax.tree.map(lambda x: x[0], p["decoder"]["stack"]["block"])

    def norm(x, w):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w["scale"] + w["bias"]

    def linear(x, w, axes=1):
        return np.tensordot(x, w["kernel"], axes) + w["bias"]

    def forward(tokens):
        n = len(tokens)
        x = p["embed"]["table"][tokens] + p["decoder"]["input"]["positions"]["table"][:n]
        y = norm(x, layer["attention_norm"])
        q, k, v = (linear(y, layer["attention"][name]) for name in ("query", "key", "value"))
        scores = np.einsum("thk,shk->hts", q, k) / math.sqrt(4)
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + linear(np.einsum("hts,shk->thk", weights, v), layer["attention"]["out"], 2)
        y = linear(norm(x, layer["mlp_norm"]), layer["mlp"]["up"])
        y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = norm(x + linear(y, layer["mlp"]["down"]), p["decoder"]["norm"])
        logits = x @ p["embed"]["table"].T
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    losses, hits = [], []
    for start in range(0, store.num_tokens - 1, length):
        tokens = store.read(start, min(length + 1, store.num_tokens - start))
        segments = store.segments(start, len(tokens))
        inputs, labels, here = tokens[:-1], tokens[1:], segments[:-1]
        for segment in np.unique(here) if mask_documents else [None]:
            mine = slice(None) if segment is None else here == segment
            predicted = np.ones(len(inputs), bool) if segment is None else (segments[1:] == here)[mine]
            log_p = forward(inputs[mine])[predicted]
            label = labels[mine][predicted]
            losses += (-log_p[np.arange(len(label)), label]).tolist()
            hits += (log_p.argmax(-1) == label).tolist()
    return np.mean(losses), np.mean(hits), len(losses)


@pytest.mark.parametrize(("mask_documents", "predicted"), [(True, 27), (False, 30)])
def test_equals_float64_numpy(store, params, mask_documents, predicted):
    objective = CLM(mask_documents=mask_documents, label_smoothing=0.2, z_loss=0.1)  # neither is part of the measure
    found = evaluate(store, params, batch_size=3, objective=objective)
    loss, accuracy, count = in_numpy(store, params, 8, mask_documents)
    assert count == predicted
    assert found["eval/loss"] == pytest.approx(loss, rel=2e-6)
    assert found["eval/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["eval/accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert found["eval/bits_per_byte"] == pytest.approx(loss / math.log(2) / 3, rel=2e-6)  # three bytes a token
    assert set(found) == {"eval/loss", "eval/perplexity", "eval/accuracy", "eval/bits_per_byte"}


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (8, 8)])
def test_batch_size_and_mesh_do_not_matter(store, params, batch_size, devices):
    assert len(jax.devices()) >= 8
    one, other = evaluate(store, params, batch_size=3), evaluate(store, params, batch_size=batch_size, devices=devices)
    assert one.keys() == other.keys()
    for name in one:
        assert other[name] == pytest.approx(one[name], rel=1e-6)


def test_a_signal_gives_up_between_batches(store, params):
    asked = []

    def stop():
        asked.append(True)
        return len(asked) > 1

    layout = make_layout(MeshConfig(), jax.devices()[:1])
    batches = EvaluationBatches([store], CLM(), batch_size=1, length=8)
    assert len(list(batches)) > 2
    evaluator = Evaluator(build(CONFIG), CLM(), layout, batches, 1)
    assert evaluator(params, stop) is None
    assert len(asked) == 2


def test_bits_per_byte():
    assert bits_per_byte(2.772588722239781, 10, 20) == pytest.approx(2.0)  # 4 bits a token, two bytes a token
    assert bits_per_byte(math.log(2), 7, 7) == pytest.approx(1.0)
    assert math.isnan(bits_per_byte(1.0, 0, 0))


def test_nothing_to_predict_is_an_error(tmp_path, params):
    with StoreWriter(tmp_path / "s", vocab_size=13, tokenizer_fingerprint="t") as writer:
        writer.add_many(np.arange(10), np.ones(10, np.int64), np.ones(10, np.int64))
    with pytest.raises(UserError, match="holds nothing to predict; give documents of at least two tokens"):
        evaluate(Store.open(tmp_path / "s"), params, batch_size=2)
