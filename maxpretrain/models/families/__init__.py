"""Published families: presets by size, their config.json, and the names of their tensors. One file a family; no maths.

A file here with PRESETS is a family; nothing else needs to know of it. Where a published library has it, it also says:

    MODEL_TYPE     `model_type` of its config.json
    CLASSES        name of the published class -> our heads
    from_options   Options -> ModelConfig (its heads are set by the class)
    to_options     ModelConfig -> keys of config.json
    names          ModelConfig -> names of all tensors
    PREFIX         of the tensors below the head, which some published files leave out
    refined        (ModelConfig, names of all tensors, function that reads one) -> ModelConfig: what only the tensors tell
    IGNORED        regular expressions of tensors that are no parameters
    TIED           tensors that older files hold a second time -> which is the first
    RENAMED        (regular expression, replacement): other spellings of the names, for tensors not called as `names` says
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from maxpretrain.config import ModelConfig
from maxpretrain.errors import UserError, nearest

_MODULES = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
FAMILIES: dict[str, ModuleType] = {m.__name__.rpartition(".")[2]: m for m in _MODULES if hasattr(m, "PRESETS")}


def preset(name: str) -> ModelConfig:
    """The shape published under this name.

    Raises:
        UserError: no family has it; names the nearest.
    """
    presets = {key: value for family in FAMILIES.values() for key, value in family.PRESETS.items()}
    if name not in presets:
        raise UserError(f'no preset "{name}"{nearest(name, presets)}')
    return presets[name]


def by_type(model_type: str) -> ModuleType | None:
    """The family whose config.json has this `model_type`."""
    return next((f for f in FAMILIES.values() if getattr(f, "MODEL_TYPE", None) == model_type), None)
