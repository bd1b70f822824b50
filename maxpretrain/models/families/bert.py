"""BERT, and smaller encoders of its shape.

References: Devlin et al. 2018, arXiv:1810.04805, §3; Turc et al. 2019, arXiv:1908.08962 (tiny to medium); Jiao et al. 2019,
arXiv:1909.10351, §4.1 (TinyBERT).
"""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig
from maxpretrain.models.families import bert_like
from maxpretrain.models.families.naming import Name
from maxpretrain.models.families.options import Options

MODEL_TYPE = "bert"
CLASSES = {
    "BertForPreTraining": ("lm", "pooler", "pair"),
    "BertForMaskedLM": ("lm",),
    "BertForNextSentencePrediction": ("pooler", "pair"),
    "BertForSequenceClassification": ("pooler", "sequence"),
    "BertForTokenClassification": ("token",),
    "BertModel": ("pooler",),
}
PREFIX = "bert."
# Published files hold all heads of pretraining, whatever class their config.json names.
IGNORED = (bert_like.POSITION_IDS, r"^bert\.pooler\.", r"^cls\.")
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
RENAMED = bert_like.RENAMED


def from_options(options: Options) -> ModelConfig:
    bert_like.only_tied(options)
    return bert_like.from_options(options)


def to_options(model: ModelConfig) -> dict[str, Any]:
    return bert_like.to_options(model)


def names(model: ModelConfig) -> list[Name]:
    transform = "cls.predictions.transform"
    return [
        *bert_like.embeddings(model, "bert.embeddings."),
        *bert_like.layers("bert.encoder.layer."),
        *bert_like.lm(model, f"{transform}.dense", f"{transform}.LayerNorm", "cls.predictions.bias"),
        *bert_like.head(model, "pooler", "bert.pooler.dense"),
        *bert_like.head(model, "pair", "cls.seq_relationship"),
        *bert_like.head(model, "sequence", "classifier"),
        *bert_like.head(model, "token", "classifier"),
    ]


def _size(layers: int, dim: int, heads: int, mlp: int | None = None) -> ModelConfig:
    return bert_like.shape(
        vocab_size=30_522,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        mlp_dim=4 * dim if mlp is None else mlp,
        token_types=2,
        norm_eps=1e-12,
        heads=("lm", "pooler", "pair"),
        init="truncated_normal",
    )


PRESETS = {
    "bert-tiny": _size(2, 128, 2),
    "bert-mini": _size(4, 256, 4),
    "bert-small": _size(4, 512, 8),
    "bert-medium": _size(8, 512, 8),
    "bert-base": _size(12, 768, 12),
    "bert-large": _size(24, 1024, 16),
    "tinybert-4l": _size(4, 312, 12, 1200),
    "tinybert-6l": _size(6, 768, 12),
}
