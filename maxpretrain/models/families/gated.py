"""What the families after Llama have in common: RMSNorm, rotary positions, a gated MLP, and their names for all that."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig
from maxpretrain.errors import UserError
from maxpretrain.models.families.naming import Name, embedding, linear, norm
from maxpretrain.models.families.options import THEIR_ACTIVATIONS, Options, pattern_from

BLOCK = "decoder/stack/block"


def shape(**fields: Any) -> ModelConfig:
    """A shape with what is usual here, where `fields` do not say otherwise."""
    usual = {
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "silu",
        "gated": True,
        "bias": False,
        "tie_embeddings": False,
        "init_std": 0.02,
        "depth_scaled_init": False,
    }
    return ModelConfig(**usual | fields)


def from_options(options: Options, **more: Any) -> ModelConfig:
    """A shape from the keys that all of them have; `more` are fields that a family adds or has otherwise."""
    fields: dict[str, Any] = {
        "vocab_size": options.get("vocab_size"),
        "num_layers": options.get("num_hidden_layers"),
        "model_dim": options.get("hidden_size"),
        "num_heads": options.get("num_attention_heads"),
        "num_kv_heads": options.get("num_key_value_heads", default=None),
        "head_dim": options.get("head_dim", default=None),
        "mlp_dim": options.get("intermediate_size"),
        "max_length": options.get("max_position_embeddings", default=2048),
        "norm_eps": options.get("rms_norm_eps", default=1e-6),
        "bias": False,
        "tie_embeddings": options.get("tie_word_embeddings", default=False),
        "dropout": options.dropout("attention_dropout"),
        "init_std": options.get("initializer_range", default=0.02),
    }
    fields |= more
    fields.setdefault("rope", options.rope())
    options.only("is_causal", True)
    if fields["rope"].fraction != 1.0:
        raise UserError(f"{options.where}: partial_rotary_factor is not supported for {options.model_type}")
    if "activation" not in fields:
        fields["activation"] = options.activation("hidden_act", default="silu")
    if fields["head_dim"] is not None and fields["head_dim"] * fields["num_heads"] == fields["model_dim"]:
        fields["head_dim"] = None
    for part in ("qkv_bias", "out_bias", "mlp_bias"):
        fields[part] = None if fields.get(part) == fields["bias"] else fields.get(part)
    return shape(**fields)


def to_options(model: ModelConfig) -> dict[str, Any]:
    """The keys that all of them have."""
    return {
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.model_dim,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.max_length,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": THEIR_ACTIVATIONS[model.activation],
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.dropout,
        "initializer_range": model.init_std,
    }


def windows(window: int | None, types: list[str]) -> dict[str, Any]:
    """Fields of layers of these `layer_types`; all of them local or none needs no pattern."""
    pattern = () if window is None else pattern_from(types)
    if "local" not in pattern:
        return {"window": None, "layer_pattern": ()}
    return {"window": window, "layer_pattern": () if pattern == ("local",) else pattern}


def qkv_bias(model: ModelConfig) -> bool:
    return model.bias if model.qkv_bias is None else model.qkv_bias


def out_bias(model: ModelConfig) -> bool:
    return model.bias if model.out_bias is None else model.out_bias


def mlp_bias(model: ModelConfig) -> bool:
    return model.bias if model.mlp_bias is None else model.mlp_bias


def mlp(theirs: str, ours: str, *, bias: bool = False) -> list[Name]:
    """gate_proj, up_proj and down_proj."""
    parts = ("gate", "up", "down")
    return [n for part in parts for n in linear(f"{theirs}.{part}_proj", f"{ours}/{part}", bias=bias)]


def attention(model: ModelConfig, theirs: str, ours: str) -> list[Name]:
    """q_proj, k_proj, v_proj and o_proj, and the norms of queries and keys."""
    parts = {"q": "query", "k": "key", "v": "value"}
    names = [n for a, b in parts.items() for n in linear(f"{theirs}.{a}_proj", f"{ours}/{b}", bias=qkv_bias(model))]
    names += linear(f"{theirs}.o_proj", f"{ours}/out", bias=out_bias(model))
    if model.qk_norm != "none":
        names += [
            n
            for a, b in (("q", "query"), ("k", "key"))
            for n in norm(f"{theirs}.{a}_norm", f"{ours}/{b}_norm", bias=False)
        ]
    return names


def norms(model: ModelConfig, theirs: str, ours: str) -> list[Name]:
    """The norms of a layer, by placement: the same word stands for different places in different families."""
    match model.norm_placement:
        case "pre":
            pairs = {"input": "attention_norm", "post_attention": "mlp_norm"}
        case "output":
            pairs = {"post_attention": "attention_norm", "post_feedforward": "mlp_norm"}
        case _:
            pairs = {
                "input": "attention_norm",
                "post_attention": "attention_after",
                "pre_feedforward": "mlp_norm",
                "post_feedforward": "mlp_after",
            }
    return [n for a, b in pairs.items() for n in norm(f"{theirs}.{a}_layernorm", f"{ours}/{b}", bias=False)]


def outside(model: ModelConfig) -> list[Name]:
    """Embedding, final norm and what reads it."""
    names = [embedding("model.embed_tokens.weight"), *norm("model.norm", "decoder/norm", bias=False)]
    if "lm" in model.heads and not model.tie_embeddings:
        names += linear("lm_head", "unembed", bias=False)
    if "sequence" in model.heads:
        names += linear("score", "heads/sequence", bias=False)
    if "token" in model.heads:
        names += linear("score", "heads/token", bias=True)
    return names


def names(model: ModelConfig) -> list[Name]:
    """All tensors of a decoder whose layers all have a plain MLP."""
    layer = "model.layers.{layer}"
    return [
        *outside(model),
        *norms(model, layer, BLOCK),
        *attention(model, f"{layer}.self_attn", f"{BLOCK}/attention"),
        *mlp(f"{layer}.mlp", f"{BLOCK}/mlp", bias=mlp_bias(model)),
    ]
