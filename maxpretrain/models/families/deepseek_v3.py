"""DeepSeek-V3, without its module that predicts further tokens. Reference: DeepSeek-AI 2024, arXiv:2412.19437, §4.2."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import LatentConfig, ModelConfig, MoEConfig, RopeConfig
from maxpretrain.errors import UserError
from maxpretrain.models.families import experts, gated
from maxpretrain.models.families.naming import Name, linear, norm
from maxpretrain.models.families.options import Options, rope_to

MODEL_TYPE = "deepseek_v3"
CLASSES = {
    "DeepseekV3ForCausalLM": ("lm",),
    "DeepseekV3ForSequenceClassification": ("sequence",),
    "DeepseekV3ForTokenClassification": ("token",),
}
PREFIX = ""
# The module for further tokens comes as layer 61 of the published file, behind those of the network.
IGNORED = (r"rotary_emb\.inv_freq$", r"^model\.layers\.61\.")
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def from_options(options: Options) -> ModelConfig:
    options.only("num_key_value_heads", options.get("num_attention_heads"))
    options.only("scoring_func", "sigmoid")
    options.only("topk_method", "noaux_tc")
    options.only("moe_layer_freq", 1)
    bias = options.get("attention_bias", default=False)
    return gated.from_options(
        options,
        num_kv_heads=None,
        head_dim=None,  # theirs is the rotary part's
        max_length=options.get("max_position_embeddings", default=4096),
        rope=options.rope(layout="interleaved" if options.get("rope_interleave", default=True) else "half"),
        latent=LatentConfig(
            kv_rank=options.get("kv_lora_rank", default=512),
            q_rank=options.raw.get("q_lora_rank", 1536),  # null: no latent
            nope_dim=options.get("qk_nope_head_dim", default=128),
            rope_dim=options.get("qk_rope_head_dim", default=64),
            value_dim=options.get("v_head_dim", default=128),
        ),
        qkv_bias=bias,
        out_bias=bias,
        moe=_experts(options),
    )


def _experts(options: Options) -> MoEConfig:
    width = options.get("moe_intermediate_size", default=2048)
    dense = min(options.get("first_k_dense_replace", default=3), options.get("num_hidden_layers"))
    return MoEConfig(
        num_experts=options.get("n_routed_experts", "num_local_experts", default=256),
        top_k=options.get("num_experts_per_tok", default=8),
        expert_dim=width,
        shared_dim=width * options.get("n_shared_experts", default=1),
        dense_layers=tuple(range(dense)),
        router="sigmoid",
        renormalize=options.get("norm_topk_prob", default=True),
        scale=options.get("routed_scaling_factor", default=2.5),
        groups=options.get("n_group", default=8),
        top_groups=options.get("topk_group", default=4),
        balance_bias=True,
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    """
    Raises:
        UserError: layers without experts that are not the first, or a shared MLP that is no multiple of an expert.
    """
    moe, latent = model.moe, model.latent
    dense, (shared, rest) = experts.dense_layers(model), divmod(moe.shared_dim, model.expert_width)
    if dense != list(range(len(dense))):
        raise UserError(
            f"model.moe.dense_layers {moe.dense_layers} are not the first {len(dense)}; deepseek_v3 has no others"
        )
    if rest:
        raise UserError(
            f"model.moe.shared_dim {moe.shared_dim} is no multiple of an expert's {model.expert_width}, which deepseek_v3 needs"
        )
    rope = rope_to(model)
    for spelling in (rope["rope_parameters"], rope["rope_scaling"] or {}):
        if spelling and model.rope.mscale_all_dim is not None:  # read with any scaling here
            spelling["mscale_all_dim"] = model.rope.mscale_all_dim
    return (
        gated.to_options(model)
        | rope
        | {
            "rope_interleave": model.rope.layout == "interleaved",
            "head_dim": latent.rope_dim,
            "qk_head_dim": latent.nope_dim + latent.rope_dim,
            "kv_lora_rank": latent.kv_rank,
            "q_lora_rank": latent.q_rank,
            "qk_nope_head_dim": latent.nope_dim,
            "qk_rope_head_dim": latent.rope_dim,
            "v_head_dim": latent.value_dim,
            "attention_bias": gated.qkv_bias(model),
            "first_k_dense_replace": len(dense),
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": model.expert_width,
            "n_shared_experts": shared,
            "norm_topk_prob": moe.renormalize,
            "routed_scaling_factor": moe.scale,
            "n_group": moe.groups,
            "topk_group": moe.top_groups,
            "num_nextn_predict_layers": 0,
            # of the published code
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
        }
    )


def names(model: ModelConfig) -> list[Name]:
    return experts.names(model, attention=_attention)


def _attention(model: ModelConfig, theirs: str, ours: str) -> list[Name]:
    bias = gated.qkv_bias(model)
    found = [
        *linear(f"{theirs}.kv_a_proj_with_mqa", f"{ours}/down", bias=bias),
        *norm(f"{theirs}.kv_a_layernorm", f"{ours}/norm", bias=False),
        *linear(f"{theirs}.kv_b_proj", f"{ours}/up", bias=False),
        *linear(f"{theirs}.o_proj", f"{ours}/out", bias=gated.out_bias(model)),
    ]
    if model.latent.q_rank is None:
        return [*found, *linear(f"{theirs}.q_proj", f"{ours}/query", bias=False)]
    return [
        *found,
        *linear(f"{theirs}.q_a_proj", f"{ours}/query_down", bias=bias),
        *norm(f"{theirs}.q_a_layernorm", f"{ours}/query_norm", bias=False),
        *linear(f"{theirs}.q_b_proj", f"{ours}/query", bias=False),
    ]


# As released: pretraining had 4096 tokens and no scaling (§4.3). init_std is the paper's, not that of the released config.
_ROPE = RopeConfig(
    layout="interleaved", scaling="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0
)

PRESETS = {
    "deepseek-v3": ModelConfig(
        vocab_size=129_280,
        num_layers=61,
        model_dim=7168,
        num_heads=128,
        mlp_dim=18_432,
        max_length=163_840,
        position="rope",
        rope=_ROPE,
        norm="rmsnorm",
        norm_eps=1e-6,
        latent=LatentConfig(kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, value_dim=128),
        activation="silu",
        gated=True,
        moe=MoEConfig(
            num_experts=256,
            top_k=8,
            expert_dim=2048,
            shared_dim=2048,
            dense_layers=(0, 1, 2),
            router="sigmoid",
            scale=2.5,
            groups=8,
            top_groups=4,
            balance_bias=True,
        ),
        bias=False,
        tie_embeddings=False,
        init="normal",
        init_std=0.006,
        depth_scaled_init=False,
    )
}
