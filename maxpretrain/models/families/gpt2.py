"""GPT-2. Reference: Radford et al. 2019, Language Models are Unsupervised Multitask Learners."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig
from maxpretrain.models.families.naming import Name, embedding, linear, name, norm, under
from maxpretrain.models.families.options import THEIR_ACTIVATIONS, Options

MODEL_TYPE = "gpt2"
CLASSES = {
    "GPT2LMHeadModel": ("lm",),
    "GPT2ForSequenceClassification": ("sequence",),
    "GPT2ForTokenClassification": ("token",),
}
PREFIX = "transformer."
IGNORED = (r"attn\.(masked_)?bias$",)
TIED = {"lm_head.weight": "transformer.wte.weight"}


def from_options(options: Options) -> ModelConfig:
    options.only("scale_attn_weights", True)
    options.only("scale_attn_by_inverse_layer_idx", False)
    options.only("add_cross_attention", False)
    return ModelConfig(
        vocab_size=options.get("vocab_size"),
        num_layers=options.get("n_layer"),
        model_dim=options.get("n_embd"),
        num_heads=options.get("n_head"),
        mlp_dim=options.get("n_inner", default=None),
        max_length=options.get("n_positions"),
        norm_eps=options.get("layer_norm_epsilon", default=1e-5),
        activation=options.activation("activation_function", default="gelu_new"),
        tie_embeddings=options.get("tie_word_embeddings", default=True),
        dropout=options.dropout("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        init_std=options.get("initializer_range", default=0.02),
    )


def to_options(model: ModelConfig) -> dict[str, Any]:
    theirs = "gelu_new" if model.activation == "gelu_tanh" else THEIR_ACTIVATIONS[model.activation]
    return {
        "vocab_size": model.vocab_size,
        "n_layer": model.num_layers,
        "n_embd": model.model_dim,
        "n_head": model.num_heads,
        "n_inner": model.mlp_dim,
        "n_positions": model.max_length,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": theirs,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
    } | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout)


def names(model: ModelConfig) -> list[Name]:
    ours, attention = "decoder/stack/block", "decoder/stack/block/attention"
    layer = [
        *norm("ln_1", f"{ours}/attention_norm", bias=True),
        *linear(
            "attn.c_attn", *(f"{attention}/{part}" for part in ("query", "key", "value")), bias=True, form="conv1d"
        ),
        *linear("attn.c_proj", f"{attention}/out", bias=True, form="conv1d"),
        *norm("ln_2", f"{ours}/mlp_norm", bias=True),
        *linear("mlp.c_fc", f"{ours}/mlp/up", bias=True, form="conv1d"),
        *linear("mlp.c_proj", f"{ours}/mlp/down", bias=True, form="conv1d"),
    ]
    return [
        embedding("transformer.wte.weight"),
        name("transformer.wpe.weight", "decoder/input/positions/table", form="plain"),
        *under("transformer.h.{layer}.", layer),
        *norm("transformer.ln_f", "decoder/norm", bias=True),
        *(linear("lm_head", "unembed", bias=False) if "lm" in model.heads and not model.tie_embeddings else []),
        *(linear("score", "heads/sequence", bias=False) if "sequence" in model.heads else []),
        *(linear("classifier", "heads/token", bias=True) if "token" in model.heads else []),
    ]


def _size(layers: int, dim: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=50_257,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        max_length=1024,
        position="learned",
        norm="layernorm",
        norm_eps=1e-5,
        activation="gelu_tanh",
        bias=True,
        tie_embeddings=True,
        init="normal",
        init_std=0.02,
        depth_scaled_init=True,
    )


PRESETS = {
    "gpt2": _size(12, 768, 12),
    "gpt2-medium": _size(24, 1024, 16),
    "gpt2-large": _size(36, 1280, 20),
    "gpt2-xl": _size(48, 1600, 25),
}
