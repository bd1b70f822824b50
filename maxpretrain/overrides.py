"""Dotted overrides of a Run on the command line: `--optimizer.peak_lr 1e-3`.

tyro builds the new Run. Names and values are checked before it, so that what is wrong is said in one sentence; and the help is
ours, because tyro's takes longer than the 0.3 s in which `--help` has to answer.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import textwrap
import typing
from typing import Any

from maxpretrain import schema
from maxpretrain.config import Run
from maxpretrain.errors import UserError
from maxpretrain.objectives import Objective

_FLAG = re.compile(r"--[A-Za-z_]")


def apply_overrides(run: Run, args: list[str]) -> Run:
    """`run` with the fields that `args` name set to other values.

    A flag is `--a.b value` or `--a.b=value`, with `-` and `_` alike; true and false also as `--a.b` and `--a.no_b`; several
    values after a flag make a tuple, none an empty one; `None` where a field allows it. Of a repeated flag the last counts.

    Raises:
        UserError: a field is unknown (the nearest is named), a value is missing or of the wrong type.
    """
    values = read_flags(run, args)
    if not values:
        return run
    import tyro  # takes 0.1 s

    kinds = {field.name: field.kind for field in schema.leaves(run)}
    flags = [token for name, value in values.items() for token in _flags(name, value, kinds[name])]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return tyro.cli(Run, default=run, args=flags, config=(tyro.conf.AvoidSubcommands,), use_underscores=True)
    except SystemExit as error:
        raise UserError(
            f"the overrides {shlex.join(args)} cannot be read: {' '.join(said.getvalue().split())}"
        ) from error


def read_flags(run: Run, args: list[str]) -> dict[str, Any]:
    """Dotted name -> value, of the right type, in the order of the command line."""
    fields = {field.name: field for field in schema.leaves(run)}
    values: dict[str, Any] = {}
    at = 0
    while at < len(args):
        if not _FLAG.match(args[at]):
            raise UserError(f'"{args[at]}" belongs to no flag; overrides are written --field value, as --steps 100')
        name, has_value, inline = args[at][2:].partition("=")
        at += 1
        field, off = _find(name.replace("-", "_"), fields)
        following = args[at : next((i for i in range(at, len(args)) if _FLAG.match(args[i])), len(args))]
        if off:
            texts = [inline] if has_value else []
        elif has_value:
            texts = [inline]
        else:
            texts = following if schema.is_tuple(field.kind) else following[:1]
            at += len(texts)
        values[field.name] = _value(field, texts, off)
    return values


def _find(name: str, fields: dict[str, schema.Field]) -> tuple[schema.Field, bool]:
    """The field of a flag, and whether the flag is the one that says no to it."""
    if name in fields:
        return fields[name], False
    group, dot, last = name.rpartition(".")
    positive = fields.get(f"{group}{dot}{last.removeprefix('no_')}")
    if positive is not None and schema.takes_bool(positive.kind):
        return positive, True
    raise UserError(f"unknown field --{name}{schema.suggest(name, fields, '--') or '; --help lists all fields'}")


def _value(field: schema.Field, texts: list[str], off: bool) -> Any:
    flag = f"--{field.name}"
    if schema.is_nested(field.kind):
        raise UserError(f"{flag} holds several values in each of its items; give it in the config file")
    if off and texts:
        raise UserError(f"the flag that says no to {flag} takes no value; write {flag} {texts[0]}")
    if off:
        return False
    if not texts and schema.takes_bool(field.kind):
        return True
    try:
        if schema.is_tuple(field.kind):
            item = schema.item_kind(field.kind)
            kinds = [item] * len(texts) if item is not None else list(typing.get_args(field.kind))
            if len(kinds) != len(texts):
                raise UserError(f"{flag} got {len(texts)} values; it takes {schema.describe(field.kind)}")
            return tuple(schema.parse(text, kind) for text, kind in zip(texts, kinds, strict=True))
        if not texts:
            raise UserError(f"{flag} has no value; it takes {schema.describe(field.kind)}")
        return schema.parse(texts[0], field.kind)
    except schema.Mismatch as mismatch:
        raise UserError(mismatch.sentence(flag)) from mismatch


def _flags(name: str, value: Any, kind: Any) -> list[str]:
    """The flag as every version of tyro reads it: a single value behind `=`, where a leading `-` means nothing."""
    if kind is bool:
        group, dot, last = name.rpartition(".")
        return [f"--{group}{dot}{last if value else 'no_' + last}"]
    texts = [_text(item) for item in value] if isinstance(value, tuple) else [_text(value)]
    if len(texts) == 1:
        return [f"--{name}={texts[0]}"]
    if dashed := [text for text in texts if text.startswith("-")]:
        raise UserError(
            f'--{name} holds "{dashed[0]}", which looks like a flag; give several values that begin with "-" in the config file'
        )
    return [f"--{name}", *texts]


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def render_fields(run: Run, width: int | None = None) -> str:
    """Every field with its type, its meaning and its value in `run`, by group: the help of a command that takes overrides."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 140)
    lines: list[str] = []
    group = None
    for field in schema.leaves(run):
        if schema.is_nested(field.kind):
            continue
        parent = field.name.rpartition(".")[0]
        if parent != group:
            group = parent
            lines += ["", *_heading(run, group, width)]
        lines += _entry(
            f"  --{field.name} {_placeholder(field.kind)}", f"{field.help} (default: {_shown(field.value)})", width
        )
    return "\n".join(lines[1:])


def _heading(run: Run, group: str, width: int) -> list[str]:
    part: Any = run
    for name in filter(None, group.split(".")):
        part = getattr(part, name)
    label = f"{group}, {type(part).__name__}" if isinstance(part, Objective) else group or "run"
    # dataclass() gives a class without a docstring its signature for one.
    text = " ".join((type(part).__doc__ or "").split("\n\n")[0].split())
    summary = "" if text.startswith(f"{type(part).__name__}(") else text
    return textwrap.wrap(f"{label}: {summary}" if summary else label, width, subsequent_indent="  ")


_INDENT = 34


def _entry(flag: str, text: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(text, max(width - _INDENT, 30), break_long_words=False, break_on_hyphens=False)
    first = [] if len(flag) < _INDENT - 1 else [flag]
    lines = first + [" " * _INDENT + line for line in wrapped]
    return lines if first else [flag.ljust(_INDENT) + wrapped[0], *lines[1:]]


def _placeholder(kind: Any) -> str:
    simple = {int: "INT", float: "FLOAT", str: "TEXT", bool: "true|false", type(None): "None"}
    if kind in simple:
        return simple[kind]
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(str(option) for option in typing.get_args(kind)) + "}"
    if schema.is_tuple(kind):
        item = schema.item_kind(kind)
        return (
            f"[{_placeholder(item)} ...]"
            if item is not None
            else " ".join(_placeholder(k) for k in typing.get_args(kind))
        )
    return "|".join(_placeholder(member) for member in schema.members(kind))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return shlex.join(str(item) for item in value) if value else "empty"
    if isinstance(value, str):
        return shlex.quote(value) if value else "empty"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
