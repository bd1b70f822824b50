"""DistilBERT. Reference: Sanh et al. 2019, arXiv:1910.01108, §2."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig
from maxpretrain.models.families import bert_like
from maxpretrain.models.families.naming import Name, linear, norm, under
from maxpretrain.models.families.options import THEIR_ACTIVATIONS, Options

MODEL_TYPE = "distilbert"
CLASSES = {
    "DistilBertForMaskedLM": ("lm",),
    "DistilBertForSequenceClassification": ("pooler", "sequence"),
    "DistilBertForTokenClassification": ("token",),
    "DistilBertModel": (),
}
PREFIX = "distilbert."
IGNORED = (bert_like.POSITION_IDS, r"^vocab_(transform|layer_norm|projector)\.")
TIED = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}
RENAMED = bert_like.RENAMED


def from_options(options: Options) -> ModelConfig:
    return ModelConfig(
        architecture="encoder",
        vocab_size=options.get("vocab_size"),
        num_layers=options.get("n_layers", "num_hidden_layers"),
        model_dim=options.get("dim", "hidden_size"),
        num_heads=options.get("n_heads", "num_attention_heads"),
        mlp_dim=options.get("hidden_dim"),
        max_length=options.get("max_position_embeddings", default=512),
        embed_norm=True,
        position="learned",  # also of files that say sinusoidal: they hold the table
        norm_eps=1e-12,  # no key has it
        norm_placement="post",
        activation=options.activation("activation", default="gelu"),
        lm_transform=True,
        lm_bias=True,
        pooler_activation="relu",
        tie_embeddings=options.get("tie_word_embeddings", default=True),
        dropout=options.dropout("dropout", "attention_dropout"),
        init="normal",
        init_std=options.get("initializer_range", default=0.02),
        depth_scaled_init=False,
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "n_layers": model.num_layers,
        "dim": model.model_dim,
        "n_heads": model.num_heads,
        "hidden_dim": model.mlp_width,
        "max_position_embeddings": model.max_length,
        "sinusoidal_pos_embds": False,
        "activation": THEIR_ACTIVATIONS[model.activation],
        "tie_word_embeddings": model.tie_embeddings,
        "dropout": model.dropout,
        "attention_dropout": model.dropout,
        "initializer_range": model.init_std,
    }


def names(model: ModelConfig) -> list[Name]:
    parts = {"q_lin": "query", "k_lin": "key", "v_lin": "value", "out_lin": "out"}
    layer = [
        *(n for a, b in parts.items() for n in linear(f"attention.{a}", f"attention/{b}", bias=True)),
        *norm("sa_layer_norm", "attention_norm", bias=True),
        *linear("ffn.lin1", "mlp/up", bias=True),
        *linear("ffn.lin2", "mlp/down", bias=True),
        *norm("output_layer_norm", "mlp_norm", bias=True),
    ]
    untied = "lm" in model.heads and not model.tie_embeddings
    return [
        *bert_like.embeddings(model, "distilbert.embeddings."),
        *under("distilbert.transformer.layer.{layer}.", layer, f"{bert_like.BLOCK}/"),
        *bert_like.lm(model, "vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
        *(linear("vocab_projector", "unembed", bias=False) if untied else []),
        *bert_like.head(model, "pooler", "pre_classifier"),
        *bert_like.head(model, "sequence", "classifier"),
        *bert_like.head(model, "token", "classifier"),
    ]


PRESETS = {
    "distilbert-base": bert_like.shape(
        vocab_size=30_522,
        num_layers=6,
        model_dim=768,
        num_heads=12,
        mlp_dim=3072,
        norm_eps=1e-12,
        pooler_activation="relu",
    )
}
