"""Qwen3. Reference: Qwen Team 2025, arXiv:2505.09388, table 1."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig, RopeConfig
from maxpretrain.models.families import gated, qwen2
from maxpretrain.models.families.naming import Name
from maxpretrain.models.families.options import Options

MODEL_TYPE = "qwen3"
CLASSES = {
    "Qwen3ForCausalLM": ("lm",),
    "Qwen3ForSequenceClassification": ("sequence",),
    "Qwen3ForTokenClassification": ("token",),
}
PREFIX = ""
IGNORED = (r"rotary_emb\.inv_freq$",)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def from_options(options: Options) -> ModelConfig:
    bias = options.get("attention_bias", default=False)
    width = options.get("head_dim", default=128)
    return qwen2.shared_from(options, head_dim=width, qk_norm="head", qkv_bias=bias, out_bias=bias)


def to_options(model: ModelConfig) -> dict[str, Any]:
    return qwen2.to_options(model) | {"attention_bias": gated.qkv_bias(model)}


def names(model: ModelConfig) -> list[Name]:
    return gated.names(model)


def _size(layers: int, dim: int, heads: int, mlp: int, *, tied: bool = False) -> ModelConfig:
    return gated.shape(
        vocab_size=151_936,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=None if 128 * heads == dim else 128,
        mlp_dim=mlp,
        max_length=40_960,
        rope=RopeConfig(theta=1e6),
        norm_eps=1e-6,
        qk_norm="head",
        tie_embeddings=tied,
    )


PRESETS = {
    "qwen3-0.6b": _size(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _size(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _size(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _size(36, 4096, 32, 12_288),
    "qwen3-14b": _size(40, 5120, 40, 17_408),
    "qwen3-32b": _size(64, 5120, 64, 25_600),
}
