"""Qwen3 with experts. Reference: Qwen Team 2025, arXiv:2505.09388, table 2."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig, MoEConfig, RopeConfig
from maxpretrain.models.families import experts, gated
from maxpretrain.models.families.naming import Name
from maxpretrain.models.families.options import Options, rope_to

MODEL_TYPE = "qwen3_moe"
CLASSES = {
    "Qwen3MoeForCausalLM": ("lm",),
    "Qwen3MoeForSequenceClassification": ("sequence",),
    "Qwen3MoeForTokenClassification": ("token",),
}
PREFIX = ""
IGNORED = (r"rotary_emb\.inv_freq$",)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def from_options(options: Options) -> ModelConfig:
    layers = range(options.get("num_hidden_layers"))
    step, plain = options.get("decoder_sparse_step", default=1), options.get("mlp_only_layers", default=())
    window = options.get("sliding_window", default=4096) if options.get("use_sliding_window", default=False) else None
    bias = options.get("attention_bias", default=False)
    return gated.from_options(
        options,
        num_kv_heads=options.get("num_key_value_heads", default=4),
        max_length=options.get("max_position_embeddings", default=32_768),
        mlp_dim=options.get("intermediate_size", default=6144),
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
        window=window,
        moe=MoEConfig(
            num_experts=options.get("num_experts", "num_local_experts", default=128),
            top_k=options.get("num_experts_per_tok", default=8),
            expert_dim=options.get("moe_intermediate_size", default=768),
            dense_layers=tuple(i for i in layers if (i + 1) % step or i in plain),
            renormalize=options.get("norm_topk_prob", default=False),
        ),
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    return (
        gated.to_options(model)
        | rope_to(model)
        | {
            "attention_bias": gated.qkv_bias(model),
            "use_sliding_window": model.window is not None,
            "sliding_window": model.window,
            "num_experts": model.moe.num_experts,  # in published files
            "num_local_experts": model.moe.num_experts,  # in newer ones
            "num_experts_per_tok": model.moe.top_k,
            "moe_intermediate_size": model.expert_width,
            "mlp_only_layers": list(model.moe.dense_layers),
            "decoder_sparse_step": 1,
            "norm_topk_prob": model.moe.renormalize,
        }
    )


def names(model: ModelConfig) -> list[Name]:
    return experts.names(model)


def _size(layers: int, dim: int, heads: int, mlp: int, expert: int) -> ModelConfig:
    return gated.shape(
        vocab_size=151_936,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=4,
        head_dim=128,
        mlp_dim=mlp,
        max_length=40_960,
        rope=RopeConfig(theta=1e6),
        norm_eps=1e-6,
        qk_norm="head",
        moe=MoEConfig(num_experts=128, top_k=8, expert_dim=expert),
    )


PRESETS = {
    "qwen3-30b-a3b": _size(48, 2048, 32, 6144, 768),
    "qwen3-235b-a22b": _size(94, 4096, 64, 12_288, 1536),
}
