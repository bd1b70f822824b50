"""GPT-NeoX and Pythia. References: Black et al. 2022, arXiv:2204.06745, §2; Biderman et al. 2023, arXiv:2304.01373, table 1."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig, RopeConfig
from maxpretrain.errors import UserError
from maxpretrain.models.families import gated
from maxpretrain.models.families.naming import Name, embedding, linear, norm, under
from maxpretrain.models.families.options import THEIR_ACTIVATIONS, Options, rope_to

MODEL_TYPE = "gpt_neox"
CLASSES = {
    "GPTNeoXForCausalLM": ("lm",),
    "GPTNeoXForSequenceClassification": ("sequence",),
    "GPTNeoXForTokenClassification": ("token",),
}
PREFIX = "gpt_neox."
IGNORED = (r"\.attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$")
TIED = {"embed_out.weight": "gpt_neox.embed_in.weight"}


def from_options(options: Options) -> ModelConfig:
    options.only("is_causal", True)
    dim, heads, rope = options.get("hidden_size"), options.get("num_attention_heads"), options.rope(fraction=0.25)
    turning = int(dim // heads * rope.fraction)
    if turning % 2 or not turning:
        raise UserError(f"{options.where}: rotary_pct {rope.fraction} turns {turning} of a head; only even numbers are")
    bias = None if options.get("attention_bias", default=True) else False
    return ModelConfig(
        vocab_size=options.get("vocab_size"),
        num_layers=options.get("num_hidden_layers"),
        model_dim=dim,
        num_heads=heads,
        mlp_dim=options.get("intermediate_size"),
        max_length=options.get("max_position_embeddings", default=2048),
        position="rope",
        rope=rope,
        norm_eps=options.get("layer_norm_eps", default=1e-5),
        parallel="two_norms" if options.get("use_parallel_residual", default=True) else "none",
        activation=options.activation("hidden_act", default="gelu"),
        qkv_bias=bias,
        out_bias=bias,
        tie_embeddings=options.get("tie_word_embeddings", default=False),
        dropout=options.dropout("hidden_dropout", "attention_dropout"),
        init_std=options.get("initializer_range", default=0.02),
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    rope = rope_to(model)
    rope["rope_parameters"]["partial_rotary_factor"] = model.rope.fraction  # its absence means a quarter
    return {
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.model_dim,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.max_length,
        "layer_norm_eps": model.norm_eps,
        "use_parallel_residual": model.parallel != "none",
        "hidden_act": THEIR_ACTIVATIONS[model.activation],
        "attention_bias": gated.qkv_bias(model),
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.dropout,
        "initializer_range": model.init_std,
        "rotary_pct": model.rope.fraction,
        "rotary_emb_base": model.rope.theta,
    } | rope


def names(model: ModelConfig) -> list[Name]:
    ours, attention = "decoder/stack/block", "decoder/stack/block/attention"
    parts, bias = (f"{attention}/{part}" for part in ("query", "key", "value")), gated.qkv_bias(model)
    layer = [
        *norm("input_layernorm", f"{ours}/attention_norm", bias=True),
        *linear("attention.query_key_value", *parts, bias=bias, form="heads"),
        *linear("attention.dense", f"{attention}/out", bias=bias),
        *norm("post_attention_layernorm", f"{ours}/mlp_norm", bias=True),
        *linear("mlp.dense_h_to_4h", f"{ours}/mlp/up", bias=True),
        *linear("mlp.dense_4h_to_h", f"{ours}/mlp/down", bias=True),
    ]
    separate = "lm" in model.heads and not model.tie_embeddings
    return [
        embedding("gpt_neox.embed_in.weight"),
        *under("gpt_neox.layers.{layer}.", layer),
        *norm("gpt_neox.final_layer_norm", "decoder/norm", bias=True),
        *(linear("embed_out", "unembed", bias=False) if separate else []),
        *(linear("score", "heads/sequence", bias=False) if "sequence" in model.heads else []),
        *(linear("classifier", "heads/token", bias=True) if "token" in model.heads else []),
    ]


def _size(
    layers: int, dim: int, heads: int, vocab: int = 50_304, activation: str = "gelu", length: int = 2048
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        mlp_dim=4 * dim,
        max_length=length,
        position="rope",
        rope=RopeConfig(theta=1e4, fraction=0.25),
        norm="layernorm",
        norm_eps=1e-5,
        parallel="two_norms",
        activation=activation,  # type: ignore[arg-type]
        bias=True,
        tie_embeddings=False,
        init="normal",
        init_std=0.02,
        # Published: √(2/5D), and 2/(L√D) of what writes into the residual stream.
        depth_scaled_init=True,
    )


PRESETS = {
    "pythia-14m": _size(6, 128, 4),
    "pythia-31m": _size(6, 256, 8),
    "pythia-70m": _size(6, 512, 8),
    "pythia-160m": _size(12, 768, 12),
    "pythia-410m": _size(24, 1024, 16),
    "pythia-1b": _size(16, 2048, 8),
    "pythia-1.4b": _size(24, 2048, 16),
    "pythia-2.8b": _size(32, 2560, 32),
    "pythia-6.9b": _size(32, 4096, 32, 50_432),
    "pythia-12b": _size(36, 5120, 40, 50_688),
    "gpt-neox-20b": _size(44, 6144, 64, 50_432, "gelu_tanh"),
}
