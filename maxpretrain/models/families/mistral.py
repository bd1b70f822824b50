"""Mistral. Reference: Jiang et al. 2023, arXiv:2310.06825, table 1; later sizes as their config.json has them."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig, RopeConfig
from maxpretrain.models.families import gated
from maxpretrain.models.families.naming import Name
from maxpretrain.models.families.options import Options, rope_to

MODEL_TYPE = "mistral"
CLASSES = {
    "MistralForCausalLM": ("lm",),
    "MistralForSequenceClassification": ("sequence",),
    "MistralForTokenClassification": ("token",),
}
PREFIX = ""
IGNORED = (r"rotary_emb\.inv_freq$",)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def from_options(options: Options) -> ModelConfig:
    window = options.raw.get("sliding_window", 4096)  # null: none
    kind = "full_attention" if window is None else "sliding_attention"
    options.only("layer_types", [kind] * options.get("num_hidden_layers"))  # the reference reads none
    return gated.from_options(
        options,
        num_kv_heads=options.raw.get("num_key_value_heads", 8),  # null: as many as heads
        max_length=options.get("max_position_embeddings", default=131_072),
        window=window,
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    return gated.to_options(model) | rope_to(model) | {"sliding_window": model.window}


def names(model: ModelConfig) -> list[Name]:
    return gated.names(model)


def _size(
    layers: int,
    dim: int,
    heads: int,
    mlp: int,
    vocab: int,
    *,
    theta: float = 1e6,
    length: int = 32_768,
    window: int | None = None,
) -> ModelConfig:
    return gated.shape(
        vocab_size=vocab,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=None if 128 * heads == dim else 128,
        mlp_dim=mlp,
        max_length=length,
        rope=RopeConfig(theta=theta),
        norm_eps=1e-5,
        window=window,
    )


PRESETS = {
    "mistral-7b-v0.1": _size(32, 4096, 32, 14_336, 32_000, theta=1e4, window=4096),
    "mistral-7b-v0.3": _size(32, 4096, 32, 14_336, 32_768),
    "mistral-nemo-12b": _size(40, 5120, 32, 14_336, 131_072, length=128_000),
    "mistral-small-24b": _size(40, 5120, 32, 32_768, 131_072, theta=1e8),
    "mistral-large-123b": _size(88, 12_288, 96, 28_672, 32_768, length=131_072),
}
