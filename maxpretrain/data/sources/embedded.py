"""`embedded`: the English that every Python installation holds.

The documentation strings of the standard library's modules and classes (read from source with `ast`; nothing is imported
but `sys`'s built-in modules, which are loaded anyway) and `pydoc_data.topics`, the language reference. About 2.4 MB in an
order that depends on the Python installation alone.
"""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import importlib
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, ModuleType
from typing import Any

from maxpretrain.data.clean import BadDocument, Document, check
from maxpretrain.data.sources.base import Part, Source

# Absent from many distributions, or no prose.
_SKIPPED = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "lib-dynload",
}


@dataclass
class Embedded(Source):
    """The corpus described above; one unit, one part."""

    def __post_init__(self) -> None:
        self.size = 2_400_000

    def units(self) -> list[Any]:
        return [self]

    def parts(self, unit: Any) -> Iterator[Part]:
        yield Part(None, 0, 1, self.size)

    def documents(self, part: Part) -> Iterator[Document | BadDocument]:
        return (check(Document(id, text)) for id, text in corpus())

    def fingerprint(self) -> str:
        # The version and the files' names and sizes stand for the content: reading all of it takes longer than a second.
        rows = [(name, os.stat(path).st_size) for name, path in _files()]
        digest = hashlib.sha256(f"embedded 1 {sys.version} {sys.platform}".encode())
        digest.update(repr(rows).encode())
        return digest.hexdigest()


def _files() -> list[tuple[str, str]]:
    """(module name, path) of the standard library's sources, sorted."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED and not f.startswith("config-")]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = os.path.join(folder, name)
                found.append((os.path.relpath(path, root)[:-3].replace(os.sep, ".").removesuffix(".__init__"), path))
    return sorted(found)


@functools.lru_cache(1)
def corpus() -> tuple[tuple[str, str], ...]:
    """(id, text) of every document: modules, classes, built-in modules, topics of the language reference."""
    documents: list[tuple[str, str]] = []
    seen: set[str] = set()  # inherited and copied documentation counts once
    enabled = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles worth looking for, and millions of nodes: a third of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, path in _files():
                documents.extend(_module(name, path, seen))
            for name in sorted(sys.builtin_module_names):
                documents.extend(_builtin(importlib.import_module(name), seen))
    finally:
        if enabled:
            gc.enable()
    documents.extend(_topics())
    return tuple(documents)


def _module(name: str, path: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return  # a template or a file that is not source: no documentation
    sections = [] if _docstring(tree, seen) is None else [_docstring_text(tree)]
    classes = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            classes.append((f"{name}.{node.name}", _class(node, seen)))
        else:
            sections.extend(_function(node, seen))
    yield from _joined(name, sections)
    for id, of_class in classes:
        yield from _joined(id, of_class)


def _joined(name: str, sections: list[str]) -> Iterator[tuple[str, str]]:
    if sum(map(len, sections)) >= 40:  # less is no text to learn from
        yield name, f"{name}\n\n" + "\n\n".join(sections) + "\n"


def _docstring_text(node: Any) -> str:
    return inspect.cleandoc(node.body[0].value.value).replace("\0", "").strip()


def _docstring(node: Any, seen: set[str]) -> str | None:
    """The documentation of a module, class or function, unless it is empty or was met before."""
    body = node.body
    if not (
        body
        and isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        return None
    text = _docstring_text(node)
    if not text or text in seen or not _encodable(text):
        return None
    seen.add(text)
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _function(node: Any, seen: set[str]) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        text = _docstring(node, seen)
        if text is not None:
            return [f"{node.name}({', '.join(a.arg for a in node.args.args)})\n{text}"]
    return []


def _class(node: ast.ClassDef, seen: set[str]) -> list[str]:
    text = _docstring(node, seen)
    sections = [] if text is None else [text]
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            sections.extend(_class(child, seen))
        else:
            sections.extend(_function(child, seen))
    return sections


def _builtin(module: ModuleType, seen: set[str]) -> Iterator[tuple[str, str]]:
    sections = _documented("", module, seen)
    for name, value in sorted(vars(module).items()):
        # Only what the interpreter itself put there: shells and debuggers add to `builtins` and `sys`.
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if isinstance(value, type):
            inner = [s for n, v in [("", value), *sorted(vars(value).items())] for s in _documented(n, v, seen)]
            yield from _joined(f"{module.__name__}.{name}", inner)
        elif isinstance(value, BuiltinFunctionType):
            sections.extend(_documented(name, value, seen))
    yield from _joined(module.__name__, sections)


def _documented(name: str, value: Any, seen: set[str]) -> list[str]:
    text = getattr(value, "__doc__", None)
    # Constants carry the documentation of their type.
    if not isinstance(text, str) or isinstance(value, int | str | float | bytes | tuple | dict | list | None):
        return []
    text = inspect.cleandoc(text).strip()
    if not text or text in seen or not _encodable(text):
        return []
    seen.add(text)
    return [f"{name}\n{text}" if name else text]


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name].strip() + "\n"
