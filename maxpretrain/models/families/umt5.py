"""UMT5: mT5 with positions of its own in every layer. Reference: Chung et al. 2023, arXiv:2304.09151."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from maxpretrain.config import ModelConfig, RelativeConfig
from maxpretrain.models.families import t5
from maxpretrain.models.families.options import Options
from maxpretrain.models.families.t5 import names as names
from maxpretrain.models.families.t5 import refined as refined

MODEL_TYPE = "umt5"
CLASSES = {
    "UMT5ForConditionalGeneration": ("lm",),
    "UMT5ForSequenceClassification": ("pooler", "sequence"),
}
IGNORED = t5.IGNORED
PREFIX = ""
TIED = t5.TIED


def from_options(options: Options) -> ModelConfig:
    # As in mT5 `tie_word_embeddings` says nothing; and whatever the tensors are, the reference scales the logits (since its
    # version 5, which takes every file for tied).
    scale = 1 / math.sqrt(options.get("d_model"))
    return t5.shape(options, gated=True, per_layer=True, tied=False, logit_scale=scale)


def to_options(model: ModelConfig) -> dict[str, Any]:
    t5.require_scale(model, 1 / math.sqrt(model.model_dim))
    return t5.options_of(model) | {"tie_word_embeddings": model.tie_embeddings}


def _size(layers: int, dim: int, heads: int, mlp: int) -> ModelConfig:
    shape = t5.size(layers, dim, heads, mlp, vocab=256_384)
    return dataclasses.replace(shape, relative=RelativeConfig(per_layer=True), logit_scale=1 / math.sqrt(dim))


PRESETS = {
    "umt5-small": _size(8, 512, 6, 1024),
    "umt5-base": _size(12, 768, 12, 2048),
    "umt5-xl": _size(24, 2048, 32, 5120),
    "umt5-xxl": _size(24, 4096, 64, 10_240),
}
