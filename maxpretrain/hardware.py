"""How a step runs on each kind of device: the rule table that `auto` in ComputeConfig refers to, apart from any model."""

from __future__ import annotations

import dataclasses
import re

import jax

from maxpretrain.config import ModelConfig, Run
from maxpretrain.errors import UserError
from maxpretrain.nn.stack import Execution


@dataclasses.dataclass(frozen=True)
class Rule:
    """What suits one kind of device.

    Attributes:
        dtype: of matrix products.
        attention: kernel.
        scan_from: layers from which a loop is worth it; fewer are compiled one after another.
        logits: elements of a chunk's logits, per device.
    """

    dtype: str
    attention: str
    scan_from: int
    logits: int


# The first pattern found in "platform device_kind" counts.
RULES: tuple[tuple[str, Rule], ...] = (
    # Unrolled layers save the copies in and out of stacked arrays, but each adds to the compile time.
    (r"^cpu", Rule("float32", "xla", scan_from=9, logits=1 << 22)),
    # cuDNN's flash attention needs Ampere or later.
    (
        r"^(gpu|cuda).*(A100|A10G?|A40|H100|H200|H800|GH200|B200|GB200|L4|L40|RTX [345])",
        Rule("bfloat16", "cudnn", 1, 1 << 28),
    ),
    (r"^(gpu|cuda|rocm)", Rule("float32", "xla", scan_from=1, logits=1 << 27)),
    (r"^tpu", Rule("bfloat16", "xla", scan_from=1, logits=1 << 27)),
    (r"", Rule("float32", "xla", scan_from=1, logits=1 << 26)),
)


def rule_for(device: jax.Device) -> Rule:
    name = f"{device.platform} {device.device_kind}"
    return next(rule for pattern, rule in RULES if re.search(pattern, name))


def resolve(run: Run, device: jax.Device, *, devices: int = 1, batch_parts: int = 1) -> tuple[Execution, list[str]]:
    """The execution that a run's ComputeConfig means on this device, and a line for each choice that was left to us.

    Args:
        devices: over which parameters and optimizer state are spread.
        batch_parts: into which the batch is cut.

    Raises:
        UserError: a kernel was asked for that cannot serve this model here.
    """
    config, rule, model = run.compute, rule_for(device), run.model
    dtype = rule.dtype if config.dtype == "auto" else config.dtype
    said = []

    why_not = cudnn_obstacle(model, dtype, device)
    attention = config.attention
    if attention == "auto":
        attention = "xla" if rule.attention == "cudnn" and why_not else rule.attention
        said.append(f"attention: {attention}" + (f" ({why_not})" if rule.attention == "cudnn" and why_not else ""))
    elif attention == "cudnn" and why_not:
        raise UserError(f"compute.attention cudnn cannot run here: {why_not}; use auto or xla")

    scan = {"on": True, "off": False, "auto": model.num_layers >= rule.scan_from}[config.scan]
    remat = config.remat
    if remat == "auto":
        remat = _remat(run, device, dtype, attention, devices, batch_parts)
        said.append(f"remat: {remat}")
    chunk = config.loss_chunk or max(128, rule.logits // (model.vocab_size or run.tokenizer.vocab_size))
    return Execution(dtype=dtype, remat=remat, scan=scan, attention=attention, loss_chunk=chunk), said


def cudnn_obstacle(model: ModelConfig, dtype: str, device: jax.Device) -> str:
    """Why cuDNN's flash attention cannot serve; empty where it can."""
    if device.platform not in ("gpu", "cuda"):
        return f"the device is a {device.platform}"
    if dtype != "bfloat16":
        return f"cuDNN attention needs bfloat16, and compute.dtype is {dtype}"
    if model.head_width % 8 or model.head_width > 128:
        return (
            f"cuDNN attention needs a head width that is a multiple of 8 up to 128, and this one is {model.head_width}"
        )
    if model.latent.kv_rank:
        return "latent attention has values of another width than keys"
    if model.attention_softcap is not None:
        return "a soft cap of the scores is done by XLA"
    if model.position in ("alibi", "t5", "disentangled"):
        return f"{model.position} positions add to the scores, which is done by XLA"
    if model.dropout:
        return "attention dropout is done by XLA"
    return ""


def _remat(run: Run, device: jax.Device, dtype: str, attention: str, devices: int, batch_parts: int) -> str:
    """The least recomputation whose memory, by estimate, fits into four fifths of the device."""
    from maxpretrain.models import parameter_count
    from maxpretrain.plan.memory import saved_per_token

    stats = device.memory_stats() if device.platform != "cpu" else None
    limit = (stats or {}).get("bytes_limit")
    if not limit:
        return "none" if device.platform == "cpu" else "full"
    model = dataclasses.replace(run.model, vocab_size=run.model.vocab_size or run.tokenizer.vocab_size)
    state = 16 * parameter_count(model) // devices  # float32 parameters, gradients and two moments
    tokens = run.tokens_per_step // run.batch.microbatches // batch_parts
    saved = saved_per_token(model, run.batch.length, Execution(dtype=dtype, attention=attention))
    for remat in ("none", "dots"):
        if state + tokens * model.num_layers * saved[remat] < 0.8 * limit:
            return remat
    return "full"
