"""OLMoE. Reference: Muennighoff et al. 2024, arXiv:2409.02060, §2 and appendix B."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig, MoEConfig
from maxpretrain.models.families import experts, gated
from maxpretrain.models.families.naming import Name
from maxpretrain.models.families.options import Options, rope_to

MODEL_TYPE = "olmoe"
CLASSES = {"OlmoeForCausalLM": ("lm",)}
PREFIX = ""
IGNORED = (r"rotary_emb\.inv_freq$",)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def from_options(options: Options) -> ModelConfig:
    options.only("clip_qkv")
    options.only("sliding_window")
    options.only("head_dim", options.get("hidden_size") // options.get("num_attention_heads"))
    bias = options.get("attention_bias", default=False)
    return gated.from_options(
        options,
        max_length=options.get("max_position_embeddings", default=4096),
        norm_eps=options.get("rms_norm_eps", default=1e-5),
        qk_norm="projection",
        qkv_bias=bias,
        out_bias=bias,
        moe=MoEConfig(
            num_experts=options.get("num_experts", "num_local_experts", default=64),
            top_k=options.get("num_experts_per_tok", default=8),
            renormalize=options.get("norm_topk_prob", default=False),
        ),
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    experts.require_everywhere(model, MODEL_TYPE)
    return (
        gated.to_options(model)
        | rope_to(model)
        | {
            "intermediate_size": model.expert_width,
            "attention_bias": gated.qkv_bias(model),
            "clip_qkv": None,
            "num_experts": model.moe.num_experts,
            "num_experts_per_tok": model.moe.top_k,
            "norm_topk_prob": model.moe.renormalize,
        }
    )


def names(model: ModelConfig) -> list[Name]:
    return experts.names(model)


PRESETS = {
    "olmoe-1b-7b": ModelConfig(
        vocab_size=50_304,
        num_layers=16,
        model_dim=2048,
        num_heads=16,
        num_kv_heads=16,
        mlp_dim=1024,
        max_length=4096,
        position="rope",
        norm="rmsnorm",
        norm_eps=1e-5,
        qk_norm="projection",
        activation="silu",
        gated=True,
        moe=MoEConfig(num_experts=64, top_k=8, renormalize=False),
        bias=False,
        tie_embeddings=False,
        init="truncated_normal",  # there cut at 3 standard deviations
        init_std=0.02,
        depth_scaled_init=False,
    )
}
