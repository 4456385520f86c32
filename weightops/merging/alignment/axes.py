"""Which axes of a model's tensors permute together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from weightops.algebra.source import Spec
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.errors import MismatchError
from weightops.merging.alignment.families import FAMILIES, Family
from weightops.support.lazy import nn
from weightops.support.text import first_few

QKV = ("q", "k", "v")
"""The parts of an axis that has queries, keys and values one after another."""


@dataclass(frozen=True)
class Heads:
    """The sizes of one attention.

    Attributes:
        queries: the number of heads.
        values: the number of heads of keys and values, each of which serves several of queries.
        width: the units of a head of queries and keys.
        value_width: the units of a head of values.
        rotary: whether queries and keys keep their order within a head.
    """

    queries: int
    values: int
    width: int
    value_width: int
    rotary: bool

    @property
    def per_value(self) -> int:
        """The number of heads of queries that one of keys and values serves."""
        return self.queries // self.values


@dataclass(frozen=True)
class Axes:
    """The labels of the axes of a model's tensors.

    Attributes:
        labels: tensor -> the label of each axis, None for one that keeps its order.
        sizes: label -> the length of its axes.
        heads: group -> its attention, for the groups whose labels end in ``:q`` and so on.
    """

    labels: Mapping[str, tuple[str | None, ...]]
    sizes: Mapping[str, int]
    heads: Mapping[str, Heads]


def group_of(label: str) -> str:
    """Return the group that a label is of: labels of one group permute together.

    >>> group_of("h.0.heads:q"), group_of("stream")
    ('h.0.heads', 'stream')
    """
    return label.partition(":")[0]


def find_axes(model: Checkpoint, specs: Mapping[str, Spec]) -> Axes:
    """Return which axes of a model permute together.

    Args:
        model: the model.
        specs: its tensors under the names that they have in memory.

    Raises:
        MismatchError: if the table has no entry for such a model, sizes say that it is another, or
            nothing says how many heads it has.
    """
    module = model.skeleton
    known = specs.keys() | (module.state_dict().keys() if module is not None else set())
    family, labels = _find_family(model.ref, specs, known)
    sizes: dict[str, int] = {}
    for name, of_axes in labels.items():
        for label, size in zip(of_axes, specs[name].shape, strict=True):
            if label is not None and sizes.setdefault(label, size) != size:
                raise MismatchError(
                    f"{model.ref}: an axis of {name} has {size} units, and others of its kind "
                    f"{sizes[label]}: this model isn't aligned"
                )
    heads = {}
    for name, of_axes in labels.items():
        for label in filter(None, of_axes):
            group = group_of(label)
            if group != label and group not in heads:
                count = _head_count(module, name, model.ref)
                heads[group] = _heads(group, count, sizes, family.rotary, f"{model.ref}: {name}")
    return Axes(labels, sizes, heads)


def _find_family(
    ref: str, specs: Mapping[str, Spec], known: Set[str]
) -> tuple[Family, dict[str, tuple[str | None, ...]]]:
    """Return the family all of whose names a model has, and the labels of the axes."""
    nearest: tuple[int, str, list[str]] | None = None
    for title, family in FAMILIES.items():
        rows = _rows(family, known)
        outputs = _outputs(family, known)
        found = {name: _labels(name, spec, rows, outputs) for name, spec in specs.items()}
        lacking = [name for name, labels in found.items() if labels is None]
        if not lacking:
            return family, {name: labels for name, labels in found.items() if labels is not None}
        if nearest is None or len(lacking) < nearest[0]:
            nearest = len(lacking), title, lacking
    assert nearest is not None
    like = f"; the nearest is {nearest[1]}" if nearest[0] < len(specs) else ""
    raise MismatchError(
        f"{ref} can't be aligned: nothing says which axes of {first_few(nearest[2])} permute{like}",
        hint=f"models that can be are {'; '.join(FAMILIES)}",
    )


_Row = tuple["re.Pattern[str]", tuple["re.Pattern[str]", ...], str]


def _rows(family: Family, names: Set[str]) -> list[_Row]:
    """Return the pattern of each line, those of a name as far as each number, and the labels."""
    lines = family.lines if isinstance(family.lines, str) else family.lines(_bare(family, names))
    rows = []
    for line in lines.splitlines():
        pattern, sign, labels = line.partition("=")
        if sign:
            parts = pattern.strip().split("#")
            starts = tuple(
                re.compile(_regex("#".join(parts[:i]) + "#", family.prefix))
                for i in range(1, len(parts))
            )
            rows.append((re.compile(_regex(pattern.strip(), family.prefix)), starts, labels))
    return rows


def _bare(family: Family, names: Iterable[str]) -> set[str]:
    """Return names with the family's prefix as the table writes it, and without."""
    prefix = re.compile(_regex("~", family.prefix))
    return {form for name in names for form in (name, "~" + prefix.sub("", name, count=1))}


def _regex(pattern: str, prefix: str) -> str:
    text = pattern.replace(".", r"\.").replace("#", r"\d+").replace("*", ".*")
    return text.replace("~", f"(?:{prefix.replace('(', '(?:')}\\.)?" if prefix else "")


def _outputs(family: Family, names: Set[str]) -> set[str]:
    """Return the labels of axes that are outputs of the model: nothing in it reads them."""
    return {
        label
        for label, patterns in family.read_by.items()
        for pattern in patterns
        if not any(re.fullmatch(_regex(pattern, family.prefix), name) for name in names)
    }


def _labels(
    name: str, spec: Spec, rows: Iterable[_Row], fixed: Set[str]
) -> tuple[str | None, ...] | None:
    """Return the label of each axis of a tensor; None if no line is for it."""
    for pattern, starts, labels in rows:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        found: list[str | None] = []
        for label in labels.split()[: len(spec.shape)]:
            text = match.expand(label)
            local = text.count("#")
            if local:
                start = starts[local - 1].match(name)
                assert start is not None
                text = f"{start[0]}.{text.replace('#', '')}"
            found.append(None if text == "." or text in fixed else text)
        return (*found, *[None] * (len(spec.shape) - len(found)))
    return None


def _head_count(module: nn.Module | None, name: str, ref: str) -> int:
    """Return the number of heads of the attention that a tensor is of."""
    path = name.split(".")
    while module is not None and path:
        path.pop()
        try:
            part: Any = module.get_submodule(".".join(path))
        except AttributeError:
            continue
        for holder in (part, getattr(part, "config", None)):
            for attribute in ("num_heads", "num_attention_heads", "n_heads"):
                count = getattr(holder, attribute, None)
                if isinstance(count, int):
                    return count
    raise MismatchError(
        f"nothing says how many heads the attention of {ref} has, which permute: {name}",
        hint="name a folder with a configuration beside the weights, or in Python the module",
    )


def _heads(group: str, count: int, sizes: Mapping[str, int], rotary: bool, what: str) -> Heads:
    """Return the sizes of one attention, from the lengths of its axes."""
    packed = sizes.get(f"{group}:qkv", 0)
    rows = {part: sizes.get(f"{group}:{part}", packed // 3) for part in QKV}
    out = sizes.get(f"{group}:o", 0)
    width, value_width = rows["q"] // count, out // count
    if width and value_width:
        values = rows["v"] // value_width
        whole = (count * width, values * width, values * value_width, count * value_width)
        if values and whole == (rows["q"], rows["k"], rows["v"], out) and count % values == 0:
            return Heads(count, values, width, value_width, rotary)
    raise MismatchError(
        f"{what}: queries, keys, values and outputs of {rows['q']}, {rows['k']}, {rows['v']} and "
        f"{out} units aren't those of {count} heads"
    )
