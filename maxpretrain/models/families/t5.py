"""T5, versions 1.0 and 1.1. References: Raffel et al. 2020, arXiv:1910.10683, §2.1 and §3.7 (sizes); 1.1: Shazeer 2020,
arXiv:2002.05202, and the authors' released checkpoints (github.com/google-research/text-to-text-transfer-transformer)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from maxpretrain.config import ModelConfig, RelativeConfig
from maxpretrain.errors import UserError
from maxpretrain.models.families.naming import Name, embedding, linear, name, norm, under
from maxpretrain.models.families.options import ACTIVATIONS, THEIR_ACTIVATIONS, Options

MODEL_TYPE = "t5"
CLASSES = {
    "T5ForConditionalGeneration": ("lm",),
    "T5WithLMHeadModel": ("lm",),
    "T5ForSequenceClassification": ("pooler", "sequence"),
}
# The first decoder layer of version 1.0 has a bias by distance for the memory in its file, which nothing ever read.
IGNORED = (r"EncDecAttention\.relative_attention_bias\.weight$",)
PREFIX = ""
TIED = {f"{part}.weight": "shared.weight" for part in ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")} | {
    f"transformer.{part}.embed_tokens.weight": "transformer.shared.weight" for part in ("encoder", "decoder")
}

# A key of our own, for `tie_word_embeddings` does not say it: version 5 of the reference only takes from it whether logits are
# scaled, and ties where the file has no unembedding.
UNTIED = "separate_lm_head"


def from_options(options: Options) -> ModelConfig:
    tied = options.get("tie_word_embeddings", default=True)
    # The reference writes this one, and beside it `tie_word_embeddings` true whatever the weights are: it decides.
    scaled = options.get("scale_decoder_outputs", default=tied)
    width = options.get("d_model")
    scale = 1 / math.sqrt(width) if scaled else 1.0
    return shape(options, gated=False, tied=tied and scaled, logit_scale=scale)


def to_options(model: ModelConfig) -> dict[str, Any]:
    scaled = model.logit_scale != 1.0
    require_scale(model, 1 / math.sqrt(model.model_dim) if scaled else 1.0)
    return options_of(model) | {"tie_word_embeddings": model.tie_embeddings, "scale_decoder_outputs": scaled}


def shape(options: Options, *, gated: bool, tied: bool, per_layer: bool = False, **fields: Any) -> ModelConfig:
    """A shape from the keys that T5 and its descendants have; `gated` and `tied` where the file does not say."""
    options.only("is_encoder_decoder", True)
    options.only("is_decoder", False)
    layers, decoder_layers = options.get("num_layers"), options.get("num_decoder_layers", default=None)
    width, heads, head_dim = options.get("d_model"), options.get("num_heads"), options.get("d_kv", default=64)
    activation, gated = _activation(options, gated)
    return ModelConfig(
        architecture="encoder-decoder",
        vocab_size=options.get("vocab_size"),
        num_layers=layers,
        num_decoder_layers=None if decoder_layers == layers else decoder_layers,
        model_dim=width,
        num_heads=heads,
        head_dim=None if head_dim * heads == width else head_dim,
        mlp_dim=options.get("d_ff"),
        max_length=options.get("n_positions", default=512),
        position="t5",
        relative=RelativeConfig(
            buckets=options.get("relative_attention_num_buckets", default=32),
            max_distance=options.get("relative_attention_max_distance", default=128),
            per_layer=per_layer,
        ),
        norm="rmsnorm",
        norm_eps=options.get("layer_norm_epsilon", default=1e-6),
        attention_scale=1.0,
        activation=activation,
        gated=gated,
        bias=False,
        tie_embeddings=not options.get(UNTIED, default=not tied),
        decoder_start_id=options.get("decoder_start_token_id", default=0),
        dropout=options.dropout("dropout_rate"),
        init="t5",
        init_std=options.get("initializer_factor", default=1.0),
        depth_scaled_init=False,
        **fields,
    )


def _activation(options: Options, gated: bool) -> tuple[str, bool]:
    """The MLP's activation, and whether it is gated."""
    kind = options.get("feed_forward_proj", default="gated-gelu" if gated else "relu")
    gated, plain = kind.startswith("gated-"), kind.removeprefix("gated-")
    # "gated-gelu" means the tanh form. What is derived from it is written too, and goes before it.
    theirs = options.get("dense_act_fn", default="gelu_new" if kind == "gated-gelu" else plain)
    if theirs not in ACTIVATIONS:
        raise UserError(f'{options.where}: feed_forward_proj is "{kind}", and supported are {", ".join(ACTIVATIONS)}')
    return ACTIVATIONS[theirs], options.get("is_gated_act", default=gated)


def options_of(model: ModelConfig) -> dict[str, Any]:
    """The keys that T5 and its descendants have."""
    theirs = "gelu_new" if model.activation == "gelu_tanh" else THEIR_ACTIVATIONS[model.activation]
    kind = f"gated-{theirs}" if model.gated else theirs
    return {
        "vocab_size": model.vocab_size,
        "num_layers": model.num_layers,
        "num_decoder_layers": model.decoder_layers,
        "d_model": model.model_dim,
        "num_heads": model.num_heads,
        "d_kv": model.head_width,
        "d_ff": model.mlp_width,
        "n_positions": model.max_length,
        "relative_attention_num_buckets": model.relative.buckets,
        "relative_attention_max_distance": model.relative.max_distance,
        "layer_norm_epsilon": model.norm_eps,
        "feed_forward_proj": "gated-gelu" if kind == "gated-gelu_new" else kind,
        "dense_act_fn": theirs,
        "is_gated_act": model.gated,
        "dropout_rate": model.dropout,
        "initializer_factor": model.init_std,
        "decoder_start_token_id": model.decoder_start_id,
        "is_encoder_decoder": True,
        UNTIED: not model.tie_embeddings,
    }


def require_scale(model: ModelConfig, scale: float) -> None:
    """Refuses to export logits that the reference would scale otherwise."""
    if not math.isclose(model.logit_scale, scale):
        raise UserError(
            f"model.logit_scale is {model.logit_scale:g}, and files of this kind are read with {scale:g}; it cannot be exported"
        )


def refined(model: ModelConfig, tensors: Collection[str], read: Callable[[str], np.ndarray]) -> ModelConfig:
    """What only the tensors tell: there is an unembedding of its own where the file has one that differs from the embedding."""
    own = "lm_head.weight" in tensors and not np.array_equal(read("lm_head.weight"), read("shared.weight"))
    return dataclasses.replace(model, tie_embeddings=not own)


def names(model: ModelConfig) -> list[Name]:
    network = [embedding("shared.weight"), *_stack(model, "encoder"), *_stack(model, "decoder")]
    if "sequence" in model.heads:
        return [*under("transformer.", network), *classification_head()]
    head = [] if model.tie_embeddings else linear("lm_head", "unembed", bias=False)
    return [*network, *head]


def classification_head() -> list[Name]:
    """Of the last token's state, as BART has it too."""
    return [
        *linear("classification_head.dense", "heads/pooler/dense", bias=True),
        *linear("classification_head.out_proj", "heads/sequence", bias=True),
    ]


def _stack(model: ModelConfig, part: str) -> list[Name]:
    """The tensors of the encoder or the decoder."""
    block = f"{part}/stack/block"
    table = "layer.0.SelfAttention.relative_attention_bias.weight"
    sublayers = [_attention("SelfAttention", block, "attention")]
    if part == "decoder":
        sublayers.append(_attention("EncDecAttention", block, "cross"))
    wide = {"wi_0": "gate", "wi_1": "up"} if model.gated else {"wi": "up"}
    mlp = [
        n
        for a, b in (wide | {"wo": "down"}).items()
        for n in linear(f"DenseReluDense.{a}", f"{block}/mlp/{b}", bias=False)
    ]
    sublayers.append([*mlp, *norm("layer_norm", f"{block}/mlp_norm", bias=False)])
    layers = [n for i, sublayer in enumerate(sublayers) for n in under(f"layer.{i}.", sublayer)]
    if model.relative.per_layer:
        layers.append(name(table, f"{block}/attention/bias/table", form="plain"))
        shared = []
    else:
        shared = [name(f"{part}.block.0.{table}", f"{part}/bias/table", form="plain")]
    return [
        *under(f"{part}.block.{{layer}}.", layers),
        *shared,
        *norm(f"{part}.final_layer_norm", f"{part}/norm", bias=False),
    ]


def _attention(theirs: str, block: str, ours: str) -> list[Name]:
    parts = {"q": "query", "k": "key", "v": "value", "o": "out"}
    names = [n for a, b in parts.items() for n in linear(f"{theirs}.{a}", f"{block}/{ours}/{b}", bias=False)]
    return [*names, *norm("layer_norm", f"{block}/{ours}_norm", bias=False)]


def size(layers: int, dim: int, heads: int, mlp: int, *, head_dim: int = 64, vocab: int = 32_128) -> ModelConfig:
    """Version 1.1: gated, the unembedding apart, no dropout while pretraining."""
    return ModelConfig(
        architecture="encoder-decoder",
        vocab_size=vocab,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        head_dim=None if heads * head_dim == dim else head_dim,
        mlp_dim=mlp,
        max_length=512,
        position="t5",
        norm="rmsnorm",
        norm_eps=1e-6,
        attention_scale=1.0,
        activation="gelu_tanh",
        gated=True,
        bias=False,
        tie_embeddings=False,
        decoder_start_id=0,
        init="t5",
        init_std=1.0,
        depth_scaled_init=False,
    )


def _original(layers: int, dim: int, heads: int, mlp: int, *, head_dim: int = 64) -> ModelConfig:
    """Version 1.0: relu, tied, and dropout."""
    return dataclasses.replace(
        size(layers, dim, heads, mlp, head_dim=head_dim),
        activation="relu",
        gated=False,
        tie_embeddings=True,
        logit_scale=1 / math.sqrt(dim),
        dropout=0.1,
    )


PRESETS = {
    "t5-small": _original(6, 512, 8, 2048),
    "t5-base": _original(12, 768, 12, 3072),
    "t5-large": _original(24, 1024, 16, 4096),
    "t5-3b": _original(24, 1024, 32, 16_384, head_dim=128),
    "t5-11b": _original(24, 1024, 128, 65_536, head_dim=128),
    "t5-v1.1-small": size(8, 512, 6, 1024),
    "t5-v1.1-base": size(12, 768, 12, 2048),
    "t5-v1.1-large": size(24, 1024, 16, 2816),
    "t5-v1.1-xl": size(24, 2048, 32, 5120),
    "t5-v1.1-xxl": size(24, 4096, 64, 10_240),
}
