"""What the fields of a Run are: dotted names, types, one-line descriptions, and the check that a value has its field's type.

Shared by the three ways a value reaches a Run: a Python config file, JSON, and a command-line flag.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import linecache
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

_NOTHING = object()  # a text that stands for no value of a kind: None is a value


class Mismatch(Exception):
    """A value does not have the type of its field. `where` is the part of the value, such as `[2]`, that does not."""

    def __init__(self, where: str, value: Any, expected: str) -> None:
        super().__init__(where, value, expected)
        self.where, self.value, self.expected = where, value, expected

    def sentence(self, name: str) -> str:
        shown = f'"{self.value}"' if isinstance(self.value, str) else _short(self.value)
        return f"{name}{self.where} is {shown}; it takes {self.expected}"


@dataclasses.dataclass(frozen=True)
class Field:
    """A leaf of the config.

    Attributes:
        name: dotted, as `optimizer.peak_lr`.
        kind: its type annotation, resolved.
        value: what the Run at hand has there.
        help: the comment beside its declaration.
    """

    name: str
    kind: Any
    value: Any
    help: str


def leaves(config: Any, prefix: str = "") -> Iterator[Field]:
    """Every field below `config` that holds a plain value, in order of declaration."""
    comments = comments_of(type(config))
    for name, kind in kinds_of(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield Field(prefix + name, kind, value, comments.get(name, ""))


@functools.cache
def kinds_of(cls: type) -> dict[str, Any]:
    """Field name -> resolved annotation, in order of declaration."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def comments_of(cls: type) -> dict[str, str]:
    """Field name -> the trailing comment of its declaration, in `cls` or where it is inherited from."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        name = None
        for line in _class_lines(base):
            declared = re.match(r"    (\w+): ", line)
            name = declared.group(1) if declared else name
            if name is not None and "  # " in line:
                comments[name] = line.rpartition("  # ")[2].strip()
                name = None
    return comments


def _class_lines(cls: type) -> list[str]:
    # Not inspect.getsource: it parses the whole module once a class, which costs more than all the rest of --help.
    try:
        lines = linecache.getlines(sys.modules[cls.__module__].__file__ or "")
    except (AttributeError, KeyError):  # made at a prompt, or shipped without source
        return []
    start = next((i for i, line in enumerate(lines) if re.match(rf"class {cls.__name__}\b", line)), len(lines)) + 1
    stop = next((i for i in range(start, len(lines)) if re.match(r"[^\s#)]", lines[i])), len(lines))
    return lines[start:stop]


def members(kind: Any) -> tuple[Any, ...]:
    """The members of a union; a kind alone otherwise."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def item_kind(kind: Any) -> Any:
    """X of tuple[X, ...]; None for any other kind."""
    return typing.get_args(kind)[0] if is_tuple(kind) and typing.get_args(kind)[-1:] == (...,) else None


def is_nested(kind: Any) -> bool:
    """Whether it is a list of lists or of whole parts, which no flag can say."""
    item = item_kind(kind)
    return is_tuple(item) or dataclasses.is_dataclass(item)


def takes_bool(kind: Any) -> bool:
    return bool in members(kind)


_WORDS = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "None",
}


def describe(kind: Any) -> str:
    """A kind in words, as it ends "it takes …"."""
    if kind in _WORDS:
        return _WORDS[kind]
    if typing.get_origin(kind) is typing.Literal:
        options = [f'"{option}"' if isinstance(option, str) else str(option) for option in typing.get_args(kind)]
        return options[0] if len(options) == 1 else "one of " + ", ".join(options)
    if is_tuple(kind):
        args = typing.get_args(kind)
        if args[-1:] == (...,):
            return {int: "integers", float: "numbers", str: "texts"}.get(
                args[0], f"a list, each item {describe(args[0])}"
            )
        return f"{len(args)} values: " + ", ".join(describe(arg) for arg in args)
    if len(members(kind)) > 1:
        return ", or ".join(describe(member) for member in members(kind))
    return f"a {getattr(kind, '__name__', kind)}"


def check(value: Any, kind: Any, where: str = "") -> Any:
    """`value` as `kind`: an int is a float too, a list is a tuple, a path is a text; nothing else is converted.

    Raises:
        Mismatch: the value has another type.
    """
    if len(members(kind)) > 1:
        return _check_union(value, kind, where)
    if isinstance(value, os.PathLike) and kind is str:
        return os.fspath(value)
    if is_tuple(kind) and isinstance(value, (list, tuple)):
        args = typing.get_args(kind)
        each = [args[0]] * len(value) if args[-1:] == (...,) else list(args)
        if len(each) == len(value):
            return tuple(check(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, each, strict=True)))
    elif typing.get_origin(kind) is typing.Literal:
        for option in typing.get_args(kind):
            if type(option) is type(value) and option == value:  # True == 1: types are compared too
                return option
    elif kind is float and type(value) in (int, float):
        # Infinity and NaN are no settings, and JSON has neither; "no limit" is None where a field allows it.
        if abs(value) <= sys.float_info.max:
            return float(value)
        raise Mismatch(where, value, "a finite number")
    elif kind in (int, str, bool, type(None)) and type(value) is kind:
        return value
    raise Mismatch(where, value, describe(kind))


def _check_union(value: Any, kind: Any, where: str) -> Any:
    for member in members(kind):
        try:
            return check(value, member, where)
        except Mismatch:
            continue
    raise Mismatch(where, value, describe(kind))


def parse(text: str, kind: Any) -> Any:
    """The value that `text` on a command line stands for, where `kind` is not a tuple.

    Raises:
        Mismatch: it stands for none of this kind.
    """
    for exactly in (True, False):  # "none" may be the name of an option: None is tried in lower case last
        for member in members(kind):
            value = _parse_member(text, member, exactly)
            if value is not _NOTHING:
                return value
    if kind is float and _number(text, float) is not _NOTHING:
        raise Mismatch("", text, "a finite number")
    raise Mismatch("", text, describe(kind))


def _parse_member(text: str, kind: Any, exactly: bool) -> Any:
    if kind is type(None):
        return None if text == "None" or (not exactly and text.lower() in ("none", "null")) else _NOTHING
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), _NOTHING)
    if kind is int:
        return _number(text, int)
    if kind is float:
        number = _number(text, float)
        return number if number is not _NOTHING and math.isfinite(number) else _NOTHING
    if typing.get_origin(kind) is typing.Literal:
        return next((option for option in typing.get_args(kind) if str(option) == text), _NOTHING)
    # A text is tried last, whatever its place in the union: `str | None` takes "None" for None.
    return text if kind is str and (not exactly or text != "None") else _NOTHING


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        return _NOTHING


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})" if value is not None else "None"


def suggest(name: str, names: Iterable[str], mark: str = "") -> str:
    """The `; did you mean …?` that ends the sentence about an unknown dotted name; empty where none is near.

    Unlike `errors.nearest`, a field typed without its group (`peek_lr`) or under a wrong one is found too.
    """
    names = list(names)

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last)

    inside = [other for other in names if other.startswith(f"{name}.")]
    if inside:
        return f"; it is a group of fields: {', '.join(mark + other for other in inside[:4])}{', …' if len(inside) > 4 else ''}"
    best = max(names, key=likeness, default=None)
    return f"; did you mean {mark}{best}?" if best is not None and likeness(best) >= 0.6 else ""
