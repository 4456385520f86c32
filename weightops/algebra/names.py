"""Values by tensor name: by patterns of names, and by depth in the layers."""

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
    """Return the pattern that matches only this name."""
    return re.sub(r"([*?[])", r"[\1]", name)


def finite(value: Any) -> float:
    """Return a coefficient as a float.

    Raises:
        OptionError: if it is NaN, infinite, or no number.
    """
    try:
        number = float("nan") if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # None; several; 10**400
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(
            f"a coefficient must be a finite number, not {value!r}",
            hint="for several, edit once for each: [tau.apply(base, a) for a in alphas]",
        )
    return number


@lru_cache(maxsize=65536)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def matches(pattern: str, name: str) -> bool:
    """Return whether a shell pattern matches a whole name."""
    return pattern == name or _compiled(pattern).match(name) is not None


def _check_pattern(pattern: str, names: Iterable[str]) -> None:
    """Raise UnknownNameError for a pattern that matches none of the names: most likely a slip."""
    if not any(matches(pattern, name) for name in names):
        raise unknown("tensor that matches", pattern, names)


@dataclass(frozen=True)
class NameRules:
    """A number for each tensor name, by shell patterns: of the first that matches, or else 0.

    >>> rules = NameRules.of({"visual.ln_*": 0.5, "visual.*": 1.0})
    >>> rules("visual.ln_pre.weight"), rules("visual.proj"), rules("ln_final.bias")
    (0.5, 1.0, 0.0)
    """

    items: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, patterns: Mapping[str, float]) -> NameRules:
        """Return the rules of a mapping ``{pattern: number}``, in its order."""
        return cls(tuple((pattern, finite(value)) for pattern, value in patterns.items()))

    @classmethod
    def exactly(cls, names: Iterable[str]) -> NameRules:
        """Return rules that give 1 for the names, with any characters in them, and 0 for others."""
        return cls(tuple((escape(name), 1.0) for name in names))

    @cached_property
    def _by_name(self) -> dict[str, float] | None:
        """The items as a table; None if one of them is a pattern."""
        if any(set("*?[") & set(pattern) for pattern, _ in self.items):
            return None
        return dict(reversed(self.items))

    def __call__(self, name: str) -> float:
        if self._by_name is not None:
            return self._by_name.get(name, 0.0)
        return next((value for pattern, value in self.items if matches(pattern, name)), 0.0)

    def check(self, names: Iterable[str]) -> None:
        """Check that each pattern matches a name.

        Raises:
            UnknownNameError: naming the first pattern that matches no name.
        """
        names = dict.fromkeys(names)
        for pattern, _ in self.items:
            if pattern not in names:
                _check_pattern(pattern, names)


PerTensor = Any
"""A value for all tensors; or a mapping of name patterns to values, the first that matches counts;
or a list of numbers that are spread evenly over the depth of the layers (see `depths`), with linear
interpolation between them, or a list of truth values or words, each up to the next; or
``{"lines": [...]}``, a list whose first value is that of all tensors outside of the layers, too, as
in LiNeS (arXiv 2410.17146)."""

_LINES = "lines"


class Each(tuple[Any, ...]):
    """A `PerTensor` for each input of a merge, where the inputs have different ones."""


class Layer(NamedTuple):
    """A name, cut at its first number: the text before, the number, and the text after."""

    before: str
    number: int
    after: str


def layer_of(name: str) -> Layer | None:
    """Return the layer that a tensor belongs to; None if its name has no number.

    >>> layer_of("visual.blocks.3.mlp.weight")
    Layer(before='visual.blocks.', number=3, after='.mlp.weight')
    """
    match = re.fullmatch(r"(.*?(?:^|\.))(\d+)(\..*|$)", name)
    return Layer(match[1], int(match[2]), match[3]) if match else None


_EMBEDDING = re.compile(r"embed|conv1|patch|ln_pre|pre_layrnorm|cls_token|wte|wpe")


def depths(names: Iterable[str]) -> dict[str, float]:
    """Return the depth of each tensor in its tower: 0 in the first layer, 1 in the last.

    Layers are numbered by the first number in a name. Of the names without a number, embeddings
    have depth 0, and all others, such as a head, have depth 1.

    >>> depths(["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w"])
    {'embed.weight': 0.0, 'layers.0.w': 0.0, 'layers.1.w': 0.5, 'layers.2.w': 1.0}
    """
    layers = {name: layer_of(name) for name in names}
    towers: dict[str, list[int]] = defaultdict(list)
    for layer in filter(None, layers.values()):
        towers[layer.before].append(layer.number)
    first = {tower: min(numbers) for tower, numbers in towers.items()}
    last = {tower: max(numbers) for tower, numbers in towers.items()}

    def depth(name: str, layer: Layer | None) -> float:
        if layer is None:
            return float(not _EMBEDDING.search(name))
        length = last[layer.before] - first[layer.before]
        return (layer.number - first[layer.before]) / length if length else 1.0

    return {name: depth(name, layer) for name, layer in layers.items()}


_NORM = re.compile(r"norm|ln_")


def in_order(names: Iterable[str]) -> list[str]:
    """Return names in the order in which a model uses them: embeddings, layers by number, the rest.

    Files keep any order. Norms come after what they are beside: `ln_pre` after the embeddings.

    >>> in_order(["head", "ln_post", "layers.10.w", "layers.2.w", "ln_pre", "conv1"])
    ['conv1', 'ln_pre', 'layers.2.w', 'layers.10.w', 'ln_post', 'head']
    """
    names = list(names)
    layers = {name: layer_of(name) for name in names}
    towers = list(dict.fromkeys(layer.before for layer in layers.values() if layer))

    def place(name: str) -> tuple[int, int, int, bool]:
        layer = layers[name]
        if layer is not None:
            return 1, towers.index(layer.before), layer.number, False
        is_first, is_norm = bool(_EMBEDDING.search(name)), bool(_NORM.search(name))
        return 0 if is_first else 2, 0, 0, is_norm == is_first

    return sorted(names, key=place)


def value_at(value: PerTensor, name: str, depth: float, default: Any) -> Any:
    """Return the value at one tensor; the default if no pattern matches its name.

    >>> value_at({"*.mlp.*": [0.2, 0.4], "*": 1.0}, "layers.1.mlp.w", 0.5, None)
    0.30000000000000004
    >>> value_at({"lines": [0.1, 0.5]}, "head.weight", 1.0, None)
    0.1
    >>> value_at([True, False], "layers.1.mlp.w", 0.5, None)
    True
    """
    if isinstance(value, Each):
        return Each(value_at(item, name, depth, default) for item in value)
    if is_lines(value):
        return value_at(value[_LINES], name, depth if layer_of(name) else 0.0, default)
    if isinstance(value, Mapping):
        matching = (item for pattern, item in value.items() if matches(pattern, name))
        return value_at(next(matching, default), name, depth, default)
    if isinstance(value, (list, tuple)):
        place = depth * (len(value) - 1)
        if isinstance(value[0], (bool, str)):
            return value[int(place)]
        low = min(int(place), len(value) - 2) if len(value) > 1 else 0
        high = min(low + 1, len(value) - 1)
        return (1 - (place - low)) * value[low] + (place - low) * value[high]
    return value


def is_lines(value: PerTensor) -> bool:
    """Return True for ``{"lines": [...]}``."""
    return (
        isinstance(value, Mapping)
        and [*value] == [_LINES]
        and isinstance(value[_LINES], (list, tuple))
    )


def check_per_tensor(
    value: PerTensor, names: Iterable[str], label: str, *, words: bool = False
) -> None:
    """Check that each pattern of a value matches a name, and that lists hold numbers, or words.

    Raises:
        UnknownNameError: naming the first pattern that matches no name.
        OptionError: for a list with anything else, or an infinite number, named by its ``label``.
    """
    if isinstance(value, Each):
        for item in value:
            check_per_tensor(item, names, label, words=words)
    elif is_lines(value):
        check_per_tensor(value[_LINES], names, label, words=words)
    elif isinstance(value, Mapping):
        names = dict.fromkeys(names)
        for pattern, item in value.items():
            if pattern != "*" and pattern not in names:
                _check_pattern(pattern, names)
            check_per_tensor(item, names, label, words=words)
    elif isinstance(value, (list, tuple)) and not (
        (words and value and all(isinstance(item, str) for item in value))
        or (value and all(isinstance(item, (int, float)) and math.isfinite(item) for item in value))
    ):
        raise OptionError(f"{label} over the depth of the layers is a list of numbers, not {value}")


def mismatch(subjects: str, differences: Mapping[str, list[str]], hint: str) -> MismatchError:
    """Return one error for all differences: kind of difference -> the tensors that differ so."""
    lines = [
        f"  {len(items)} {kind}: {first_few(items)}" for kind, items in differences.items() if items
    ]
    return MismatchError("\n".join([f"{subjects} don't match", *lines]), hint=hint)


def hint_of_part(names: Iterable[str], others: Iterable[str]) -> str:
    """Return how to open the part of other names below which all of some names are, or ""."""
    listed, held = list(names), set(others)
    parts = dict.fromkeys(name.partition(".")[0] for name in others)
    part = next((p for p in parts if all(f"{p}.{name}" in held for name in listed)), None)
    if not part or not listed:
        return ""
    return (
        f"one has the other's tensors below {part!r}: FILE:{part} opens them, or FILE:KEY.{part} "
        "if they are under a key of a torch file"
    )
