"""YAML files, written plainly, and read strictly: no key twice, nothing that grows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from weightops.errors import RecipeError

_MAX_BYTES = 4_000_000
_MAX_DEPTH = 50
_EXPANSION = 16
"""The most values for each byte of a file, aliases written out."""


def read_documents(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> list[Any]:
    """Read the documents of a YAML file as plain values; empty ones are left out.

    Args:
        path: the file.
        loader: the kind of safe loader that makes the values.

    Raises:
        RecipeError: if it can't be read, isn't valid, repeats a key, or says more by aliases or
            nesting than a file of its size may.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise RecipeError(f"{path} has more than {_MAX_BYTES:,} characters")
        reading = loader(text)
        documents = []
        try:
            while reading.check_node():
                root = reading.get_node()
                _count(root, path, _EXPANSION * len(text) + 1000)
                documents.append(reading.construct_document(root))
        finally:
            reading.dispose()
    except OSError as error:
        raise RecipeError(f"{path} can't be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise RecipeError(f"{path} is not valid YAML{_reason(error)}") from error
    return [document for document in documents if document is not None]


def yaml_text(value: Any) -> str:
    """Return a value as YAML, keys in their order."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text


def run_yaml(verb: str, options: Mapping[str, Any], remarks: Iterable[str] = ()) -> str:
    """Return what a run was asked to do, as YAML that ``--config`` of its command reads.

    Args:
        verb: the command.
        options: its options.
        remarks: lines to add as comments.

    >>> print(run_yaml("patch", {"task": ["mnist"]}), end="")
    # weightops patch --config run.yaml
    verb: patch
    task: [mnist]
    """
    lines = [f"# weightops {verb} --config run.yaml", *(f"# {remark}" for remark in remarks)]
    body: str = yaml.safe_dump(
        {"verb": verb, **options},
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=100,
    )
    return "\n".join([*lines, body])


def _reason(error: Exception) -> str:
    """Return what an error of YAML is about, with its line where that is known."""
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return f": {' '.join(str(error).split())[:300]}"
    start = error.context_mark
    apart = error.context and start is not None and start.line != mark.line
    context = f", {error.context} that begins in line {start.line + 1}" if apart else ""
    return f", in line {mark.line + 1}: {error.problem}{context}"[:300]


def _count(root: yaml.Node, path: Path, limit: int) -> None:
    """Check keys, depth and number of values of a document, an alias counted like what it names."""
    measured: dict[yaml.Node, tuple[int, int]] = {}
    """Node -> the number of its values and their depth; 0 and 0 while they are being counted."""

    def measure(node: yaml.Node) -> tuple[int, int]:
        line = node.start_mark.line + 1
        if node not in measured:
            measured[node] = (0, 0)
            inner = [measure(child) for child in _children(node, path)]
            values = 1 + sum(number for number, _ in inner)
            depth = 1 + max((depth for _, depth in inner), default=0)
            if depth > _MAX_DEPTH:
                raise RecipeError(f"{path} is nested more than {_MAX_DEPTH} deep in line {line}")
            if values > limit:
                raise RecipeError(f"{path} repeats values by aliases too often, in line {line}")
            measured[node] = (values, depth)
        if measured[node] == (0, 0):
            raise RecipeError(f"{path} holds a value that holds itself in line {line}")
        return measured[node]

    measure(root)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_LONGEST_NUMBER = 100
"""The most characters of a number; to read very long ones of some forms takes very long."""


def _children(node: yaml.Node, path: Path) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    line = key.start_mark.line + 1
                    raise RecipeError(f"{path} repeats the key {key.value[:80]!r} in line {line}")
                seen.add((key.tag, key.value))
        return [part for pair in node.value for part in pair]
    if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
        line = node.start_mark.line + 1
        raise RecipeError(f"{path} has a number of {len(node.value)} characters in line {line}")
    return node.value if isinstance(node, yaml.SequenceNode) else []
