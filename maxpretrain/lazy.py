"""Modules imported on first use, so that a config file can name an objective without importing jax (`--help` in 0.3 s)."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class _LazyModule(ModuleType):
    def __getattr__(self, attribute: str) -> Any:
        # Dunder look-ups come from `inspect` and friends walking over modules: they must not trigger the import.
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        value = getattr(importlib.import_module(self.__name__), attribute)
        self.__dict__[attribute] = value  # the next time it is not asked for here: objectives do so for every example
        return value


def lazy(name: str) -> Any:
    """The module `name`, imported when an attribute of it is first read."""
    return _LazyModule(name)
