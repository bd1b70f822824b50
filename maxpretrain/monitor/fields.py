"""Config and environment as cards of name-value rows."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from maxpretrain import configio, objectives
from maxpretrain.config import Run
from maxpretrain.monitor.page import escape
from maxpretrain.objectives import Objective


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> plain value."""
    if isinstance(value, dict):
        return {
            name: leaf
            for key, item in value.items()
            for name, leaf in flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: value}


def show(value: Any) -> str:
    """A value of the config for reading."""
    if isinstance(value, str):
        # Quoted where its ends would not be seen.
        return json.dumps(value, ensure_ascii=False) if value != value.strip() else value or "(empty)"
    if isinstance(value, list):
        return ", ".join(_item(item) for item in value) if value else "(none)"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _item(value: Any) -> str:
    """An item of a list: quoted where its commas would look like the list's."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {show(item)}" for key, item in value.items()) + ")"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and "," in value else show(value)


def _default_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The default of every field that has one, by dotted name; of the objective, those of the class that the config names."""
    run, chosen = Run(), config.get("objective")
    cls = getattr(objectives, str(chosen.get("type")), None) if isinstance(chosen, dict) else None
    if isinstance(cls, type) and issubclass(cls, Objective):
        run = run.replace(objective=cls())
    return {name: value for name, value in flatten(configio.to_dict(run)).items() if name not in ("name", "root")}


def config_cards(config: dict[str, Any]) -> str:
    """Every field, those that differ from their default marked, with the default."""
    return _cards(flatten(config), _default_fields(config), first="run")


def environment_cards(environment: dict[str, Any]) -> str:
    """Every entry; a command line (a list of words) as one would type it."""
    flat = {}
    for name, value in flatten(environment).items():
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            value = shlex.join(value) if re.search("command|argv", name) else value
        flat[name] = value
    return _cards(flat, {})


def _cards(fields: dict[str, Any], defaults: dict[str, Any], first: str = "general") -> str:
    """Cards of name-value rows by the first part of the dotted name."""
    groups: dict[str, list[tuple[str, str, Any]]] = {}
    for name, value in fields.items():
        head, _, tail = name.partition(".")
        groups.setdefault(head if tail else first, []).append((tail or head, name, value))
    made = []
    for group, rows in groups.items():
        body = ""
        for short, name, value in rows:
            changed = name in defaults and defaults[name] != value
            was = f'<span class="default">default {escape(show(defaults[name]))}</span>' if changed else ""
            body += f'<tr{" class=changed" if changed else ""}><th scope="row">{escape(short)}</th><td>{escape(show(value))}{was}</td></tr>'
        made.append(f'<div class="card"><h3>{escape(group)}</h3><table><tbody>{body}</tbody></table></div>')
    return f'<div class="groups">{"".join(made)}</div>' if made else ""
