"""BART. Reference: Lewis et al. 2019, arXiv:1910.13461, §2.1 and §5."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from maxpretrain.config import ModelConfig
from maxpretrain.models.families.naming import Name, embedding, linear, name, norm, under
from maxpretrain.models.families.options import THEIR_ACTIVATIONS, Options
from maxpretrain.models.families.t5 import classification_head
from maxpretrain.objectives.bart import BART

MODEL_TYPE = "bart"
CLASSES = {
    "BartForConditionalGeneration": ("lm",),
    "BartForSequenceClassification": ("pooler", "sequence"),
    "BartModel": ("lm",),
}
PREFIX = "model."
OBJECTIVE = BART()  # its prompts begin with bos
# A bias of zeros, which every file has, is none: see `refined`.
IGNORED = (r"^(model\.)?(en|de)coder\.version$", r"^final_logits_bias$")
TIED = {
    f"{part}.weight": "model.shared.weight"
    for part in ("lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens")
}


def from_options(options: Options) -> ModelConfig:
    options.only("is_encoder_decoder", True)
    options.only("is_decoder", False)
    options.only("tie_word_embeddings", True)  # else its encoder and decoder have embeddings of their own
    layers, decoder_layers = options.get("encoder_layers"), options.get("decoder_layers")
    heads, mlp_dim = options.get("encoder_attention_heads"), options.get("encoder_ffn_dim")
    options.only("decoder_attention_heads", heads)
    options.only("decoder_ffn_dim", mlp_dim)
    return ModelConfig(
        architecture="encoder-decoder",
        vocab_size=options.get("vocab_size"),
        num_layers=layers,
        num_decoder_layers=None if decoder_layers == layers else decoder_layers,
        model_dim=options.get("d_model"),
        num_heads=heads,
        mlp_dim=mlp_dim,
        max_length=options.get("max_position_embeddings", default=1024),
        embed_scale=options.get("scale_embedding", default=False),
        embed_norm=True,
        position_offset=2,
        norm_placement="post",
        activation=options.activation("activation_function", default="gelu"),
        lm_bias=options.get("add_bias_logits", default=True),
        decoder_start_id=options.get("decoder_start_token_id", default=2),
        dropout=options.dropout("dropout", "attention_dropout", "activation_dropout"),
        init_std=options.get("init_std", default=0.02),
        depth_scaled_init=False,
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    parts = ("encoder", "decoder")
    return (
        {
            "vocab_size": model.vocab_size,
            "encoder_layers": model.num_layers,
            "decoder_layers": model.decoder_layers,
            "d_model": model.model_dim,
            "max_position_embeddings": model.max_length,
            "scale_embedding": bool(model.embed_scale),
            "activation_function": THEIR_ACTIVATIONS[model.activation],
            "add_bias_logits": model.lm_bias,
            "decoder_start_token_id": model.decoder_start_id,
            "init_std": model.init_std,
            "is_encoder_decoder": True,
            "tie_word_embeddings": model.tie_embeddings,
        }
        | {f"{part}_attention_heads": model.num_heads for part in parts}
        | {f"{part}_ffn_dim": model.mlp_width for part in parts}
        | dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), model.dropout)
    )


def refined(model: ModelConfig, tensors: Collection[str], read: Callable[[str], np.ndarray]) -> ModelConfig:
    """What only the tensors tell: there is a bias for each token of the vocabulary where the file has one that is not zero."""
    bias = "final_logits_bias" in tensors and bool(np.any(read("final_logits_bias")))
    return dataclasses.replace(model, lm_bias=bias)


def names(model: ModelConfig) -> list[Name]:
    return [
        embedding("model.shared.weight"),
        *([name("final_logits_bias", "lm/bias", form="row")] if model.lm_bias and "lm" in model.heads else []),
        *_stack("encoder"),
        *_stack("decoder"),
        *(classification_head() if "sequence" in model.heads else []),
    ]


def _stack(part: str) -> list[Name]:
    """The tensors of the encoder or the decoder."""
    block, attentions = f"{part}/stack/block", {"self_attn": "attention"}
    if part == "decoder":
        attentions["encoder_attn"] = "cross"
    projections = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    layer = [
        n
        for theirs, ours in attentions.items()
        for n in (
            *(n for a, b in projections.items() for n in linear(f"{theirs}.{a}", f"{block}/{ours}/{b}", bias=True)),
            *norm(f"{theirs}_layer_norm", f"{block}/{ours}_norm", bias=True),
        )
    ]
    layer += linear("fc1", f"{block}/mlp/up", bias=True) + linear("fc2", f"{block}/mlp/down", bias=True)
    layer += norm("final_layer_norm", f"{block}/mlp_norm", bias=True)
    return [
        name(f"model.{part}.embed_positions.weight", f"{part}/input/positions/table", form="plain"),
        *norm(f"model.{part}.layernorm_embedding", f"{part}/input/norm", bias=True),
        *under(f"model.{part}.layers.{{layer}}.", layer),
    ]


def _size(layers: int, dim: int, heads: int) -> ModelConfig:
    return ModelConfig(
        architecture="encoder-decoder",
        vocab_size=50_265,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        mlp_dim=4 * dim,
        max_length=1024,
        embed_scale=False,
        embed_norm=True,
        position_offset=2,
        norm_placement="post",
        activation="gelu",
        decoder_start_id=2,
        dropout=0.1,
        init_std=0.02,
        depth_scaled_init=False,
    )


PRESETS = {"bart-base": _size(6, 768, 12), "bart-large": _size(12, 1024, 16)}
