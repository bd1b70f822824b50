"""Gemma 3 without vision. Reference: Gemma Team 2025, arXiv:2503.19786, table 1; 270M as its config.json has it.

Of the sizes from 4B on, which are published with vision, these are the text models.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from maxpretrain.config import ModelConfig, RopeConfig
from maxpretrain.models.families import gated, gemma2
from maxpretrain.models.families.naming import Name
from maxpretrain.models.families.options import Options, rope_to

MODEL_TYPE = "gemma3_text"
CLASSES = {"Gemma3ForCausalLM": ("lm",), "Gemma3TextForSequenceClassification": ("sequence",)}
PREFIX = ""
IGNORED = (r"rotary_emb\.inv_freq$",)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
PATTERN = ("local",) * 5 + ("global",)


def from_options(options: Options) -> ModelConfig:
    options.only("attn_logit_softcapping")  # the reference has the key and does not read it
    rope = options.rope(theta=1e6)
    return gemma2.shared_from(
        options,
        period=options.get("sliding_window_pattern", default=6),
        max_length=options.get("max_position_embeddings", default=131_072),
        rope=dataclasses.replace(rope, local_theta=rope.local_theta or 1e4),
        qk_norm="head",
        logit_softcap=options.get("final_logit_softcapping", default=None),
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    period = len(model.layer_pattern)
    # How layer_types were once written.
    regular = model.layer_pattern == (*["local"] * (period - 1), "global")
    old = {"sliding_window_pattern": period} if regular else {}
    return gemma2.shared_to(model) | rope_to(model, by_layer=True) | old


def names(model: ModelConfig) -> list[Name]:
    return gated.names(model)


def _size(
    layers: int,
    dim: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    *,
    head_dim: int = 256,
    scale: float | None = None,
    large: bool = True,
) -> ModelConfig:
    stretched = RopeConfig(theta=1e6, local_theta=1e4, scaling="linear", factor=8.0)
    return gated.shape(
        vocab_size=262_208 if large else 262_144,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp,
        max_length=131_072 if large else 32_768,
        embed_scale=True,
        rope=stretched if large else RopeConfig(theta=1e6, local_theta=1e4),
        norm="rmsnorm_offset",
        norm_eps=1e-6,
        norm_placement="sandwich",
        attention_scale=scale,
        qk_norm="head",
        window=1024 if large else 512,
        layer_pattern=PATTERN,
        activation="gelu_tanh",
        tie_embeddings=True,
    )


PRESETS = {
    "gemma-3-270m": _size(18, 640, 4, 1, 2048, large=False),
    "gemma-3-1b": _size(26, 1152, 4, 1, 6912, large=False),
    "gemma-3-4b": _size(34, 2560, 8, 4, 10_240),
    "gemma-3-12b": _size(48, 3840, 16, 8, 15_360),
    "gemma-3-27b": _size(62, 5376, 32, 16, 21_504, head_dim=128, scale=168**-0.5),
}
