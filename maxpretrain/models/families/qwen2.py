"""Qwen2.5. Reference: Qwen Team 2024, arXiv:2412.15115, table 1."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig, RopeConfig
from maxpretrain.models.families import gated
from maxpretrain.models.families.naming import Name
from maxpretrain.models.families.options import Options, rope_to, types_to

MODEL_TYPE = "qwen2"
CLASSES = {
    "Qwen2ForCausalLM": ("lm",),
    "Qwen2ForSequenceClassification": ("sequence",),
    "Qwen2ForTokenClassification": ("token",),
}
PREFIX = ""
IGNORED = (r"rotary_emb\.inv_freq$",)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def from_options(options: Options) -> ModelConfig:
    return shared_from(options, qkv_bias=True)


def shared_from(options: Options, **more: Any) -> ModelConfig:
    """What Qwen3 has too; `more` as `gated.from_options` takes it."""
    window = options.raw.get("sliding_window", 4096) if options.get("use_sliding_window", default=False) else None
    layers, first = options.get("num_hidden_layers"), options.get("max_window_layers", default=28)
    by_depth = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    return gated.from_options(
        options,
        num_kv_heads=options.raw.get("num_key_value_heads", 32),  # null: as many as heads
        max_length=options.get("max_position_embeddings", default=32_768),
        **gated.windows(window, options.get("layer_types", default=by_depth)),
        **more,
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    local = [model.is_local(i) for i in range(model.num_layers)]
    return (
        gated.to_options(model)
        | rope_to(model)
        | {
            "use_sliding_window": any(local),
            "sliding_window": model.window if any(local) else None,
            "max_window_layers": local.index(True) if any(local) else model.num_layers,
            "layer_types": types_to(model),
        }
    )


def names(model: ModelConfig) -> list[Name]:
    return gated.names(model)


def _size(
    layers: int,
    dim: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    *,
    vocab: int = 152_064,
    tied: bool = False,
    length: int = 131_072,
    eps: float = 1e-5,
) -> ModelConfig:
    return gated.shape(
        vocab_size=vocab,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=mlp,
        max_length=length,
        rope=RopeConfig(theta=1e6),
        norm_eps=eps,
        qkv_bias=True,
        tie_embeddings=tied,
    )


PRESETS = {
    "qwen2.5-0.5b": _size(24, 896, 14, 2, 4864, vocab=151_936, tied=True, length=32_768, eps=1e-6),
    "qwen2.5-1.5b": _size(28, 1536, 12, 2, 8960, vocab=151_936, tied=True, eps=1e-6),
    "qwen2.5-3b": _size(36, 2048, 16, 2, 11_008, vocab=151_936, tied=True, length=32_768, eps=1e-6),
    "qwen2.5-7b": _size(28, 3584, 28, 4, 18_944, eps=1e-6),
    "qwen2.5-14b": _size(48, 5120, 40, 8, 13_824),
    "qwen2.5-32b": _size(64, 5120, 40, 8, 27_648),
    "qwen2.5-72b": _size(80, 8192, 64, 8, 29_568),
}
