"""OLMo 2. Reference: OLMo Team 2025, arXiv:2501.00656, table 1."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig, RopeConfig
from maxpretrain.models.families import gated
from maxpretrain.models.families.naming import Name
from maxpretrain.models.families.options import Options, rope_to

MODEL_TYPE = "olmo2"
CLASSES = {"Olmo2ForCausalLM": ("lm",), "Olmo2ForSequenceClassification": ("sequence",)}
PREFIX = ""
IGNORED = (r"rotary_emb\.inv_freq$",)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def from_options(options: Options) -> ModelConfig:
    bias = options.get("attention_bias", default=False)
    return gated.from_options(
        options,
        norm_eps=options.get("rms_norm_eps", default=1e-5),
        norm_placement="output",
        qk_norm="projection",
        qkv_bias=bias,
        out_bias=bias,
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    return gated.to_options(model) | rope_to(model) | {"attention_bias": gated.qkv_bias(model)}


def names(model: ModelConfig) -> list[Name]:
    return gated.names(model)


def _size(layers: int, dim: int, heads: int, kv_heads: int, mlp: int) -> ModelConfig:
    return gated.shape(
        vocab_size=100_352,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=mlp,
        max_length=4096,
        rope=RopeConfig(theta=5e5),
        norm_eps=1e-6,
        norm_placement="output",
        qk_norm="projection",
    )


PRESETS = {
    "olmo2-1b": _size(16, 2048, 16, 16, 8192),
    "olmo2-7b": _size(32, 4096, 32, 32, 11_008),
    "olmo2-13b": _size(40, 5120, 40, 40, 13_824),
    "olmo2-32b": _size(64, 5120, 40, 8, 27_648),
}
