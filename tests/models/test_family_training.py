"""Families learn: twenty steps on real English lower the loss, on eight devices as on one."""

from __future__ import annotations

import dataclasses
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain import mesh, optim
from maxpretrain.config import LatentConfig, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, ScheduleConfig
from maxpretrain.models import build, families
from maxpretrain.objectives import CLM, Loss
from maxpretrain.train.state import init_state
from maxpretrain.train.step import make_train_step

STEPS, SIZE, LENGTH, MASK = 20, 8, 32, 256
TEXT = np.frombuffer("\n".join(pydoc_data.topics.topics.values()).encode(), np.uint8).astype(np.int32)
OPTIMIZER = OptimizerConfig(peak_lr=1e-2, schedule=ScheduleConfig(warmup=2), clip_norm=1.0)
# A family's own layers and options at a width of nothing.
SMALL = {
    "vocab_size": 260,
    "num_layers": 3,
    "model_dim": 32,
    "num_heads": 4,
    "mlp_dim": 48,
    "max_length": 40,
    "dropout": 0.0,
}
MOE = {
    "num_experts": 4,
    "expert_dim": 16,
    "dense_layers": (0,),
    "shared_dim": 16,
    "groups": 2,
    "top_groups": 1,
    "top_k": 2,
}
FAMILIES = {
    "gemma-3-1b": {"num_kv_heads": 2, "head_dim": 8, "window": 6, "layer_pattern": ("local", "global")},
    "mixtral-8x7b": {"num_kv_heads": 2, "moe": MoEConfig(num_experts=4)},
    "deepseek-v3": {
        "num_kv_heads": None,
        "moe": MoEConfig(router="sigmoid", balance_bias=True, **MOE),
        "latent": LatentConfig(kv_rank=16, q_rank=16, nope_dim=8, rope_dim=4, value_dim=8),
        "init_std": 0.02,
    },
    "albert-base-v2": {"embed_dim": 16, "num_layers": 3},
    "deberta-v3-base": {
        "relative": dataclasses.replace(families.preset("deberta-v3-base").relative, buckets=8, max_distance=16)
    },
    "modernbert-base": {"window": 4},
    "t5-v1.1-small": {"num_decoder_layers": 2, "head_dim": None},
}


def loss_of_places(model, params, hidden, labels, asked):
    scores = jax.nn.log_softmax(model.logits(params, hidden))
    chosen = jnp.take_along_axis(scores, labels[..., None], -1)[..., 0]
    return Loss(-jnp.sum(jnp.where(asked, chosen, 0.0)), jnp.sum(asked.astype(jnp.float32)), {})


class Masked:
    """Every sixth byte is to be found from those around it."""

    def loss(self, model, params, batch, key):
        asked = batch["masked"] == MASK
        hidden = model.apply(params, batch["masked"]).hidden
        return loss_of_places(model, params, hidden, batch["tokens"], asked)


class Denoised:
    """The text is to be written again from one with holes."""

    def loss(self, model, params, batch, key):
        start = jnp.full_like(batch["tokens"][:, :1], model.config.decoder_start_id)
        given = jnp.concatenate([start, batch["tokens"][:, :-1]], 1)
        hidden = model.apply(params, batch["masked"], decoder_tokens=given).hidden
        return loss_of_places(model, params, hidden, batch["tokens"], jnp.ones_like(given, bool))


def batches(architecture):
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        starts = rng.integers(0, 4000, SIZE)
        raw = np.stack([TEXT[s : s + LENGTH + 1] for s in starts])
        if architecture == "decoder":
            yield CLM().examples(raw, np.ones_like(raw))
        else:
            tokens = raw[:, :LENGTH]
            yield {"tokens": tokens, "masked": np.where(np.arange(LENGTH) % 6 == 2, np.int32(MASK), tokens)}


def losses(config: ModelConfig, axes: dict[str, int], devices: int) -> list[float]:
    model = build(config)
    how = {"steps": STEPS, "tokens_per_step": SIZE * LENGTH}
    tx = optim.build_optimizer(OPTIMIZER, decay_mask=optim.decay_mask(model.abstract), **how)
    rate = optim.schedule(OPTIMIZER.schedule, peak_lr=OPTIMIZER.peak_lr, **how)
    objective = {"decoder": CLM, "encoder": Masked, "encoder-decoder": Denoised}[config.architecture]()
    layout = mesh.make_layout(MeshConfig(**axes), jax.devices()[:devices])
    layout.check(model.abstract, SIZE)
    with mesh.use(layout):
        state = init_state(model, tx, layout, 0)
        step = jax.jit(make_train_step(model, objective, tx, OPTIMIZER, rate, seed=0, microbatches=1), donate_argnums=0)
        values = []
        for batch in batches(config.architecture):
            state, metrics = step(state, layout.global_batch(batch, SIZE))
            values.append(float(metrics["loss"]))
    return values


@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_steps_lower_the_loss_on_any_mesh(name):
    heads = ("lm",)  # the others have objectives of their own
    config = dataclasses.replace(families.preset(name), **{**SMALL, "heads": heads, **FAMILIES[name]})
    one = losses(config, {}, 1)
    assert np.mean(one[-3:]) < one[0] - 0.5
    eight = losses(config, {"data": 2, "fsdp": 2, "tensor": 2}, 8)
    # The first step is the same sum in another order; later ones feel how Adam answers to gradients that are nearly zero.
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(eight, one, rtol=2e-3)
