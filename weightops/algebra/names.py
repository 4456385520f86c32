"""Tensor names: patterns that select them, and how two sets of them differ."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from weightops.errors import MismatchError, OptionError
from weightops.support.registry import unknown
from weightops.support.text import first_few


def escape(name: str) -> str:
    """The pattern that matches just this name."""
    return re.sub(r"([*?[])", r"[\1]", name)


def finite(value: float) -> float:
    """A coefficient as a float.

    Raises:
        OptionError: if it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise OptionError(f"a coefficient must be a finite number, not {value}")
    return float(value)


@lru_cache(maxsize=65536)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


@dataclass(frozen=True)
class NameRules:
    """A number for each tensor name, by shell patterns: the first that matches counts, 0 where none does.

    >>> rules = Rules.of({"visual.ln_*": 0.5, "visual.*": 1.0})
    >>> rules("visual.ln_pre.weight"), rules("visual.proj"), rules("ln_final.bias")
    (0.5, 1.0, 0.0)
    """

    items: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, patterns: Mapping[str, float]) -> NameRules:
        """The rules of a mapping ``{pattern: number}``, in its order."""
        return cls(tuple((pattern, finite(value)) for pattern, value in patterns.items()))

    @classmethod
    def exactly(cls, names: Iterable[str]) -> NameRules:
        """1 at the given names, whatever characters they have, and 0 elsewhere."""
        return cls(tuple((escape(name), 1.0) for name in names))

    @cached_property
    def _names(self) -> dict[str, float] | None:
        """The items as a table, if none of them is a pattern."""
        return (
            None
            if any(set("*?[") & set(pattern) for pattern, _ in self.items)
            else dict(reversed(self.items))
        )

    def __call__(self, name: str) -> float:
        if self._names is not None:
            return self._names.get(name, 0.0)
        for pattern, value in self.items:
            if pattern == name or _compiled(pattern).match(name):
                return value
        return 0.0

    def check(self, names: Iterable[str]) -> None:
        """Refuse a pattern that matches none of ``names``: it is most likely a slip.

        Raises:
            UnknownNameError: naming the pattern.
        """
        names = list(names)
        for pattern, _ in self.items:
            if pattern not in names and not any(map(_compiled(pattern).match, names)):
                raise unknown("tensor that matches", pattern, names)


PerTensor = Any
"""A value for all tensors, a mapping of name patterns to settings (the first that matches counts), or a list of numbers that
are spread evenly over the depth of the layers and interpolated (see `depths`)."""


class Each(tuple[Any, ...]):
    """A setting for each input of a merge, where one for all won't do."""


class Layer(NamedTuple):
    """A name cut at its first number: what comes before, the number, what comes after; dots included."""

    before: str
    number: int
    after: str


def layer_of(name: str) -> Layer | None:
    """Where in a tower of layers a tensor is; None if its name has no number.

    >>> layer_of("visual.blocks.3.mlp.weight")
    Layer(before='visual.blocks.', number=3, after='.mlp.weight')
    """
    found = re.fullmatch(r"(.*?(?:^|\.))(\d+)(\..*|$)", name)
    return Layer(found[1], int(found[2]), found[3]) if found else None


_FIRST = re.compile(r"embed|conv1|patch|ln_pre|pre_layrnorm|cls_token|wte|wpe")


def depths(names: Iterable[str]) -> dict[str, float]:
    """How deep in its tower each tensor lies, from 0 in its first layer to 1 in its last: by the first number in its name.

    Of those without a number, embeddings are at 0 and all else, such as a head, at 1.

    >>> depths(["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "head.weight"])
    {'embed.weight': 0.0, 'layers.0.w': 0.0, 'layers.1.w': 0.5, 'layers.2.w': 1.0, 'head.weight': 1.0}
    """
    found = {name: layer_of(name) for name in names}
    towers: dict[str, list[int]] = defaultdict(list)
    for place in filter(None, found.values()):
        towers[place.before].append(place.number)
    first, last = ({tower: end(numbers) for tower, numbers in towers.items()} for end in (min, max))

    def depth(name: str, place: Layer | None) -> float:
        if place is None:
            return float(not _FIRST.search(name))
        length = last[place.before] - first[place.before]
        return (place.number - first[place.before]) / length if length else 1.0

    return {name: depth(name, place) for name, place in found.items()}


def value_at(setting: PerTensor, name: str, depth: float, default: Any) -> Any:
    """The value of a setting at a tensor; the default where no pattern matches.

    >>> setting_at({"*.mlp.*": [0.2, 0.4], "*": 1.0}, "layers.1.mlp.w", 0.5, None)
    0.30000000000000004
    """
    if isinstance(setting, Each):
        return Each(value_at(value, name, depth, default) for value in setting)
    if isinstance(setting, Mapping):
        matching = (
            value
            for pattern, value in setting.items()
            if pattern == name or _compiled(pattern).match(name)
        )
        return value_at(next(matching, default), name, depth, default)
    if isinstance(setting, (list, tuple)):
        place = depth * (len(setting) - 1)
        low = min(int(place), len(setting) - 2) if len(setting) > 1 else 0
        high = min(low + 1, len(setting) - 1)
        return (1 - (place - low)) * setting[low] + (place - low) * setting[high]
    return setting


def check_per_tensor(setting: PerTensor, names: Iterable[str], what: str) -> None:
    """Refuse a setting with a pattern that matches no tensor, or a list that isn't of numbers.

    Raises:
        UnknownNameError: naming the pattern.
        OptionError: for a list with anything but finite numbers.
    """
    if isinstance(setting, Each):
        for value in setting:
            check_per_tensor(value, names, what)
    elif isinstance(setting, Mapping):
        names = list(names)
        for pattern, value in setting.items():
            if (
                pattern != "*"
                and pattern not in names
                and not any(map(_compiled(pattern).match, names))
            ):
                raise unknown("tensor that matches", pattern, names)
            check_per_tensor(value, names, what)
    elif isinstance(setting, (list, tuple)) and not (
        setting
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in setting)
    ):
        raise OptionError(
            f"{what} over the depth of the layers is a list of numbers, not {setting}"
        )


def mismatch(what: str, differences: Mapping[str, list[str]], remedy: str) -> MismatchError:
    """One error for all the ways in which names, shapes and dtypes differ."""
    lines = [
        f"  {len(items)} {kind}: {first_few(items)}" for kind, items in differences.items() if items
    ]
    return MismatchError("\n".join([f"{what} don't match", *lines, f"  {remedy}"]))
