"""DeBERTa, versions 2 and 3. References: He et al. 2020, arXiv:2006.03654, §3.1; He et al. 2021, arXiv:2111.09543, §5."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig, RelativeConfig
from maxpretrain.errors import UserError
from maxpretrain.models.families import bert_like
from maxpretrain.models.families.naming import Name, linear, name, norm
from maxpretrain.models.families.options import THEIR_ACTIVATIONS, Options

MODEL_TYPE = "deberta-v2"
CLASSES = {
    "DebertaV2ForMaskedLM": ("lm",),
    "DebertaV2ForSequenceClassification": ("pooler", "sequence"),
    "DebertaV2ForTokenClassification": ("token",),
    "DebertaV2Model": (),
}
PREFIX = "deberta."
# Published files hold the heads of pretraining, and positions that only those saw.
IGNORED = (
    bert_like.POSITION_IDS,
    r"^deberta\.embeddings\.position_embeddings\.",
    r"^(cls|lm_predictions|mask_predictions)\.",
)
TIED = {
    "cls.predictions.decoder.weight": "deberta.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# Published files of version 3 are of the newer spelling and do not say so.
RENAMED = (
    *bert_like.RENAMED,
    (r"^lm_predictions\.lm_head\.(dense|LayerNorm)\.", r"cls.predictions.transform.\1."),
    (r"^lm_predictions\.lm_head\.bias$", "cls.predictions.bias"),
)


def from_options(options: Options) -> ModelConfig:
    width, longest = options.get("hidden_size"), options.get("max_position_embeddings", default=512)
    bert_like.only_tied(options)
    options.only("conv_kernel_size", 0)
    options.only("embedding_size", width)
    options.only("pooler_hidden_size", width)
    options.only("attention_head_size", width // options.get("num_attention_heads"))
    listed = str(options.get("pos_att_type", default=())).lower()
    terms = tuple(term for term in ("c2p", "p2c") if term in listed)
    added = options.get("position_biased_input", default=True)
    fields: dict[str, Any] = {"position": "learned" if added else "none"}
    if options.get("relative_attention", default=False):
        if not terms:
            raise UserError(f"{options.where}: relative_attention without c2p or p2c in pos_att_type is not supported")
        buckets = options.get("position_buckets", default=-1)
        farthest = options.get("max_relative_positions", default=-1)
        relative = RelativeConfig(
            buckets=max(buckets, 0),
            max_distance=longest if farthest < 1 else farthest,
            terms=terms,
            share_projections=options.get("share_att_key", default=False),
            norm="layer_norm" in options.get("norm_rel_ebd", default="none"),
            absolute=added,
        )
        fields = {"position": "disentangled", "relative": relative}
    else:
        # Their scale of the scores goes by the terms, and the norm is in the file, also where neither has a use.
        if terms:
            raise UserError(f"{options.where}: pos_att_type without relative_attention is not supported")
        options.only("norm_rel_ebd", "none")
    return bert_like.from_options(
        options,
        **fields,
        token_types=options.get("type_vocab_size", default=0),
        norm_eps=options.get("layer_norm_eps", default=1e-7),
        pooler_activation=options.activation("pooler_hidden_act", default="gelu"),
        init="normal",
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    relative, disentangled = model.relative, model.position == "disentangled"
    return bert_like.to_options(model) | {
        "relative_attention": disentangled,
        "position_biased_input": model.has_position_table,
        "pos_att_type": list(relative.terms) if disentangled else [],
        "position_buckets": relative.buckets or -1,
        "max_relative_positions": relative.max_distance,
        "share_att_key": relative.share_projections,
        "norm_rel_ebd": "layer_norm" if disentangled and relative.norm else "none",
        "pooler_hidden_act": THEIR_ACTIVATIONS[model.pooler_activation],
        "pooler_hidden_size": model.model_dim,
        "legacy": True,  # the names of the head
    }


def names(model: ModelConfig) -> list[Name]:
    transform, bias = "cls.predictions.transform", "cls.predictions.bias"
    return [
        *bert_like.embeddings(model, "deberta.embeddings."),
        *bert_like.layers("deberta.encoder.layer.", "{}_proj"),
        *(_relative(model) if model.position == "disentangled" else []),
        *bert_like.lm(model, f"{transform}.dense", f"{transform}.LayerNorm", bias),
        *bert_like.head(model, "pooler", "pooler.dense"),
        *bert_like.head(model, "sequence", "classifier"),
        *bert_like.head(model, "token", "classifier"),
    ]


def _relative(model: ModelConfig) -> list[Name]:
    relative, projections = model.relative, {"c2p": "key", "p2c": "query"}
    names = [name("deberta.encoder.rel_embeddings.weight", "encoder/disentangled/table", form="plain")]
    if relative.norm:
        names += norm("deberta.encoder.LayerNorm", "encoder/disentangled/norm", bias=True)
    for term in () if relative.share_projections else relative.terms:
        theirs = f"deberta.encoder.layer.{{layer}}.attention.self.pos_{projections[term]}_proj"
        names += linear(theirs, f"{bert_like.BLOCK}/attention/relative_{projections[term]}", bias=True)
    return names


def _size(layers: int, dim: int, heads: int) -> ModelConfig:
    return bert_like.shape(
        vocab_size=128_100,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        mlp_dim=4 * dim,
        position="disentangled",
        relative=RelativeConfig(buckets=256, max_distance=512),
        norm_eps=1e-7,
        pooler_activation="gelu",
    )


PRESETS = {
    "deberta-v3-xsmall": _size(12, 384, 6),
    "deberta-v3-small": _size(6, 768, 12),
    "deberta-v3-base": _size(12, 768, 12),
    "deberta-v3-large": _size(24, 1024, 16),
}
