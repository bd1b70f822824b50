"""mT5: T5 1.1 of many languages. Reference: Xue et al. 2021, arXiv:2010.11934, table 1."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig
from maxpretrain.models.families import t5
from maxpretrain.models.families.options import Options
from maxpretrain.models.families.t5 import names as names
from maxpretrain.models.families.t5 import refined as refined

MODEL_TYPE = "mt5"
CLASSES = {
    "MT5ForConditionalGeneration": ("lm",),
    "MT5ForSequenceClassification": ("pooler", "sequence"),
}
IGNORED = t5.IGNORED
PREFIX = ""
TIED = t5.TIED


def from_options(options: Options) -> ModelConfig:
    # `tie_word_embeddings` says nothing: published files have false, the reference writes true beside the same tensors.
    return t5.shape(options, gated=True, tied=False)


def to_options(model: ModelConfig) -> dict[str, Any]:
    t5.require_scale(model, 1.0)
    return t5.options_of(model) | {"tie_word_embeddings": model.tie_embeddings}


PRESETS = {
    "mt5-small": t5.size(8, 512, 6, 1024, vocab=250_112),
    "mt5-base": t5.size(12, 768, 12, 2048, vocab=250_112),
    "mt5-large": t5.size(24, 1024, 16, 2816, vocab=250_112),
    "mt5-xl": t5.size(24, 2048, 32, 5120, vocab=250_112),
    "mt5-xxl": t5.size(24, 4096, 64, 10_240, vocab=250_112),
}
