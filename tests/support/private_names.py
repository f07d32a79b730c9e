"""Find the private names of libraries that the package uses. Knows no library.

A name is private if it begins with an underscore, if its module does, or if its module exports
other names only (`__all__`). A module whose documentation lists none of its names is private as a
whole, and has to be named here.
"""

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

PACKAGE = "websocket_relay"

UNDOCUMENTED = ("uvicorn.protocols", "uvicorn.server")
"""Modules, with those below them, that the documentation of their library does not mention."""

DOCUMENTED = frozenset({"_asdict", "_current_frames", "_exit", "_fields", "_make", "_replace"})
"""Names of the standard library that are public all the same: of named tuples, `os` and `sys`."""

ACCESSORS = frozenset({"delattr", "getattr", "hasattr", "setattr"})


class Use(NamedTuple):
    """A private name in a module of the package, such as `wire/parser`."""

    module: str
    name: str


def uses_in(source: Path) -> set[Use]:
    """Return the private names that the package in a source directory uses.

    Args:
        source: contains the package, and is on the path.
    """
    found: set[Use] = set()
    for file in sorted((source / PACKAGE).rglob("*.py")):
        module = file.relative_to(source / PACKAGE).with_suffix("").as_posix()
        tree = ast.parse(file.read_text())
        nodes = list(ast.walk(tree))
        names = {*_imported(nodes), *_accessed(tree, nodes)}
        if file.name != "__main__.py":
            names |= set(_inherited(nodes, file.relative_to(source)))
        found |= {Use(module, name) for name in names}
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in DOCUMENTED


def _imported(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Yield the private names that are imported from libraries."""
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        library = node.module.partition(".")[0]
        if library in sys.stdlib_module_names or library == PACKAGE:
            continue
        parts = [*node.module.split("."), ""]
        is_private_module = any(map(_is_private, parts)) or any(
            f"{node.module}.".startswith(f"{each}.") for each in UNDOCUMENTED
        )
        for alias in node.names:
            if is_private_module or not _is_exported(node.module, alias.name):
                yield alias.name


def _is_exported(module: str, name: str) -> bool:
    imported = importlib.import_module(module)
    is_submodule = inspect.ismodule(getattr(imported, name, None))
    return not _is_private(name) and (is_submodule or name in getattr(imported, "__all__", [name]))


def _accessed(tree: ast.Module, nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Yield the private attributes of other objects than `self` and the module's classes."""
    own = {"self", "cls", *(each.name for each in tree.body if isinstance(each, ast.ClassDef))}
    for node in nodes:
        if isinstance(node, ast.Attribute) and not _is_of(own, node) and _is_private(node.attr):
            yield node.attr
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ACCESSORS:
            texts = (each.value for each in node.args if isinstance(each, ast.Constant))
            yield from (text for text in texts if isinstance(text, str) and _is_private(text))


def _is_of(own: set[str], node: ast.Attribute) -> bool:
    """Return whether an attribute is that of one of these names, or of `super()`."""
    owner = node.value
    if isinstance(owner, ast.Call):
        return getattr(owner.func, "id", "") == "super"
    return isinstance(owner, ast.Name) and owner.id in own


def _inherited(nodes: Sequence[ast.AST], file: Path) -> Iterator[str]:
    """Yield the private names of libraries' classes that subclasses use, or define again."""
    module = importlib.import_module(".".join(file.with_suffix("").parts))
    for node in nodes:
        kind = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
        if inspect.isclass(kind):
            private = {name for name in _own_names(node) if _is_private(name)}
            yield from private & _names_of_libraries(kind) if private else ()


def _names_of_libraries(kind: type) -> set[str]:
    bases = (base for base in kind.__mro__ if not base.__module__.startswith(PACKAGE))
    return {name for base in bases for name in names_of(base)}


@cache
def names_of(kind: type) -> frozenset[str]:
    """Return the names of a class without its bases: attributes, methods, and what it assigns."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError):  # written in C
        return frozenset(vars(kind))
    return frozenset({*vars(kind), *_own_names(tree)})


def _own_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a class defines, and those that it uses of itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and _is_of({"self", "cls"}, node):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def described(path: str) -> str | None:
    """Return a name as the libraries define it now, with its parameters if it is a function.

    Args:
        path: module, class if there is one, and name, with dots.

    Returns:
        None: there is no such name.
    """
    owner_path, _, name = path.rpartition(".")
    try:
        owner: object = importlib.import_module(owner_path)
    except ModuleNotFoundError:
        module, _, class_name = owner_path.rpartition(".")
        owner = getattr(importlib.import_module(module), class_name, None)
    value = getattr(owner, name, None)
    if isinstance(value, FunctionType):
        parameters = [each for each in inspect.signature(value).parameters if each != "self"]
        return f"{path}({', '.join(parameters)})"
    names = vars(owner)
    if inspect.isclass(owner):
        names = dict.fromkeys(each for base in owner.__mro__ for each in names_of(base))
    return path if name in names else None
