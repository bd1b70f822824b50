"""BLOOM. Reference: BigScience Workshop 2022, arXiv:2211.05100, table 3."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig
from maxpretrain.errors import UserError
from maxpretrain.models.families.naming import Name, embedding, linear, norm, under
from maxpretrain.models.families.options import Options

MODEL_TYPE = "bloom"
CLASSES = {
    "BloomForCausalLM": ("lm",),
    "BloomForSequenceClassification": ("sequence",),
    "BloomForTokenClassification": ("token",),
}
PREFIX = "transformer."
IGNORED = ()
TIED = {"lm_head.weight": "transformer.word_embeddings.weight"}


def from_options(options: Options) -> ModelConfig:
    options.only("is_causal", True)
    options.only("apply_residual_connection_post_layernorm", False)
    return ModelConfig(
        vocab_size=options.get("vocab_size"),
        num_layers=options.get("n_layer", "num_hidden_layers"),
        model_dim=options.get("n_embed", "hidden_size"),
        num_heads=options.get("n_head", "num_attention_heads"),
        max_length=options.get("seq_length", default=2048),
        embed_norm=True,
        position="alibi",
        norm_eps=options.get("layer_norm_epsilon", default=1e-5),
        activation="gelu_tanh",
        tie_embeddings=options.get("tie_word_embeddings", default=True),
        dropout=options.dropout("hidden_dropout", "attention_dropout"),
        init_std=options.get("initializer_range", default=0.02),
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    if model.mlp_width != 4 * model.model_dim:
        raise UserError(f"model.mlp_dim is {model.mlp_width}, and BLOOM's is always 4 × model_dim {model.model_dim}")
    return {
        "vocab_size": model.vocab_size,
        "n_layer": model.num_layers,
        "hidden_size": model.model_dim,
        "n_head": model.num_heads,
        "seq_length": model.max_length,
        "layer_norm_epsilon": model.norm_eps,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.dropout,
        "initializer_range": model.init_std,
    }


def names(model: ModelConfig) -> list[Name]:
    ours, attention = "decoder/stack/block", "decoder/stack/block/attention"
    parts = (f"{attention}/{part}" for part in ("query", "key", "value"))
    layer = [
        *norm("input_layernorm", f"{ours}/attention_norm", bias=True),
        *linear("self_attention.query_key_value", *parts, bias=True, form="heads"),
        *linear("self_attention.dense", f"{attention}/out", bias=True),
        *norm("post_attention_layernorm", f"{ours}/mlp_norm", bias=True),
        *linear("mlp.dense_h_to_4h", f"{ours}/mlp/up", bias=True),
        *linear("mlp.dense_4h_to_h", f"{ours}/mlp/down", bias=True),
    ]
    separate = "lm" in model.heads and not model.tie_embeddings
    return [
        embedding("transformer.word_embeddings.weight"),
        *norm("transformer.word_embeddings_layernorm", "decoder/input/norm", bias=True),
        *under("transformer.h.{layer}.", layer),
        *norm("transformer.ln_f", "decoder/norm", bias=True),
        *(linear("lm_head", "unembed", bias=False) if separate else []),
        *(linear("score", "heads/sequence", bias=False) if "sequence" in model.heads else []),
        *(linear("classifier", "heads/token", bias=True) if "token" in model.heads else []),
    ]


def _size(layers: int, dim: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=250_880,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        max_length=2048,
        embed_norm=True,
        position="alibi",
        norm="layernorm",
        norm_eps=1e-5,
        activation="gelu_tanh",
        bias=True,
        tie_embeddings=True,
        init="normal",
        init_std=0.0048,  # of the training scripts, at all sizes; config.json says 0.02
        depth_scaled_init=True,
    )


PRESETS = {
    "bloom-560m": _size(24, 1024, 16),
    "bloom-1b1": _size(24, 1536, 16),
    "bloom-1b7": _size(24, 2048, 16),
    "bloom-3b": _size(30, 2560, 32),
    "bloom-7b1": _size(30, 4096, 32),
    "bloom-176b": _size(70, 14_336, 112),
}
