"""RoBERTa, and DistilRoBERTa of its shape. References: Liu et al. 2019, arXiv:1907.11692; Sanh et al. 2019, arXiv:1910.01108."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig
from maxpretrain.models.families import bert_like
from maxpretrain.models.families.naming import Name
from maxpretrain.models.families.options import Options

MODEL_TYPE = "roberta"
CLASSES = {
    "RobertaForMaskedLM": ("lm",),
    "RobertaForSequenceClassification": ("pooler", "sequence"),
    "RobertaForTokenClassification": ("token",),
    "RobertaModel": ("pooler",),
}
PREFIX = "roberta."
# Published files hold a pooler that was never trained.
IGNORED = (bert_like.POSITION_IDS, r"^roberta\.pooler\.", r"^lm_head\.")
TIED = {
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
RENAMED = bert_like.RENAMED


def from_options(options: Options) -> ModelConfig:
    bert_like.only_tied(options)
    # Positions are counted from the row after that of padding.
    offset = options.get("pad_token_id", default=1) + 1
    activation = options.activation("hidden_act", default="gelu")
    return bert_like.from_options(
        options,
        position_offset=offset,
        max_length=options.get("max_position_embeddings") - offset,
        lm_activation=None if activation == "gelu" else "gelu",  # whatever the layers have
        init="normal",
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    return bert_like.to_options(model) | {
        "pad_token_id": model.position_offset - 1,
        "max_position_embeddings": model.max_length + model.position_offset,
    }


def names(model: ModelConfig) -> list[Name]:
    classifies = "sequence" in model.heads
    return [
        *bert_like.embeddings(model, "roberta.embeddings."),
        *bert_like.layers("roberta.encoder.layer."),
        *bert_like.lm(model, "lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
        *bert_like.head(model, "pooler", "classifier.dense" if classifies else "roberta.pooler.dense"),
        *bert_like.head(model, "sequence", "classifier.out_proj"),
        *bert_like.head(model, "token", "classifier"),
    ]


def _size(layers: int, dim: int, heads: int) -> ModelConfig:
    return bert_like.shape(
        vocab_size=50_265,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        mlp_dim=4 * dim,
        token_types=1,
        position_offset=2,
        norm_eps=1e-5,
    )


PRESETS = {
    "distilroberta-base": _size(6, 768, 12),
    "roberta-base": _size(12, 768, 12),
    "roberta-large": _size(24, 1024, 16),
}
