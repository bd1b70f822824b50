"""Published families: presets by size. One file a family; no maths."""

from __future__ import annotations

from maxpretrain.config import ModelConfig
from maxpretrain.errors import UserError, nearest
from maxpretrain.models.families import gpt2, gpt3, llama, qwen2

FAMILIES = {"gpt2": gpt2, "gpt3": gpt3, "llama": llama, "qwen2": qwen2}


def preset(name: str) -> ModelConfig:
    """The shape published under this name.

    Raises:
        UserError: no family has it; names the nearest.
    """
    presets = {key: value for family in FAMILIES.values() for key, value in family.PRESETS.items()}
    if name not in presets:
        raise UserError(f'no preset "{name}"{nearest(name, presets)}')
    return presets[name]
