"""Mixtral. Reference: Jiang et al. 2024, arXiv:2401.04088, table 1."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig, MoEConfig, RopeConfig
from maxpretrain.models.families import experts, gated
from maxpretrain.models.families.naming import Name
from maxpretrain.models.families.options import Options, rope_to

MODEL_TYPE = "mixtral"
CLASSES = {
    "MixtralForCausalLM": ("lm",),
    "MixtralForSequenceClassification": ("sequence",),
    "MixtralForTokenClassification": ("token",),
}
PREFIX = ""
IGNORED = (r"rotary_emb\.inv_freq$",)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def from_options(options: Options) -> ModelConfig:
    options.only("router_jitter_noise", 0.0)
    return gated.from_options(
        options,
        num_kv_heads=options.raw.get("num_key_value_heads", 8),  # null: as many as heads
        max_length=options.get("max_position_embeddings", default=131_072),
        rope=options.rope(theta=1e6),
        norm_eps=options.get("rms_norm_eps", default=1e-5),
        window=options.get("sliding_window", default=None),
        moe=MoEConfig(
            num_experts=options.get("num_local_experts", "num_experts", default=8),
            top_k=options.get("num_experts_per_tok", default=2),
        ),
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    experts.require_everywhere(model, MODEL_TYPE)
    return (
        gated.to_options(model)
        | rope_to(model)
        | {
            "intermediate_size": model.expert_width,
            "sliding_window": model.window,
            "num_local_experts": model.moe.num_experts,
            "num_experts_per_tok": model.moe.top_k,
        }
    )


def names(model: ModelConfig) -> list[Name]:
    return experts.names(model, mlp="block_sparse_moe", parts={"gate": "w1", "up": "w3", "down": "w2"})


def _size(layers: int, dim: int, heads: int, mlp: int, length: int) -> ModelConfig:
    return gated.shape(
        vocab_size=32_000,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=8,
        mlp_dim=mlp,
        max_length=length,
        rope=RopeConfig(theta=1e6),
        norm_eps=1e-5,
        moe=MoEConfig(num_experts=8, top_k=2),
    )


PRESETS = {
    "mixtral-8x7b": _size(32, 4096, 32, 14_336, 32_768),
    "mixtral-8x22b": _size(56, 6144, 48, 16_384, 65_536),
}
