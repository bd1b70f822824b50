"""Gemma 2. Reference: Gemma Team 2024, arXiv:2408.00118, table 1."""

from __future__ import annotations

import math
from typing import Any

from maxpretrain.config import ModelConfig, RopeConfig
from maxpretrain.errors import UserError
from maxpretrain.models.families import gated
from maxpretrain.models.families.naming import Name
from maxpretrain.models.families.options import THEIR_ACTIVATIONS, Options, rope_to, types_to

MODEL_TYPE = "gemma2"
CLASSES = {
    "Gemma2ForCausalLM": ("lm",),
    "Gemma2ForSequenceClassification": ("sequence",),
    "Gemma2ForTokenClassification": ("token",),
}
PREFIX = ""
IGNORED = (r"rotary_emb\.inv_freq$",)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def from_options(options: Options) -> ModelConfig:
    return shared_from(
        options,
        period=2,
        max_length=options.get("max_position_embeddings", default=8192),
        attention_softcap=options.raw.get("attn_logit_softcapping", 50.0),  # null: none
        logit_softcap=options.raw.get("final_logit_softcapping", 30.0),
    )


def shared_from(options: Options, *, period: int, **more: Any) -> ModelConfig:
    """What Gemma 3 has too; `more` as `gated.from_options` takes it.

    Args:
        period: where the file gives no kinds of layers, every so many layers the last one sees everything.
    """
    options.only("use_bidirectional_attention", False)
    layers, width = range(options.get("num_hidden_layers")), options.get("head_dim", default=256)
    types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in layers]
    scalar = options.get("query_pre_attn_scalar", default=256)
    bias = options.get("attention_bias", default=False)
    return gated.from_options(
        options,
        num_kv_heads=options.get("num_key_value_heads", default=4),
        head_dim=width,
        norm="rmsnorm_offset",
        norm_placement="sandwich",
        embed_scale=True,
        attention_scale=None if scalar == width else scalar**-0.5,
        activation=options.activation("hidden_activation", default="gelu_pytorch_tanh"),
        tie_embeddings=options.get("tie_word_embeddings", default=True),
        qkv_bias=bias,
        out_bias=bias,
        **gated.windows(options.raw.get("sliding_window", 4096), options.get("layer_types", default=types)),
        **more,
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    return shared_to(model) | rope_to(model)


def shared_to(model: ModelConfig) -> dict[str, Any]:
    """The keys that Gemma 3 has too."""
    return gated.to_options(model) | {
        "hidden_activation": THEIR_ACTIVATIONS[model.activation],
        "query_pre_attn_scalar": _scalar(model),
        "attention_bias": gated.qkv_bias(model),
        # The reference makes the mask of local layers even where there are none.
        "sliding_window": model.max_length if model.window is None else model.window,
        "layer_types": types_to(model),
        "attn_logit_softcapping": model.attention_softcap,
        "final_logit_softcapping": model.logit_softcap,
    }


def _scalar(model: ModelConfig) -> int:
    """The whole number whose −½th power multiplies q·k."""
    if model.attention_scale is None:
        return model.head_width
    scalar = round(model.attention_scale**-2)
    if not math.isclose(scalar, model.attention_scale**-2, rel_tol=1e-6):
        raise UserError(
            f"model.attention_scale {model.attention_scale} is no 1/√n of a whole n, and config.json has only that"
        )
    return scalar


def names(model: ModelConfig) -> list[Name]:
    return gated.names(model)


def _size(
    layers: int, dim: int, heads: int, kv_heads: int, head_dim: int, mlp: int, scale: float | None = None
) -> ModelConfig:
    return gated.shape(
        vocab_size=256_000,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp,
        max_length=8192,
        embed_scale=True,
        rope=RopeConfig(theta=1e4),
        norm="rmsnorm_offset",
        norm_eps=1e-6,
        norm_placement="sandwich",
        attention_scale=scale,
        attention_softcap=50.0,
        window=4096,
        layer_pattern=("local", "global"),
        activation="gelu_tanh",
        tie_embeddings=True,
        logit_softcap=30.0,
    )


PRESETS = {
    "gemma-2-2b": _size(26, 2304, 8, 4, 256, 9216),
    "gemma-2-9b": _size(42, 3584, 16, 8, 256, 14_336),
    "gemma-2-27b": _size(46, 4608, 32, 16, 128, 36_864, 144**-0.5),  # by width / heads, not by the heads' width
}
