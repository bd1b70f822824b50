"""Text of known entropy is learned to its floor and not below: what goes below reads its own label."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxpretrain import optim
from maxpretrain.config import ModelConfig, OptimizerConfig, ScheduleConfig
from maxpretrain.models import build
from maxpretrain.objectives import CLM, MLM
from maxpretrain.vocabulary import Vocabulary

SYMBOLS, LENGTH, ROWS, STEPS = 6, 24, 32, 300
MASK = SYMBOLS
VOCABULARY = Vocabulary(size=SYMBOLS + 1, mask_id=MASK, specials=(MASK,))
# Each row's two likeliest successors have 0.55 and 0.25: 1.27 nats a token.
SUCCESSORS = np.stack([np.roll([0.05, 0.55, 0.05, 0.25, 0.05, 0.05], 2 * i % SYMBOLS) for i in range(SYMBOLS)])


def markov(rng, count):
    """int [count, LENGTH + 1] by a chain that begins in its stationary distribution, which is not even."""
    values, vectors = np.linalg.eig(SUCCESSORS.T)
    start = np.real(vectors[:, np.argmax(np.real(values))])
    start = start / start.sum()
    text = np.empty((count, LENGTH + 1), np.int64)
    text[:, 0] = rng.choice(SYMBOLS, count, p=start)
    for t in range(LENGTH):
        drawn = rng.random((count, 1)) > np.cumsum(SUCCESSORS[text[:, t]], 1)
        text[:, t + 1] = drawn.sum(1)
    return text, start


def trained(objective, config, raw):
    """Losses of the last batches, which were not trained on, after a pass over the others."""
    objective = objective.bind(VOCABULARY)
    model = build(config)
    rng = np.random.default_rng(1)
    rows = [objective.example(row.astype(np.int32), rng) for row in raw]
    batches = {k: np.stack([r[k] for r in rows]).reshape(-1, ROWS, *rows[0][k].shape) for k in rows[0]}
    optimizer = OptimizerConfig(peak_lr=6e-3, weight_decay=0.0, schedule=ScheduleConfig(warmup=10, final=0.0))
    mask = optim.decay_mask(model.abstract)
    tx = optim.build_optimizer(optimizer, steps=STEPS, tokens_per_step=ROWS * LENGTH, decay_mask=mask)
    mean = lambda params, batch: (lambda loss: loss.sum / loss.weight)(objective.loss(model, params, batch, None))  # noqa: E731

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(mean)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(params, batches):
        kept, held = ({k: v[part] for k, v in batches.items()} for part in (slice(STEPS), slice(STEPS, None)))
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), kept)
        return jnp.mean(jax.lax.map(lambda batch: mean(params, batch), held))

    return float(jax.jit(run)(model.init(jax.random.key(0)), batches)), {k: v[STEPS:] for k, v in batches.items()}


def shape(architecture, length=LENGTH, layers=1):
    return ModelConfig(
        architecture=architecture, vocab_size=SYMBOLS + 1, num_layers=layers, model_dim=32, num_heads=2, mlp_dim=64,
        max_length=length + 1, init_std=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def text():
    return markov(np.random.default_rng(0), ROWS * (STEPS + 24))


def test_clm_learns_a_markov_chain_to_its_entropy(text):
    raw, _ = text
    loss, held = trained(CLM(), shape("decoder"), raw)
    tokens, labels = held["tokens"].reshape(-1, LENGTH), held["labels"].reshape(-1, LENGTH)
    floor = -np.log(SUCCESSORS[tokens, labels]).mean()  # of what knows the chain
    assert floor == pytest.approx(1.2745, abs=0.02)
    assert floor - 0.005 < loss < floor + 0.02


def posterior_floor(tokens, places, labels, weights, start):
    """−log p of the labels given all tokens that are not masked, by the forward-backward recursion."""
    total = count = 0.0
    for row, at, label, weight in zip(tokens, places, labels, weights, strict=True):
        seen = np.where((row == MASK)[:, None], 1.0, np.eye(SYMBOLS + 1)[row][:, :SYMBOLS])
        forward, backward = np.empty((len(row), SYMBOLS)), np.ones((len(row), SYMBOLS))
        forward[0] = start * seen[0]
        for t in range(1, len(row)):
            forward[t] = (forward[t - 1] / forward[t - 1].sum()) @ SUCCESSORS * seen[t]
        for t in range(len(row) - 2, -1, -1):
            backward[t] = SUCCESSORS @ (seen[t + 1] * backward[t + 1])
            backward[t] /= backward[t].sum()
        for place, of, asked in zip(at, label, weight, strict=True):
            if asked:
                p = forward[place] * backward[place]
                total, count = total - np.log(p[of] / p.sum()), count + 1
    return total / count


def test_mlm_learns_a_markov_chain_to_the_entropy_given_both_sides(text):
    raw, start = text
    objective = MLM(rate=0.3, mask_share=1.0, random_share=0.0)
    loss, held = trained(objective, shape("encoder"), raw[:, :LENGTH])
    flat = {k: v.reshape(-1, v.shape[-1]) for k, v in held.items()}
    floor = posterior_floor(flat["tokens"], flat["places"], flat["labels"], flat["weights"], start)
    assert 0.9 < floor < 1.25
    assert floor - 0.01 < loss < floor + 0.1  # it started at 1.9, and one layer is nearly there after so few steps


def test_what_is_copied_costs_nothing_and_the_rest_its_entropy():
    rng = np.random.default_rng(0)
    word = rng.integers(0, SYMBOLS, (ROWS * (STEPS + 16), 9))
    raw = np.concatenate([word, word], 1)
    loss, _ = trained(CLM(), shape("decoder", 18, layers=2), raw)
    # Of 17 predictions 8 are of new symbols, ln 6 each; the first of the copy and those after it are known.
    floor = 8 / 17 * np.log(SYMBOLS)
    assert floor == pytest.approx(0.8432, abs=1e-4)
    assert floor - 0.01 < loss < floor + 0.03


def test_masked_copies_are_found_in_the_other_half():
    rng = np.random.default_rng(0)
    word = rng.integers(0, SYMBOLS, (ROWS * (STEPS + 24), 8))
    objective = MLM(rate=0.2, mask_share=1.0, random_share=0.0)
    loss, held = trained(objective, shape("encoder", 16, layers=2), np.concatenate([word, word], 1))
    flat = {k: v.reshape(-1, v.shape[-1]) for k, v in held.items()}
    other = np.take_along_axis(flat["tokens"], (flat["places"] + 8) % 16, 1)
    hidden_twice = (other == MASK)[flat["weights"] > 0].mean()
    floor = hidden_twice * np.log(SYMBOLS)  # of what is masked in both halves nothing is known
    assert 0.1 < floor < 0.4
    assert floor - 0.03 < loss < floor + 0.1
