"""ELECTRA: discriminators, and the generators they were trained with.

Reference: Clark et al. 2020, arXiv:2003.10555, table 6; the small generator is as wide as its discriminator, as released.
"""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig
from maxpretrain.models.families import bert_like
from maxpretrain.models.families.naming import Name, linear
from maxpretrain.models.families.options import Options

MODEL_TYPE = "electra"
CLASSES = {
    "ElectraForPreTraining": ("replaced",),
    "ElectraForMaskedLM": ("lm",),
    "ElectraForSequenceClassification": ("pooler", "sequence"),
    "ElectraForTokenClassification": ("token",),
    "ElectraModel": (),
}
PREFIX = "electra."
IGNORED = (bert_like.POSITION_IDS, r"^(discriminator|generator)_predictions\.", r"^generator_lm_head\.")
TIED = {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"}
RENAMED = bert_like.RENAMED


def from_options(options: Options) -> ModelConfig:
    width, activation = options.get("embedding_size", default=128), options.activation("hidden_act", default="gelu")
    return bert_like.from_options(
        options,
        embed_dim=None if width == options.get("hidden_size") else width,
        lm_activation=None if activation == "gelu" else "gelu",  # whatever the layers have
        pooler_activation="gelu",
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    return bert_like.to_options(model) | {"embedding_size": model.embed_width}


def names(model: ModelConfig) -> list[Name]:
    transform, replaced = "generator_predictions", "discriminator_predictions"
    projects, discriminates = model.embed_dim is not None, "replaced" in model.heads
    untied = "lm" in model.heads and not model.tie_embeddings
    return [
        *bert_like.embeddings(model, "electra.embeddings."),
        *(linear("electra.embeddings_project", "encoder/input/project", bias=True) if projects else []),
        *bert_like.layers("electra.encoder.layer."),
        *bert_like.lm(model, f"{transform}.dense", f"{transform}.LayerNorm", "generator_lm_head.bias"),
        *(linear("generator_lm_head", "unembed", bias=False) if untied else []),
        *(linear(f"{replaced}.dense", "heads/replaced/dense", bias=True) if discriminates else []),
        *(linear(f"{replaced}.dense_prediction", "heads/replaced/out", bias=True) if discriminates else []),
        *bert_like.head(model, "pooler", "classifier.dense"),
        *bert_like.head(model, "sequence", "classifier.out_proj"),
        *bert_like.head(model, "token", "classifier"),
    ]


def _size(head: str, layers: int, dim: int, heads: int, *, embed: int | None) -> ModelConfig:
    return bert_like.shape(
        vocab_size=30_522,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        mlp_dim=4 * dim,
        embed_dim=embed,
        token_types=2,
        norm_eps=1e-12,
        heads=(head,),
        pooler_activation="gelu",
        init="truncated_normal",
    )


PRESETS = {
    "electra-small": _size("replaced", 12, 256, 4, embed=128),
    "electra-base": _size("replaced", 12, 768, 12, embed=None),
    "electra-large": _size("replaced", 24, 1024, 16, embed=None),
    "electra-small-generator": _size("lm", 12, 256, 4, embed=128),
    "electra-base-generator": _size("lm", 12, 256, 4, embed=768),
    "electra-large-generator": _size("lm", 24, 256, 4, embed=1024),
}
