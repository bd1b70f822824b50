"""Memory of a step, by part, on each device: the state from its declared shapes, the rest by estimate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import optax

from maxpretrain.config import ModelConfig, Run
from maxpretrain.mesh import Layout
from maxpretrain.models import Model
from maxpretrain.nn.stack import Execution
from maxpretrain.objectives.base import Work
from maxpretrain.objectives.cross_entropy import num_chunks
from maxpretrain.train.state import abstract_state


def _bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of placed shapes."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# Elements of the MLP's hidden width that an activation's derivative needs (tanh gelu: five from JAX 0.12 on), and bytes of a mask.
_SAVED_BY_ACTIVATION = {"gelu_tanh": (6, 0), "gelu": (4, 0), "silu": (4, 0), "squared_relu": (2, 1), "relu": (1, 1)}


def saved_per_token(
    model: ModelConfig, length: int, execution: Execution, layout: Layout | None = None
) -> dict[str, float]:
    """Bytes that one layer keeps for the backward pass, per token on one device, under each remat policy.

    Counted from what the block computes; the tests compare with the residuals that JAX itself finds. Of the compiled step
    XLA keeps this in a loop over layers (5 % more on CPU), and up to a third less or more where layers are unrolled and
    it fuses over them. Dropout masks are left out.

    Args:
        length: tokens in a sequence.
        execution: its dtype and attention kernel count; its remat does not.
        layout: which cuts heads and MLP; None: one device.

    Returns:
        "full", "dots" and "none" -> bytes.
    """
    cut = (lambda axis: 1) if layout is None else layout.extent
    itemsize = 2 if execution.dtype == "bfloat16" else 4
    width = model.model_dim
    query = model.num_heads * model.head_width / cut("heads")
    key_value = 2 * model.kv_heads * model.head_width / (1 if model.kv_heads == 1 else cut("kv_heads"))
    moe = model.moe
    dense = (
        len(moe.dense_layers) / model.num_layers if moe.num_experts else 1.0
    )  # of the layers; an average of both kinds
    hidden = (dense * model.mlp_width + (1 - dense) * (moe.top_k * model.expert_width + moe.shared_dim)) / cut("mlp")
    elements, mask = _SAVED_BY_ACTIVATION[model.activation]
    mlp = hidden * (itemsize * (elements + (2 if model.gated else 0)) + mask)
    # A flash kernel keeps its result and one number a query; ours also the powers in float32, and the result
    # by heads beside that by tokens (nn/attend.py).
    weights = 4 * length * model.num_heads / cut("heads") + itemsize * query if execution.attention == "xla" else 0.0
    # Each norm keeps three float32 arrays; then q, k, v, the attention's result, and the inputs of the projections.
    none = 6 * 4 * width + itemsize * (2 * width + 2 * query + key_value) + mlp + weights
    return {
        "full": itemsize * width,
        "dots": itemsize * (2 * width + query + key_value + hidden * (2 if model.gated else 1)),
        "none": none,
    }


def estimate(run: Run, model: Model, optimizer: optax.GradientTransformation, layout: Layout) -> dict[str, int]:
    """Bytes by part on each device; nothing is allocated.

    Parameters and optimizer state are exact. Gradients have the parameters' size, twice where microbatches add to a sum.
    Activations are those that `model.execution.remat` keeps of all networks that an example goes through, and one layer's
    of the recomputation. Logits are a chunk in float32 and its gradient.

    Args:
        run: its batch counts.
        model: with the execution that will run.
        optimizer: as `build_optimizer` made it.
        layout: of the planned devices.

    Returns:
        "parameters", "gradients", "optimizer", "activations", "logits" -> bytes.
    """
    state = abstract_state(model, optimizer, layout)
    parameters = _bytes(state["params"])
    execution, config, batch = model.execution, model.config, run.batch
    assert config.vocab_size is not None
    rows = batch.size // batch.microbatches
    share = rows / layout.extent("batch") / layout.extent("length")
    works = run.objective.work(config, batch.length)
    kept, passing = zip(*(example_activations(work, execution, layout) for work in works), strict=True)
    predicted = max(work.predictions for work in works)
    chunk = share * predicted / num_chunks(rows, predicted, execution.loss_chunk, layout.extent("batch"))
    return {
        "parameters": parameters,
        "gradients": parameters * (2 if batch.microbatches > 1 else 1),
        "optimizer": _bytes(state["opt_state"]),
        "activations": int(share * (sum(kept) + max(passing))),
        "logits": int(2 * 4 * chunk * config.vocab_size / layout.extent("vocab")),
    }


def example_activations(work: Work, execution: Execution, layout: Layout) -> tuple[float, float]:
    """Bytes of one example's way through a network: what is kept until the backward pass, and one layer's recomputation."""
    model = work.model
    ends = 3 * (2 if execution.dtype == "bfloat16" else 4) * model.model_dim  # embedded; last states and their gradient
    stacks = [(work.length, model.num_layers, 1.0)]
    if model.architecture == "encoder-decoder":
        stacks.append((work.decoder_length, model.decoder_layers, 1.5))  # attention twice
    kept, passing = 0.0, 0.0
    for length, layers, factor in stacks:
        saved = saved_per_token(model, length, execution, layout)
        kept += length * (factor * layers * saved[execution.remat] + ends)
        passing = max(passing, factor * length * saved["none"])
    return kept, passing


def what_would_fit(
    run: Run, model: Model, optimizer: optax.GradientTransformation, layouts: list[Layout], limit: int
) -> str:
    """The first change that fits: more recomputation, then more microbatches, then parameters cut over more devices.

    Args:
        layouts: the planned one first, then those that cut parameters more.
        limit: bytes of one device.

    Returns:
        The settings as command-line flags; empty where nothing of the kind would do.
    """
    remats = ("none", "dots", "full")
    remats = remats[remats.index(model.execution.remat) :]
    counts = [k for k in range(run.batch.microbatches, run.batch.size + 1) if run.batch.size % k == 0]
    for layout in layouts:
        for microbatches in counts:
            if (run.batch.size // microbatches) % layout.extent("batch"):
                continue
            for remat in remats:
                tried_run = run.replace(batch=dataclasses.replace(run.batch, microbatches=microbatches))
                tried = run.objective.build(model.config, dataclasses.replace(model.execution, remat=remat))
                if sum(estimate(tried_run, tried, optimizer, layout).values()) > limit:
                    continue
                flags = [f"--compute.remat {remat}"] if remat != model.execution.remat else []
                flags += [f"--batch.microbatches {microbatches}"] if microbatches != run.batch.microbatches else []
                if layout is not layouts[0]:
                    flags += [
                        f"--mesh.{axis} {layout.sizes[axis]}"
                        for axis in layout.sizes
                        if layout.sizes[axis] != layouts[0].sizes[axis]
                    ]
                return " ".join(flags)
    return ""
