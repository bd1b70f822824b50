"""What BERT and the encoders after it have in common: a norm after each sublayer, a transform before the vocabulary."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig
from maxpretrain.models.families.naming import Name, embedding, linear, name, norm, under
from maxpretrain.models.families.options import THEIR_ACTIVATIONS, Options

BLOCK = "encoder/stack/block"
# Files converted from TensorFlow.
RENAMED = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
POSITION_IDS = r"embeddings\.position_ids$"


def shape(**fields: Any) -> ModelConfig:
    """A shape with what is usual here, where `fields` do not say otherwise."""
    usual = {
        "architecture": "encoder",
        "max_length": 512,
        "embed_norm": True,
        "position": "learned",
        "norm_placement": "post",
        "activation": "gelu",
        "lm_transform": True,
        "lm_bias": True,
        "dropout": 0.1,
        "init_std": 0.02,
        "depth_scaled_init": False,
    }
    return ModelConfig(**usual | fields)


def from_options(options: Options, **more: Any) -> ModelConfig:
    """A shape from the keys that all of them have; `more` are fields that a family adds or has otherwise."""
    options.only("is_decoder", False)
    options.only("add_cross_attention", False)
    options.only("position_embedding_type", "absolute")
    fields: dict[str, Any] = {
        "vocab_size": options.get("vocab_size"),
        "num_layers": options.get("num_hidden_layers"),
        "model_dim": options.get("hidden_size"),
        "num_heads": options.get("num_attention_heads"),
        "mlp_dim": options.get("intermediate_size"),
        "max_length": options.get("max_position_embeddings", default=512),
        "token_types": options.get("type_vocab_size", default=2),
        "norm_eps": options.get("layer_norm_eps", default=1e-12),
        "activation": options.activation("hidden_act", default="gelu"),
        "tie_embeddings": options.get("tie_word_embeddings", default=True),
        "dropout": options.dropout("hidden_dropout_prob", "attention_probs_dropout_prob"),
        "init": "truncated_normal",
        "init_std": options.get("initializer_range", default=0.02),
    }
    return shape(**fields | more)


def to_options(model: ModelConfig) -> dict[str, Any]:
    """The keys that all of them have."""
    return {
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.model_dim,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_width,
        "max_position_embeddings": model.max_length,
        "position_embedding_type": "absolute",
        "type_vocab_size": model.token_types,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": THEIR_ACTIVATIONS[model.activation],
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
        "initializer_range": model.init_std,
        "is_decoder": False,
        "add_cross_attention": False,
    }


def only_tied(options: Options) -> None:
    """Refuses an untied head: these classes then have two biases in the file, of which one does nothing."""
    options.only("tie_word_embeddings", True)


def embeddings(model: ModelConfig, theirs: str) -> list[Name]:
    """The tables that are added up, and their norm; `theirs` ends with a dot."""
    names = [embedding(f"{theirs}word_embeddings.weight")]
    if model.has_position_table:
        names.append(name(f"{theirs}position_embeddings.weight", "encoder/input/positions/table", form="plain"))
    if model.token_types:
        names.append(name(f"{theirs}token_type_embeddings.weight", "encoder/input/token_types/table", form="plain"))
    return [*names, *norm(f"{theirs}LayerNorm", "encoder/input/norm", bias=True)]


def layers(theirs: str, projection: str = "{}") -> list[Name]:
    """Attention, MLP and their norms, `theirs` ending with a dot; `projection` makes their names of query, key and value."""
    attention = [
        n
        for part in ("query", "key", "value")
        for n in linear(f"attention.self.{projection.format(part)}", f"attention/{part}", bias=True)
    ]
    layer = [
        *attention,
        *linear("attention.output.dense", "attention/out", bias=True),
        *norm("attention.output.LayerNorm", "attention_norm", bias=True),
        *linear("intermediate.dense", "mlp/up", bias=True),
        *linear("output.dense", "mlp/down", bias=True),
        *norm("output.LayerNorm", "mlp_norm", bias=True),
    ]
    return under(f"{theirs}{{layer}}.", layer, f"{BLOCK}/")


def lm(model: ModelConfig, dense: str, after: str, bias: str) -> list[Name]:
    """The transform's linear layer and norm, and the bias for each token, where there is such a head."""
    if "lm" not in model.heads:
        return []
    return [
        *linear(dense, "lm/transform/dense", bias=True),
        *norm(after, "lm/transform/norm", bias=True),
        name(bias, "lm/bias"),
    ]


def head(model: ModelConfig, ours: str, theirs: str) -> list[Name]:
    """A linear layer on top, where there is such a head."""
    paths = {"pooler": "heads/pooler/dense"}
    return linear(theirs, paths.get(ours, f"heads/{ours}"), bias=True) if ours in model.heads else []
