"""Read the signatures of verbs from their source, without importing what they import.

A verb's function says all there is to say about an option: its name, type, choices, range,
default and text. Help must be quick, and importing the function would import torch; so its source
is parsed.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from weightops.support import docstrings
from weightops.support.docstrings import Docstring

_PACKAGE = Path(__file__).parent.parent
_NAMED = {
    "str",
    "int",
    "float",
    "bool",
    "Path",
    "TaskLike",
    "TaskList",
    "BatchNorm",
    "CheckpointLike",
    "Finetuned",
    "SearchOptions",
    "TrainingConfig",
    "Overwrite",
}
"""Types that the command line knows by name; other names are aliases, which are resolved."""

REQUIRED = object()
"""The default of a parameter that has none."""


class Expression(str):
    """The source of a default that isn't a literal, such as a call."""


@dataclass(frozen=True)
class Kind:
    """The type of a parameter, as far as the command line needs it.

    Attributes:
        name: one of the types that the command line knows, or "" for others.
        many: several values are taken.
        choices: the values that there are, of a Literal.
        range: arguments of the `Range` that annotates it.
    """

    name: str
    many: bool = False
    choices: tuple[str, ...] = ()
    range: tuple[tuple[str, float | bool], ...] | None = None


@dataclass(frozen=True)
class Parameter:
    """One parameter of a function, or one field of a dataclass.

    Attributes:
        name: its name in Python.
        kind: its type.
        default: a literal, an `Expression`, or `REQUIRED`.
        text: its description in the docstring.
        positional: it is taken by position.
    """

    name: str
    kind: Kind
    default: Any
    text: str
    positional: bool


@dataclass(frozen=True)
class Signature:
    """The signature of a function or dataclass, with its docstring."""

    parameters: tuple[Parameter, ...]
    docstring: Docstring


@lru_cache
def read(reference: str) -> Signature:
    """Read the signature of ``module:function``, ``module:Class.method`` or ``module:Dataclass``.

    Descriptions that a function lacks are those of the class that `describe_arguments_as` names.
    """
    module, _, path = reference.partition(":")
    node: Any = None
    for name in path.split("."):
        body = _top_level(module) if node is None else _definitions(node.body)
        node = body[name]
    docstring = docstrings.parse(ast.get_docstring(node))
    texts = {**_shared_texts(node, module), **docstring.arguments}
    if isinstance(node, ast.ClassDef):
        return Signature(tuple(_fields(node, module, texts)), docstring)
    return Signature(tuple(_parameters(node, module, texts)), docstring)


def _shared_texts(node: Any, module: str) -> dict[str, str]:
    """Return the descriptions of the class that a decorator of the function names."""
    texts: dict[str, str] = {}
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and _name(decorator.func) == "describe_arguments_as":
            source, _ = _resolve(_name(decorator.args[0]), module)
            texts |= docstrings.parse(ast.get_docstring(source)).arguments
    return texts


def _parameters(node: ast.FunctionDef, module: str, texts: dict[str, str]) -> list[Parameter]:
    arguments = node.args
    positional = [a for a in (*arguments.posonlyargs, *arguments.args) if a.arg != "self"]
    missing = [None] * (len(positional) - len(arguments.defaults))
    defaults = [*missing, *arguments.defaults, *arguments.kw_defaults]
    return [
        Parameter(
            argument.arg,
            _kind(argument.annotation, module),
            _default(default, module),
            texts.get(argument.arg, ""),
            positional=i < len(positional),
        )
        for i, (argument, default) in enumerate(
            zip((*positional, *arguments.kwonlyargs), defaults, strict=True)
        )
    ]


def _fields(node: ast.ClassDef, module: str, texts: dict[str, str]) -> list[Parameter]:
    return [
        Parameter(
            item.target.id,
            _kind(item.annotation, module),
            _default(item.value, module),
            texts.get(item.target.id, ""),
            positional=False,
        )
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]


def _default(node: ast.expr | None, module: str) -> Any:
    """Return a default: its value where it is a literal or the name of one."""
    if node is None:
        return REQUIRED
    if isinstance(node, ast.Name):
        found, where = _resolve(node.id, module)
        if isinstance(found, (ast.Assign, ast.AnnAssign)) and found.value is not None:
            return _default(found.value, where)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Expression(ast.unparse(node))


def _kind(node: ast.expr | None, module: str) -> Kind:
    """Return the kind that an annotation stands for."""
    if isinstance(node, ast.BinOp):
        several = [_kind(side, module) for side in (node.left, node.right) if not _is_none(side)]
        named = [kind for kind in several if kind.name or kind.choices]
        return named[-1] if named else Kind("")
    if isinstance(node, ast.Subscript):
        return _subscripted(node, module)
    if isinstance(node, ast.Name):
        if node.id in _NAMED:
            return Kind(node.id)
        alias, where = _resolve(node.id, module)
        return _kind(alias.value, where) if isinstance(alias, ast.Assign) else Kind("")
    return Kind("")


def _subscripted(node: ast.Subscript, module: str) -> Kind:
    of, inner = _name(node.value), node.slice
    items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if of == "Literal":
        return Kind("str", choices=tuple(ast.literal_eval(item) for item in items))
    if of == "Annotated":
        bounds = next(item for item in items[1:] if isinstance(item, ast.Call))
        names = ("min", "max", "min_open", "max_open")
        given = dict(zip(names, map(ast.literal_eval, bounds.args), strict=False))
        given |= {str(k.arg): ast.literal_eval(k.value) for k in bounds.keywords}
        return replace(_kind(items[0], module), range=tuple(given.items()))
    if of in ("tuple", "list", "Sequence", "Iterable"):
        return replace(_kind(items[0], module), many=True)
    return Kind("")


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


@lru_cache
def _top_level(module: str) -> dict[str, Any]:
    """Return the top-level definitions of a module of weightops, by name."""
    file = _PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return _definitions(ast.parse(file.read_text(encoding="utf-8")).body)


def _definitions(body: list[ast.stmt]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return found


def _resolve(name: str, module: str) -> tuple[Any, str]:
    """Return the definition of a name that a module has or imports, and where it is."""
    found = _top_level(module).get(name)
    while isinstance(found, tuple):
        module, name = found
        if not module.startswith("weightops."):
            return None, module
        found = _top_level(module).get(name)
    return found, module


def names_in(reference: str) -> list[str]:
    """Return the names in a registry: those of its built-in table, and of plug-ins.

    Args:
        reference: ``module:REGISTRY``.
    """
    module, _, name = reference.partition(":")
    call = _top_level(module)[name].value
    group, table = ast.literal_eval(call.args[1]), call.args[2]
    return list(dict.fromkeys([*map(ast.literal_eval, table.keys), *plugin_names(group)]))


def plugin_names(group: str) -> list[str]:
    """Return the names that other packages add to a registry, without loading any."""
    from importlib.metadata import entry_points

    return [point.name for point in entry_points(group=f"weightops.{group}")]
