"""A directory in the layout of Hugging Face, read as if it were a run: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from maxpretrain.config import ModelConfig, Run, TokenizerConfig
from maxpretrain.configio import checked
from maxpretrain.convert.tensors import TensorFiles
from maxpretrain.errors import StorageError, UserError, nearest
from maxpretrain.modelconfig import validate_model
from maxpretrain.rundir import RunDirectory

if TYPE_CHECKING:  # pragma: no cover
    from maxpretrain.convert.mapping import Mapping
    from maxpretrain.data.tokenizer import Tokenizer
    from maxpretrain.mesh import Layout


@dataclasses.dataclass(frozen=True)
class Published(RunDirectory):
    """Weights of others.

    Attributes:
        family: the module that knows their names.
        raw: the parsed config.json.
    """

    family: ModuleType = dataclasses.field(kw_only=True)
    raw: dict[str, Any] = dataclasses.field(kw_only=True)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:  # type: ignore[override]
        """As the files say; None where there are none."""
        from maxpretrain.convert.tokenizers import import_tokenizer

        return import_tokenizer(self.path, self.config.model.vocab_size)

    def step(self, step: int | None = None) -> int:
        if step not in (None, 0):
            raise StorageError(
                f"{self.path} is no run of ours and has no checkpoint of step {step}; leave out the step"
            )
        return 0

    def meta(self, step: int) -> dict[str, Any]:
        special = {name: value for name, value in self.raw.items() if name.endswith("_token_id")}
        return {"imported": str(self.path), "model_type": self.family.MODEL_TYPE, "special_ids": special}

    def params(self, step: int | None = None, layout: Layout | None = None) -> dict[str, Any]:
        """The weights, float32, one parameter at a time in memory beside what is on the devices.

        Raises:
            UserError: a tensor is missing, is of another shape, or belongs to nothing in this model.
        """
        import jax

        from maxpretrain.convert.mapping import as_tree
        from maxpretrain.fingerprint import named_leaves
        from maxpretrain.rundir import abstract_params

        places = {name: leaf.sharding for name, leaf in named_leaves(abstract_params(self.config, layout)).items()}
        with TensorFiles.open(self.path) as files:
            found = self._found(files)
            read = lambda name: files.read(found[name])  # noqa: E731
            return as_tree(
                {name: jax.device_put(value, places[name]) for name, value in self.mapping.load(read, str(self.path))}
            )

    def check(self) -> None:
        """Reads the headers of the files, and the few tensors that must have a certain content.

        Raises:
            UserError: as `params`.
        """
        with TensorFiles.open(self.path) as files:
            found = self._found(files)
            for tensor in self.mapping.tensors:
                shape, expected = files.shape(found[tensor.theirs]), self.mapping.their_shape(tensor)
                if shape != expected:
                    raise UserError(_misshapen(self.path, found[tensor.theirs], shape, expected))

    @functools.cached_property
    def mapping(self) -> Mapping:
        from maxpretrain.convert.mapping import Mapping
        from maxpretrain.models import build

        model = build(self.config.model)
        return Mapping(model, self.family.names(self.config.model))

    def _found(self, files: TensorFiles) -> dict[str, str]:
        """The name that each tensor has in these files; refuses missing and foreign ones."""
        there = set(files.names())
        by_new_name = {self._renamed(name): name for name in there}
        found: dict[str, str] = {}
        for tensor in self.mapping.tensors:
            name = next((n for n in self._spellings(tensor.theirs) if n in there), None)
            name = name or next((by_new_name[n] for n in self._spellings(tensor.theirs) if n in by_new_name), None)
            if name is None:
                raise UserError(
                    f"{self.path} has no tensor {tensor.theirs}{nearest(tensor.theirs, there)}; its config.json "
                    f"({self.class_name}) asks for it: take both from the same model"
                )
            found[tensor.theirs] = name
        foreign = sorted(there - set(found.values()))
        foreign = [name for name in foreign if not any(re.search(p, name) for p in self.family.IGNORED)]
        foreign = [name for name in foreign if not self._is_copy(name, files, found)]
        if foreign:
            more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
            raise UserError(
                f"{self.path} has a tensor {foreign[0]}{more}, for which {self.class_name} has no place; take config.json and weights "
                "from the same model"
            )
        return found

    @property
    def class_name(self) -> str:
        """The published class, as config.json names it."""
        return next(
            (c for c in self.raw.get("architectures") or [] if c in self.family.CLASSES), self.family.MODEL_TYPE
        )

    def _spellings(self, name: str) -> Iterator[str]:
        prefix = self.family.PREFIX
        yield from (name, name.removeprefix(prefix), prefix + name)

    def _renamed(self, name: str) -> str:
        """The name that today's files have for it."""
        for pattern, new in getattr(self.family, "RENAMED", ()):
            name = re.sub(pattern, new, name)
        return name

    def _is_copy(self, name: str, files: TensorFiles, found: dict[str, str]) -> bool:
        """Whether the tensor is a second copy of one that the model ties it to; older files hold both."""
        first = self.family.TIED.get(name) or self.family.TIED.get(self.family.PREFIX + name)
        if first not in found or files.shape(name) != files.shape(found[first]):
            return False
        if np.array_equal(files.read(name), files.read(found[first])):
            return True
        raise UserError(
            f"{self.path}: {name} differs from {first}, and config.json ties the two; set tie_word_embeddings to false there"
        )


def _misshapen(path: Path, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return (
        f"{path}: {name} has shape {list(shape)}, and the config.json beside it makes {list(expected)}; take both from the "
        "same model"
    )


def open_published(path: Path) -> Published:
    """Reads config.json and checks that the weights fit it; nothing large is read.

    Raises:
        UserError: a model type, class or option that is not supported (it says what is), or weights that do not fit.
    """
    from maxpretrain.models import families
    from maxpretrain.models.families.options import Options

    raw = json.loads((path / "config.json").read_bytes())
    options = Options(raw, str(path / "config.json"))
    family = families.by_type(options.model_type)
    if family is None:
        types = sorted(f.MODEL_TYPE for f in families.FAMILIES.values() if hasattr(f, "MODEL_TYPE"))
        raise UserError(
            f'{options.where}: model_type "{options.model_type}" is not supported; supported are {", ".join(types)}'
        )
    if raw.get("quantization_config"):
        raise UserError(
            f"{options.where} has a quantization_config, and quantized weights are not read; take the full ones"
        )
    try:
        model = _with_heads(family, options, family.from_options(options))
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UserError(
            f"{options.where} has a value that cannot be: {error}; take the file that belongs to the weights"
        ) from error
    try:
        validate_model(checked(Run(model=model)).model, 1)
    except UserError as error:
        raise UserError(f"{options.where} makes a network that cannot be: {error}") from error
    if hasattr(family, "refined"):
        with TensorFiles.open(path) as files:
            model = family.refined(model, files.names(), files.read)
    if model.vocab_size is None:
        raise UserError(f"{options.where} has no vocab_size; take the file that belongs to the weights")
    length = min(256, model.max_length)
    run = Run(name=path.name or "imported", model=model, tokenizer=TokenizerConfig(kind="huggingface"))
    objective = getattr(family, "OBJECTIVE", run.objective)
    run = run.replace(batch=dataclasses.replace(run.batch, length=length), objective=objective)
    published = Published(path, run, family=family, raw=raw)
    published.check()
    return published


def _with_heads(family: ModuleType, options: Any, model: ModelConfig) -> ModelConfig:
    known = [c for c in options.classes if c in family.CLASSES]
    if options.classes and not known:
        raise UserError(
            f"{options.where}: the class {options.classes[0]} is not supported; of {family.MODEL_TYPE} supported are "
            f"{', '.join(family.CLASSES)}"
        )
    heads = family.CLASSES[known[0]] if known else next(iter(family.CLASSES.values()))
    labels = options.raw.get("id2label") or {}
    more = {"num_labels": len(labels)} if labels and {"sequence", "token"} & set(heads) else {}
    return dataclasses.replace(model, heads=heads, **more)
