"""Llama 2 and 3. References: Touvron et al. 2023, arXiv:2307.09288; Llama Team 2024, arXiv:2407.21783, table 3."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig, RopeConfig
from maxpretrain.models.families import gated
from maxpretrain.models.families.naming import Name
from maxpretrain.models.families.options import Options, rope_to

MODEL_TYPE = "llama"
CLASSES = {
    "LlamaForCausalLM": ("lm",),
    "LlamaForSequenceClassification": ("sequence",),
    "LlamaForTokenClassification": ("token",),
}
IGNORED = (r"rotary_emb\.inv_freq$",)
PREFIX = ""
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def from_options(options: Options) -> ModelConfig:
    bias = options.get("attention_bias", default=False)
    mlp_bias = options.get("mlp_bias", default=False)
    return gated.from_options(options, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def to_options(model: ModelConfig) -> dict[str, Any]:
    return (
        gated.to_options(model)
        | rope_to(model)
        | {"attention_bias": gated.qkv_bias(model), "mlp_bias": gated.mlp_bias(model)}
    )


def names(model: ModelConfig) -> list[Name]:
    return gated.names(model)


def _size(
    layers: int, dim: int, heads: int, kv_heads: int, mlp: int, vocab: int, theta: float, length: int
) -> ModelConfig:
    return gated.shape(
        vocab_size=vocab,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=mlp,
        max_length=length,
        rope=RopeConfig(theta=theta),
        norm_eps=1e-5,
    )


PRESETS = {
    "llama-2-7b": _size(32, 4096, 32, 32, 11_008, 32_000, 1e4, 4096),
    "llama-2-13b": _size(40, 5120, 40, 40, 13_824, 32_000, 1e4, 4096),
    "llama-2-70b": _size(80, 8192, 64, 8, 28_672, 32_000, 1e4, 4096),
    "llama-3-8b": _size(32, 4096, 32, 8, 14_336, 128_256, 5e5, 8192),
    "llama-3-70b": _size(80, 8192, 64, 8, 28_672, 128_256, 5e5, 8192),
}
