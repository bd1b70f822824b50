"""A Run in and out: found and executed as a Python config file, written and read as JSON.

A config file that the user names is Python and is run. What a run directory holds is JSON and is never run.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import os
import re
import sys
import traceback
import types
import warnings
from pathlib import Path
from typing import Any

from maxpretrain import config as _config
from maxpretrain import objectives, schema
from maxpretrain.config import Run, validate
from maxpretrain.errors import UserError, nearest
from maxpretrain.objectives import Objective
from maxpretrain.overrides import apply_overrides

__all__ = [
    "apply_overrides",
    "available",
    "checked",
    "find_config",
    "from_json",
    "load_config",
    "read_saved",
    "resolve",
    "to_dict",
    "to_json",
]

# Fields of runs that earlier versions saved -> what came in their place.
RETIRED = {"evaluation.batches": "evaluation.windows"}

_PACKAGE = Path(__file__).resolve().parent


def resolve(path_or_name: str | os.PathLike[str], overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """The Run that a command means: the config file, then its overrides, then all that `validate` checks.

    Raises:
        UserError: one sentence about the file, an override or a value.
    """
    run = apply_overrides(load_config(path_or_name), list(overrides))
    validate(run)
    return run


def available() -> dict[str, Path]:
    """Bare name -> config file, of ./configs, the checkout's configs/ and the ones that came with the package; the first wins."""
    found: dict[str, Path] = {}
    for folder in (Path("configs"), _PACKAGE.parent / "configs", _PACKAGE / "_configs"):
        if folder.is_dir():
            for file in sorted(folder.glob("*.py")):
                if not file.name.startswith("_"):
                    found.setdefault(file.stem, file)
    return found


def find_config(path_or_name: str | os.PathLike[str]) -> Path:
    """The file that `path_or_name` means: a path, or a bare name (`-`, `.` and `_` alike)."""
    text = os.fspath(path_or_name)
    path = Path(text).expanduser()
    if path.is_file():
        return path
    known = available()
    bare = path.suffix not in (".py", ".json") and path.name == text
    plain = lambda name: name.replace("-", "_").replace(".", "_")  # noqa: E731
    if bare and plain(text) in (by_name := {plain(name): file for name, file in known.items()}):
        return by_name[plain(text)]
    what = (
        f"{text} is a folder, not a config file"
        if path.is_dir()
        else f"no config {text}"
        if bare
        else f"config file {text} not found"
    )
    hint = nearest(path.stem.replace("-", "_"), known)
    listed = f" (available: {', '.join(known)})" if known and "there is:" not in hint else ""
    raise UserError(
        f"{what}{hint}{listed}" if known else f"{what}; give the path of a Python file that defines `config: Run`"
    )


def load_config(path_or_name: str | os.PathLike[str]) -> Run:
    """The Run that a config file defines, with every field of its declared type.

    Args:
        path_or_name: a Python file that defines `config: Run` or `def config() -> Run`, a saved config.json, or a bare name (see `available`).

    Raises:
        UserError: the file is not found, fails when run (the line is named), defines no `config`, or something else than a Run.
    """
    path = find_config(path_or_name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from error
    if path.suffix == ".json":
        return from_json(text, where=str(path))
    run = _execute(path, text)
    if not isinstance(run, Run):
        raise UserError(
            f"{path} defines `config` as {_a(type(run).__name__)}, not a Run; build it with maxpretrain.config.Run(…)"
        )
    return checked(run, where=str(path))


def checked(run: Run, where: str = "the config") -> Run:
    """`run` with every field of its declared type: dataclasses themselves check none. A list or a path that Python code put
    where a tuple or a text belongs becomes one.

    Raises:
        UserError: a field has a value of another type.
    """
    _require_parts(run, "", where)
    return _decode(_encode(run), Run, "", f"{where}: ")


def _require_parts(config: Any, prefix: str, where: str) -> None:
    for name, kind in schema.kinds_of(type(config)).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            part = getattr(config, name)
            if not isinstance(part, kind):
                raise UserError(f"{where}: {prefix}{name} is {_a(type(part).__name__)}; it takes {_a(kind.__name__)}")
            _require_parts(part, f"{prefix}{name}.", where)


def summary_of(path_or_name: str | os.PathLike[str]) -> str:
    """The docstring of a config file, or nothing."""
    path = find_config(path_or_name)
    return "" if path.suffix == ".json" else ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _execute(path: Path, text: str) -> Any:
    # A module of its own, registered because dataclasses look their module up; not imported, which would write __pycache__.
    module = types.ModuleType(f"maxpretrain_config_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    folder = str(path.resolve().parent)
    sys.path.append(folder)  # at the end: a neighbour may be imported, but never shadows a library
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
        config = module.__dict__.get("config", module)
        if callable(config) and not isinstance(config, type):
            config = config()
    except (Exception, SystemExit) as error:
        raise UserError(f"{_place_of(error, path)}: {_said(error)}{_hint(error)}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
    if config is module:
        near = [f", but `{name}`" for name in module.__dict__ if name.lower() == "config"]
        raise UserError(
            f"{path} defines no `config`{''.join(near[:1])}; add `config = Run(…)` or `def config() -> Run`"
        )
    return config


def _place_of(error: BaseException, path: Path) -> str:
    """The file, and its last line on the way to the error, which may have been raised deeper."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _said(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(f"{type(error).__name__}: {message}".split()).rstrip(":")


def _hint(error: BaseException) -> str:
    """The nearest field, where a dataclass of ours was given one that it does not have."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    cls = match and (getattr(_config, match[1], None) or getattr(objectives, match[1], None))
    return schema.suggest(match[2], schema.kinds_of(cls)) if match and dataclasses.is_dataclass(cls) else ""


def _a(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def to_dict(run: Run) -> dict[str, Any]:
    """Every field, as what JSON has: dicts, lists, texts, numbers, true, false, null. An objective carries its `type`."""
    return _encode(run)


def to_json(run: Run) -> str:
    """The text of config.json. `from_json(to_json(run)) == run`, exactly."""
    return json.dumps(to_dict(run), indent=2, allow_nan=False) + "\n"


def from_json(data: str | bytes | dict[str, Any], where: str = "the config") -> Run:
    """The Run that JSON holds; nothing in it is executed.

    An unknown key is an error that names the nearest, and so is a value of another type (an integer is a number too). A key
    that is missing was written by an older version: the field's default is taken, with a warning that names it.

    Args:
        data: text, or the dict of `to_dict`.
        where: what errors call it, such as the file's path.
    """
    if not isinstance(data, dict):
        try:
            data = json.loads(data, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:  # JSON errors and bad UTF-8 are ValueErrors
            raise UserError(f"{where} is not valid JSON: {error}") from error
    return _decode(data, Run, "", f"{where}: ")


def read_saved(run_dir: str | os.PathLike[str]) -> Run:
    """The Run whose directory this is, from its config.json."""
    path = Path(run_dir) / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{run_dir} is not a run directory: its config.json cannot be read ({error})") from error
    return from_json(text, where=str(path))


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {"type": type(value).__name__} if isinstance(value, Objective) else {}
        return named | {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_encode(item) for item in value] if isinstance(value, (tuple, list)) else value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'"{next(name for name in names if names.count(name) > 1)}" is given twice')
    return found


def _decode(value: Any, kind: Any, name: str, where: str) -> Any:
    """`value` as `kind`. `name` is the dotted name for messages, `where` the prefix that says which file."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _decode_dataclass(value, kind, name, where)
    item = schema.item_kind(kind)
    if isinstance(value, (list, tuple)) and isinstance(item, type) and dataclasses.is_dataclass(item):
        return tuple(_decode_dataclass(v, item, f"{name}[{i}]", where) for i, v in enumerate(value))
    try:
        return schema.check(value, kind)
    except schema.Mismatch as mismatch:
        raise UserError(where + mismatch.sentence(name)) from mismatch


def _decode_dataclass(value: Any, kind: type, name: str, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(
            f"{where}{name or 'the whole'} is {_a(type(value).__name__)}; it takes the fields of {_a(kind.__name__)}"
        )
    value = dict(value)
    if issubclass(kind, Objective):
        kind = _objective_class(value.pop("type", None), name, where)
    prefix = f"{name}." if name else ""
    kinds = schema.kinds_of(kind)
    for key in list(value):
        if prefix + key in RETIRED:
            del value[key]
            warnings.warn(f"{where}{prefix}{key} is no more, and {RETIRED[prefix + key]} counts", stacklevel=2)
        elif key not in kinds:
            raise UserError(f"{where}unknown field {prefix}{key}{schema.suggest(key, kinds, prefix)}")
    if missing := [field.name for field in dataclasses.fields(kind) if field.name not in value]:
        warnings.warn(f"{where}{', '.join(prefix + m for m in missing)} not given; the default is taken", stacklevel=2)
    return kind(
        **{field: _decode(value[field], kinds[field], prefix + field, where) for field in kinds if field in value}
    )


def _objective_class(type_name: Any, name: str, where: str) -> type[Objective]:
    known = {
        cls.__name__: cls
        for cls in vars(objectives).values()
        if isinstance(cls, type) and issubclass(cls, Objective) and cls is not Objective
    }
    if type_name is None:
        raise UserError(f"{where}{name} has no type; it takes one of {', '.join(known)}")
    if type_name not in known:
        raise UserError(
            f"{where}{name}.type {type_name!r} is no objective of maxpretrain.objectives{nearest(str(type_name), known)}"
        )
    return known[type_name]
