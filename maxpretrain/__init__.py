"""maxpretrain: pretraining of language models in JAX.

    import maxpretrain as mp

    run = mp.load("runs/quickstart")          # a trained network
    mp.train(config)                          # a maxpretrain.config.Run
    mp.plan(config, target="v5p-128")
    mp.evaluate(run, "text.txt")

Importing it is light: whatever needs jax is imported when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Name -> the module that has it.
_EXPORTS = {
    "load": "maxpretrain.api",
    "LoadedRun": "maxpretrain.api",
    "Run": "maxpretrain.config",
    "UserError": "maxpretrain.errors",
}
_SUBMODULES = ("config", "data", "errors", "models", "objectives", "optim")
# Modules that are functions too: `mp.plan(config)` is `maxpretrain.plan.plan(config)`.
_CALLABLE = ("evaluate", "generate", "plan", "train")

__all__ = ["__version__", *_EXPORTS, *_SUBMODULES, *_CALLABLE]


class _Callable(ModuleType):
    """A module that is called as the function of its own name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """This package, which makes a submodule callable when the import system binds it here.

    `maxpretrain.plan` is a package and `maxpretrain.plan(config)` a promise; whichever way and whenever the package is
    imported, this is where it gets its name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE and type(value) is ModuleType:
            value.__class__ = _Callable
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _SUBMODULES or name in _CALLABLE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
