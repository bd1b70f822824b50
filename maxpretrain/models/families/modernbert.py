"""ModernBERT. Reference: Warner et al. 2024, arXiv:2412.13663, §2.1 and table 4."""

from __future__ import annotations

import dataclasses
from typing import Any

from maxpretrain.config import ModelConfig, RopeConfig
from maxpretrain.models.families.bert_like import BLOCK
from maxpretrain.models.families.gated import mlp_bias, out_bias
from maxpretrain.models.families.naming import Name, embedding, linear, name, norm, under
from maxpretrain.models.families.options import THEIR_ACTIVATIONS, Options, pattern_from, rope_to, types_to

MODEL_TYPE = "modernbert"
CLASSES = {
    "ModernBertForMaskedLM": ("lm",),
    "ModernBertForSequenceClassification": ("sequence",),
    "ModernBertForTokenClassification": ("token",),
    "ModernBertModel": (),
}
PREFIX = "model."
IGNORED = (r"^head\.", r"^decoder\.")
TIED = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}
RENAMED = ()


def from_options(options: Options) -> ModelConfig:
    options.only("rope_scaling", None)
    options.only("classifier_pooling", "cls", "mean")
    options.only("head_dim", options.get("hidden_size") // options.get("num_attention_heads"))
    layers, every = options.get("num_hidden_layers"), options.get("global_attn_every_n_layers", default=3)
    types = ["sliding_attention" if i % every else "full_attention" for i in range(layers)]
    rope = options.rope(theta=options.get("global_rope_theta", default=160_000.0))
    if rope.local_theta is None:
        rope = dataclasses.replace(rope, local_theta=float(options.get("local_rope_theta", default=10_000.0)))
    biased = options.get("attention_bias", default=False)
    activation = options.activation("hidden_activation", default="gelu")
    transform = options.activation("classifier_activation", default="gelu")
    return ModelConfig(
        architecture="encoder",
        vocab_size=options.get("vocab_size"),
        num_layers=layers,
        model_dim=options.get("hidden_size"),
        num_heads=options.get("num_attention_heads"),
        mlp_dim=options.get("intermediate_size"),
        max_length=options.get("max_position_embeddings", default=8192),
        embed_norm=True,
        position="rope",
        rope=rope,
        norm_eps=options.get("norm_eps", default=1e-5),
        norm_bias=options.get("norm_bias", default=False),
        first_norm=False,
        window=options.get("local_attention", default=128) // 2,
        layer_pattern=pattern_from(options.get("layer_types", default=types)),
        activation=activation,
        gated=True,
        bias=options.get("classifier_bias", default=False),  # what the others leave: the lm head's transform
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=options.get("mlp_bias", default=False),
        tie_embeddings=options.get("tie_word_embeddings", default=True),
        lm_transform=True,
        lm_activation=None if transform == activation else transform,
        lm_bias=options.get("decoder_bias", default=True),
        head_transform=True,
        pooling="mean" if options.get("classifier_pooling", default="cls") == "mean" else "end",
        dropout=options.dropout("attention_dropout", "embedding_dropout", "mlp_dropout"),
        init="truncated_normal",
        init_std=options.get("initializer_range", default=0.02),
        depth_scaled_init=True,
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    rope = rope_to(model, by_layer=True)
    assert model.window is not None
    return {
        "rope_parameters": rope["rope_parameters"],
        "global_rope_theta": rope["rope_theta"],
        "local_rope_theta": rope["rope_local_base_freq"],
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.model_dim,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.max_length,
        "norm_eps": model.norm_eps,
        "norm_bias": _norm_bias(model),
        "local_attention": 2 * model.window,
        "layer_types": types_to(model),
        "hidden_activation": THEIR_ACTIVATIONS[model.activation],
        "attention_bias": out_bias(model),
        "mlp_bias": mlp_bias(model),
        "classifier_bias": model.bias,
        "classifier_activation": THEIR_ACTIVATIONS[model.lm_activation or model.activation],
        "classifier_pooling": "mean" if model.pooling == "mean" else "cls",
        "decoder_bias": model.lm_bias,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.dropout,
        "embedding_dropout": model.dropout,
        "mlp_dropout": model.dropout,
        "initializer_range": model.init_std,
    }


def _norm_bias(model: ModelConfig) -> bool:
    return model.bias if model.norm_bias is None else model.norm_bias


def names(model: ModelConfig) -> list[Name]:
    norms = _norm_bias(model)
    layer = [
        *linear("attn.Wqkv", "attention/query", "attention/key", "attention/value", bias=out_bias(model)),
        *linear("attn.Wo", "attention/out", bias=out_bias(model)),
        *norm("mlp_norm", "mlp_norm", bias=norms),
        *linear("mlp.Wi", "mlp/gate", "mlp/up", bias=mlp_bias(model)),
        *linear("mlp.Wo", "mlp/down", bias=mlp_bias(model)),
    ]
    others = [*layer, *norm("attn_norm", "attention_norm", bias=norms)]
    names = [
        embedding("model.embeddings.tok_embeddings.weight"),
        *norm("model.embeddings.norm", "encoder/input/norm", bias=norms),
        *under("model.layers.{layer}.", layer, "encoder/stack/opening/"),
        *(under("model.layers.{layer}.", others, f"{BLOCK}/") if model.num_layers > 1 else []),
        *norm("model.final_norm", "encoder/norm", bias=norms),
    ]
    for head in ("sequence", "token"):
        if head in model.heads:
            names += _transform("heads/transform", model.bias, norms)
            names += linear("classifier", f"heads/{head}", bias=True)
    if "lm" in model.heads:
        names += _transform("lm/transform", model.bias, norms)
        names += [name("decoder.bias", "lm/bias")] if model.lm_bias else []
        names += [] if model.tie_embeddings else linear("decoder", "unembed", bias=False)
    return names


def _transform(ours: str, bias: bool, norm_bias: bool) -> list[Name]:
    return [*linear("head.dense", f"{ours}/dense", bias=bias), *norm("head.norm", f"{ours}/norm", bias=norm_bias)]


def _size(layers: int, dim: int, heads: int, mlp: int) -> ModelConfig:
    return ModelConfig(
        architecture="encoder",
        vocab_size=50_368,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        mlp_dim=mlp,
        max_length=8192,
        embed_norm=True,
        position="rope",
        rope=RopeConfig(theta=160_000.0, local_theta=10_000.0),
        norm_eps=1e-5,
        norm_bias=False,
        first_norm=False,
        window=64,
        layer_pattern=("global", "local", "local"),
        activation="gelu",
        gated=True,
        bias=False,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        lm_transform=True,
        lm_bias=True,
        head_transform=True,
        init="truncated_normal",
        init_std=0.02,
        depth_scaled_init=True,
    )


PRESETS = {
    "modernbert-base": _size(22, 768, 12, 1152),
    "modernbert-large": _size(28, 1024, 16, 2624),
}
