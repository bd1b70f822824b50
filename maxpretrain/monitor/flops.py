"""FLOPs of a model and of a device: what MFU (model FLOPs utilization) divides.

MFU = tokens per second × FLOPs per token / (devices × peak FLOP/s of one). The field counts attention in two ways and
rarely says which, so both are kept everywhere:

    full    every query against every key: 12·L·H·K·T per token (PaLM's appendix B; MaxText, llm-foundry)
    causal  only the half of the square that a causal mask leaves: 6·L·H·K·T per token (llm.q)

Both add 6 per parameter that is in a matrix product: 2 in the forward pass (a product and a sum), twice that in the
backward. Recomputation (remat) is not counted: it is no progress.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxpretrain import modelsize
from maxpretrain.config import ModelConfig
from maxpretrain.objectives import Objective


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that take part in a matrix product with every token.

    The projections of attention, the MLP (of experts: those that a token goes to), and the unembedding, tied or not. A matrix
    that serves several layers counts in each. Not the embedding look-up, position tables, norms and biases.

    Args:
        model: with `vocab_size` given.

    Raises:
        ValueError: `vocab_size` is None.
    """
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is None; give the tokenizer's size")
    decoder = modelsize.stack_matrices(model, decoder=True) if model.architecture == "encoder-decoder" else 0
    head = modelsize.head_matrices(model, model.vocab_size) if "lm" in model.heads else 0
    return modelsize.stack_matrices(model) + decoder + head


def flops_per_token(
    model: ModelConfig,
    length: int,
    causal: bool,
    *,
    decoder_length: int | None = None,
    predictions: int | None = None,
) -> float:
    """FLOPs to train on one token, forward and backward.

    6·(matrix parameters) + 12·H·K·(keys seen) a layer: all T of them, or those of a window; with half of the latter where
    causal attention is counted once. Parts that not every token goes through count by their share of the tokens.

    Args:
        model: with `vocab_size` given.
        length: tokens in a sequence, T; of an encoder-decoder those of the encoder, which the FLOPs are shared out to.
        causal: count only what a causal mask leaves of attention, T/2 keys a query.
        decoder_length: tokens of an encoder-decoder's decoder; None: as many.
        predictions: places of a sequence whose logits are computed; None: all (of the decoder).

    Reference:
        Chowdhery et al., 2022, PaLM, arXiv:2204.02311, appendix B.
    """
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is None; give the tokenizer's size")
    latent = model.latent
    width = (latent.nope_dim + latent.rope_dim + latent.value_dim) / 2 if latent.kv_rank else model.head_width
    pairs = length * sum(modelsize.seen_keys(model, i, length, causal=causal) for i in range(model.num_layers))
    products = length * modelsize.stack_matrices(model)
    last = length
    if model.architecture == "encoder-decoder":
        last = length if decoder_length is None else decoder_length
        own = last / 2 if causal else last
        pairs = model.num_layers * length**2 + model.decoder_layers * last * (own + length)
        # Of the attention to the encoder, keys and values are made of the encoder's tokens.
        memory = model.decoder_layers * modelsize.memory_matrices(model)
        products += last * (modelsize.stack_matrices(model, decoder=True) - memory) + length * memory
    if "lm" in model.heads:
        asked = last if predictions is None else predictions
        products += asked * modelsize.head_matrices(model, model.vocab_size)
    return float(6 * products + 12 * model.num_heads * width * pairs) / length


def training_flops(objective: Objective, model: ModelConfig, length: int, causal: bool) -> float:
    """`flops_per_token` of an objective's examples of `length`, over all networks that they go through."""
    total = 0.0
    for work in objective.work(model, length):
        sizes = {"decoder_length": work.decoder_length, "predictions": work.predictions}
        total += (flops_per_token(work.model, work.length, causal, **sizes) + 6 * work.extra) * work.length / length
    return total


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A published accelerator, as JAX sees it.

    Attributes:
        name: to show.
        pattern: regular expression that the lower-cased device kind, or the name a user types, must match in whole.
        tflops: bf16 dense peak of one JAX device, TFLOP/s.
        memory: GiB of one JAX device.
        slice_units: what the number in a slice's name counts, per JAX device (v5p-8 has 8 cores, but 4 devices).
        note: said beside the peak.
    """

    name: str
    pattern: str
    tflops: float
    memory: float
    slice_units: int = 1
    note: str = "bf16 dense"

    @property
    def flops(self) -> float:
        return self.tflops * 1e12


def _gpu(model: str, rest: str = "") -> str:
    """Matches a GPU by the word `model`, whatever surrounds it; `rest` must follow somewhere.

    A slice of a GPU (MIG) and a laptop's GPU bear the same word and are something else.
    """
    return rf"(?!.*\b(?:mig|laptop|max-q)\b)(?:.*\b)?{model}\b.*{rest}.*"


# In order: the first that matches. A TPU v2, v3 or 7x chip is two JAX devices, so their numbers are of half a chip.
ACCELERATORS = (
    Accelerator("TPU v2", r"(tpu )?v2", 22.5, 8),
    Accelerator("TPU v3", r"(tpu )?v3", 61.5, 16),
    Accelerator("TPU v4", r"(tpu )?v4", 275, 32, slice_units=2),
    Accelerator("TPU v5e", r"tpu v5 ?lite|(tpu )?v5e|v5litepod", 197, 16),
    Accelerator("TPU v5p", r"tpu v5|(tpu )?v5p", 459, 95, slice_units=2),
    Accelerator("TPU v6e", r"tpu v6 ?lite|(tpu )?v6e", 918, 31.24),
    Accelerator("TPU7x", r"tpu ?v?7x|v7x", 1153.5, 96, note="bf16 dense, half of a chip's 2307"),
    Accelerator("NVIDIA H100 PCIe", _gpu("h100", "pcie"), 756, 79),
    Accelerator("NVIDIA H100 NVL", _gpu("h100", "nvl"), 835.5, 93),
    Accelerator("NVIDIA H200 NVL", _gpu("h200", "nvl"), 835.5, 139),
    Accelerator("NVIDIA H200", _gpu("h200"), 989.5, 139),
    Accelerator("NVIDIA GH200", _gpu("gh200"), 989.5, 94),
    Accelerator("NVIDIA H100", _gpu("h[18]00"), 989.5, 79),
    Accelerator("NVIDIA H20", _gpu("h20"), 148, 95),
    Accelerator("NVIDIA GB200", _gpu("gb200"), 2500, 184),
    Accelerator("NVIDIA B200", _gpu("b200"), 2250, 178),
    Accelerator("NVIDIA A100 40GB", _gpu("a[18]00", "40 ?gb"), 312, 39),
    Accelerator("NVIDIA A100", _gpu("a[18]00"), 312, 79),
    Accelerator("NVIDIA A40", _gpu("a40"), 149.7, 45),
    Accelerator("NVIDIA A10G", _gpu("a10g"), 70, 22),
    Accelerator("NVIDIA A10", _gpu("a10"), 125, 22),
    Accelerator("NVIDIA L40S", _gpu("l40s"), 362, 45),
    Accelerator("NVIDIA L4", _gpu("l4"), 121, 22),
    Accelerator("NVIDIA T4", _gpu("t4"), 65, 15, note="fp16 dense; it has no bf16"),
    Accelerator("NVIDIA V100 PCIe", _gpu("v100", "pcie"), 112, 16, note="fp16 dense; it has no bf16"),
    Accelerator("NVIDIA V100", _gpu("v100"), 125, 16, note="fp16 dense; it has no bf16"),
    Accelerator("NVIDIA RTX 4090", _gpu("(?:rtx )?4090(?! d)"), 165.2, 23.5),
    Accelerator("NVIDIA RTX 3090", _gpu("(?:rtx )?3090(?! ti)"), 71, 23.5),
    Accelerator("AMD MI300X", _gpu("mi300x"), 1307.4, 191),
)


def find_accelerator(kind: str) -> Accelerator | None:
    """The published accelerator of a JAX `device_kind`, or of a name like h200 or v5p; None where it is not in the table."""
    words = kind.strip().lower().replace("_", " ").replace("-", " ")
    return next((a for a in ACCELERATORS if re.fullmatch(a.pattern, words)), None)


@functools.cache
def _measured_matmul(device: jax.Device) -> float:
    """FLOP/s of the best of some square matrix products on `device`, after one to warm up; about a quarter of a second."""
    cpu = device.platform == "cpu"
    size, dtype = (1024, jnp.float32) if cpu else (4096, jnp.bfloat16)
    # Not zeros: constants spare power, and so run faster than a model would.
    host = np.random.default_rng(0).standard_normal((size, size), np.float32)
    x = jax.device_put(host.astype(dtype), device)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=dtype))
    product(x, x).block_until_ready()
    fastest, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < 0.15:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest


def peak_flops(device: Any) -> tuple[float, str]:
    """Peak FLOP/s of one JAX device, and where the number is from.

    A device that is not in the table, and any CPU, is measured by a large matrix product (float32 on a CPU, bf16 else),
    once per process. Every XLA device of a CPU uses all its cores when the others are idle, so a device of n has an nth.

    Args:
        device: a `jax.Device`.

    Returns:
        FLOP/s, and a text that names the table's entry, or begins with "measured matmul peak".
    """
    found = None if device.platform == "cpu" else find_accelerator(device.device_kind)
    if found is not None:
        return found.flops, f"{found.name}, {found.note}"
    if device.platform != "cpu":
        return _measured_matmul(device), f"measured matmul peak (bf16, {device.device_kind})"
    devices = jax.local_devices(backend="cpu")
    share = "" if len(devices) == 1 else f", 1/{len(devices)} of the CPU"
    return _measured_matmul(devices[0]) / len(devices), f"measured matmul peak (float32{share})"
