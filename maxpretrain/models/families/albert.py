"""ALBERT, version 2. Reference: Lan et al. 2019, arXiv:1909.11942, §3 and table 1; version 2 in the released code."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig
from maxpretrain.models.families import bert_like
from maxpretrain.models.families.naming import Name, linear, norm, under
from maxpretrain.models.families.options import THEIR_ACTIVATIONS, Options

MODEL_TYPE = "albert"
CLASSES = {
    "AlbertForPreTraining": ("lm", "pooler", "pair"),
    "AlbertForMaskedLM": ("lm",),
    "AlbertForSequenceClassification": ("pooler", "sequence"),
    "AlbertForTokenClassification": ("token",),
    "AlbertModel": ("pooler",),
}
PREFIX = "albert."
# Published files hold the heads of pretraining, whatever class their config.json names.
IGNORED = (bert_like.POSITION_IDS, r"^albert\.pooler\.", r"^predictions\.", r"^sop_classifier\.")
TIED = {
    "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
    "predictions.decoder.bias": "predictions.bias",
}
RENAMED = bert_like.RENAMED


def from_options(options: Options) -> ModelConfig:
    bert_like.only_tied(options)
    options.only("inner_group_num", 1)
    return bert_like.from_options(
        options,
        activation=options.activation("hidden_act", default="gelu_new"),
        embed_dim=options.get("embedding_size", default=128),
        layer_groups=options.get("num_hidden_groups", default=1),
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    return bert_like.to_options(model) | {
        "hidden_act": "gelu_new" if model.activation == "gelu_tanh" else THEIR_ACTIVATIONS[model.activation],
        "embedding_size": model.embed_width,
        "num_hidden_groups": model.layer_groups,
        "inner_group_num": 1,
        "classifier_dropout_prob": 0.1,
    }


def names(model: ModelConfig) -> list[Name]:
    parts = {"query": "query", "key": "key", "value": "value", "dense": "out"}
    layer = [
        *(n for a, b in parts.items() for n in linear(f"attention.{a}", f"attention/{b}", bias=True)),
        *norm("attention.LayerNorm", "attention_norm", bias=True),
        *linear("ffn", "mlp/up", bias=True),
        *linear("ffn_output", "mlp/down", bias=True),
        *norm("full_layer_layer_norm", "mlp_norm", bias=True),
    ]
    return [
        *bert_like.embeddings(model, "albert.embeddings."),
        *linear("albert.encoder.embedding_hidden_mapping_in", "encoder/input/project", bias=True),
        *under("albert.encoder.albert_layer_groups.{layer}.albert_layers.0.", layer, f"{bert_like.BLOCK}/"),
        *bert_like.lm(model, "predictions.dense", "predictions.LayerNorm", "predictions.bias"),
        *bert_like.head(model, "pooler", "albert.pooler"),
        *bert_like.head(model, "pair", "sop_classifier.classifier"),
        *bert_like.head(model, "sequence", "classifier"),
        *bert_like.head(model, "token", "classifier"),
    ]


def _size(layers: int, dim: int, heads: int) -> ModelConfig:
    return bert_like.shape(
        vocab_size=30_000,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        mlp_dim=4 * dim,
        embed_dim=128,
        token_types=2,
        norm_eps=1e-12,
        activation="gelu_tanh",
        layer_groups=1,
        heads=("lm", "pooler", "pair"),
        dropout=0.0,
        init="truncated_normal",
    )


PRESETS = {
    "albert-base-v2": _size(12, 768, 12),
    "albert-large-v2": _size(24, 1024, 16),
    "albert-xlarge-v2": _size(24, 2048, 16),
    "albert-xxlarge-v2": _size(12, 4096, 64),
}
