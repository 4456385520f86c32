"""What a merge method is: a function whose signature is its schema, and the lazy source that runs it."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, reduce
from hashlib import sha256
from numbers import Real
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import torch

from weightops.dtypes import accumulator, is_editable
from weightops.engine.reduce import products
from weightops.engine.run import Segment, Step, alone, combined, plan, reader, through
from weightops.errors import MismatchError, OptionError, SpaceError, UnknownNameError, WeightopsError
from weightops.expression import ComputedSource, LinearForm, Source, Space, provenance, ties
from weightops.kernels import CHUNK, Scratch, has_nonfinite
from weightops.keys import Each, Setting, check_setting, depths, setting_at, some
from weightops.methods.parts import Parts, Vector
from weightops.registry import unknown

F = TypeVar("F", bound=Callable[..., Any])
Kind = Literal["whole", "chunks", "combination"]


def combination(space: Space) -> Callable[[F], F]:
    """Mark a function that gives the coefficients of a linear combination of the inputs, which are weights or deltas.

    It takes some of ``gram`` (the inputs' inner products at the tensor, float64, shape ``(k, k)``) and ``weights``
    (shape ``(k,)``), and gives shape ``(k,)``.
    """
    return _marked("combination", space=space)


def chunks(*statistics: Callable[..., Any], by_rows: bool = False) -> Callable[[F], F]:
    """Mark a function that computes each element from the inputs at that element, and from statistics.

    It takes and gives parts of the flat tensor, ``(k, n)`` to ``(n,)``, or with ``by_rows`` whole rows, ``(k, rows, width)`` to
    ``(rows, width)``, may overwrite what it takes, and may ask for ``start``, the part's place.

    Args:
        statistics: functions of `Parts`, and of any of the options, weights and statistics before them, whose results the function gets
            under their names.
        by_rows: don't cut rows.
    """
    return _marked("chunks", statistics=statistics, by_rows=by_rows)


def _marked(kind: Kind, **marks: Any) -> Callable[[F], F]:
    def mark(function: F) -> F:
        function.__dict__.update(marks, kind=kind)
        return function

    return mark


@dataclass(frozen=True)
class Option:
    """One option of a method: its type, its default, and its choices where it has them."""

    type: type
    default: Any
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Method:
    """A merge method, read off its function.

    The function takes the inputs' tensors of one name, stacked in float32 (float64 for float64) with shape ``(k, ...)``:
    as ``deltas``, differences from the base, and then gives a delta; or as ``models``, weights, and then gives weights.
    It may also take ``weights`` (a tensor of shape ``(k,)``) and, in `chunks`, ``draws`` (see `Draws`). All its
    keyword-only parameters are options. Functions marked by `chunks` or `combination` need never hold a whole tensor.
    """

    name: str
    function: Callable[..., torch.Tensor]

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def kind(self) -> Kind:
        """What the function gives: a whole tensor, parts of it, or the coefficients of a combination."""
        kind: Kind = getattr(self.function, "kind", "whole")
        return kind

    @property
    def space(self) -> Space:
        """Whether it works on weights or on deltas: differences from a base."""
        space: Space | None = getattr(self.function, "space", None)
        return space or ("delta" if next(iter(self._parameters)) == "deltas" else "weights")

    def works_on(self, space: Space) -> bool:
        """Combinations of weights are combinations of deltas too."""
        return space == self.space or (self.kind == "combination" and space == "delta")

    @property
    def fixed(self) -> bool:
        """True for combinations whose coefficients don't depend on the tensors."""
        return self.kind == "combination" and "gram" not in self._parameters

    def takes(self, argument: str) -> bool:
        """True if the function, or a statistic that it asks for, has a parameter of this name."""
        asked = [self.function, *self.function.__dict__.get("statistics", ())]
        return any(argument in inspect.signature(function).parameters for function in asked)

    @cached_property
    def options(self) -> dict[str, Option]:
        """Name -> type, default and choices."""
        hints = get_type_hints(self.function)
        options = {}
        for name, parameter in self._parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                choices = get_args(hints[name])
                options[name] = Option(type(parameter.default) if choices else hints[name], parameter.default, choices)
        return options

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def check(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with defaults filled in.

        Raises:
            UnknownNameError: for an option that it hasn't, or a choice that isn't one, with the nearest.
            OptionError: for a value of another type.
        """
        for name in options:
            if name not in self.options:
                raise unknown(f"option of {self.name}", name, self.options)
        checked = {name: self._checked(name, value) for name, value in options.items()}
        return {name: checked.get(name, option.default) for name, option in self.options.items()}

    def _checked(self, name: str, value: Setting) -> Setting:
        """An option's value, or each within a setting, as a number of its type."""
        option = self.options[name]
        if isinstance(value, Mapping):
            return {pattern: self._checked(name, inner) for pattern, inner in value.items()}
        if isinstance(value, Each):
            return Each(self._checked(name, inner) for inner in value)
        if isinstance(value, (list, tuple)) and option.type is float:
            return [self._checked(name, inner) for inner in value]
        if option.choices:
            if value not in option.choices:
                raise UnknownNameError(
                    f"{name} of {self.name} is {' or '.join(map(repr, option.choices))}, not {value!r}"
                )
            return value
        if option.type not in (bool, int, float):
            return value
        if option.type is bool:
            sound = isinstance(value, bool)
        else:
            number = isinstance(value, Real) and not isinstance(value, bool)
            sound = number and math.isfinite(value) and (option.type is float or value == int(value))
        if not sound:
            kind = {bool: "true or false", int: "a whole number", float: "a finite number"}[option.type]
            raise OptionError(f"{name} of {self.name} is {kind}, not {value!r}")
        return option.type(value)


def call(function: Callable[..., Any], available: Mapping[str, Any]) -> Any:
    """Call a function with those of the available arguments that it has parameters for."""
    return function(**{name: available[name] for name in _parameters_of(function)})


@cache
def _parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


class MethodSource(ComputedSource):
    """The result of a method on several forms, computed when it is read, in the working precision.

    Args:
        method: what to compute.
        inputs: forms of one kind, deltas or weights, with equal names.
        weights: a number, or a `Setting`, for each input.
        seed: of what is random.
        options: the method's; each may be a `Setting`.
    """

    def __init__(
        self, method: Method, inputs: Sequence[LinearForm], *, weights: Sequence[Setting] | None = None, seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.method, self.inputs, self.seed = method, list(inputs), seed
        self.options = method.check(options or {})
        self.weights = [1.0] * len(self.inputs) if weights is None else list(weights)
        if not self.inputs or len(self.weights) != len(self.inputs):
            raise WeightopsError(
                f"{method.name} needs as many weights as inputs, and one at least: {len(self.weights)} and {len(self.inputs)}"
            )
        first = self.inputs[0]
        self.space = first.space
        if any(form.space != self.space for form in self.inputs) or not method.works_on(self.space):
            raise SpaceError(
                f"{method.name} merges {'task vectors' if method.space == 'delta' else 'weights'}, and was given the other"
            )
        other = next((form for form in self.inputs if form.specs.keys() != first.specs.keys()), None)
        if other is not None and not method.fixed:
            odd = sorted(first.specs.keys() ^ other.specs.keys())
            raise MismatchError(f"{method.name} takes inputs with the same tensors; only some have {some(odd)}")
        if any(weight != 1.0 for weight in self.weights) and not method.takes("weights"):
            raise OptionError(f"{method.name} takes no weights: it finds them itself")
        self.specs = {n: s for n, s in first.specs.items() if all(n in form.specs for form in self.inputs)}
        self.ref = f"{method.name}({', '.join(source.ref for form in self.inputs for source in form.sources)})"
        for name, setting in [("weight", weight) for weight in self.weights] + list(self.options.items()):
            check_setting(setting, self.specs, name)
        self._depths = depths(self.specs)
        self.ties = self._common_ties()
        chosen = {n: s for n, s in self.specs.items() if n not in self.ties and is_editable(s.dtype) and s.numel}
        self._vector = Vector(self._parts, {n: s.numel for n, s in chosen.items()}, len(self.inputs))

    def _common_ties(self) -> dict[str, str]:
        """Alias -> owner, of what is tied in all inputs and has the same settings: these are one tensor of the result, too."""
        tied = [ties(form) for form in self.inputs]
        return {
            alias: owner
            for alias, owner in tied[0].items()
            if all(other.get(alias) == owner for other in tied) and self._at(alias) == self._at(owner)
        }

    def _at(self, name: str) -> dict[str, Any]:
        """Options at a tensor, and weights as a list."""

        def value(setting: Setting, default: Any) -> Any:
            return setting_at(setting, name, self._depths[name], default)

        options = {key: value(setting, self.method.options[key].default) for key, setting in self.options.items()}
        return options | {"weights": [float(value(weight, 1.0)) for weight in self.weights]}

    def as_form(self) -> LinearForm:
        """The result as a form: of the inputs themselves where it is a fixed combination of them, which is one fused pass."""
        settings = [*self.weights, *self.options.values()]
        if not self.method.fixed or any(isinstance(setting, (Mapping, list, tuple)) for setting in settings):
            return LinearForm.of(self)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        coefficients = call(self.method.function, {**self.options, "weights": weights}).tolist()
        first, *rest = self.inputs
        if self.space == "delta":
            scaled = [form.times(c) for form, c in zip(self.inputs, coefficients, strict=True)]
            return reduce(LinearForm.plus, scaled)
        if abs(math.fsum(coefficients) - 1) > 1e-12:
            return LinearForm.of(self)
        shifts = [
            LinearForm.difference(form, first)[0].times(c) for form, c in zip(rest, coefficients[1:], strict=True)
        ]
        return reduce(LinearForm.plus, shifts, first)

    def combination(self, name: str, scratch: Scratch) -> Mapping[Source, float] | None:
        name = self.ties.get(name, name)
        spec, steps = self.specs[name], self._steps(name)
        if not is_editable(spec.dtype) or not spec.numel:
            return steps[0].coefficients
        if self.method.kind != "combination":
            return None
        available = self._at(name)
        available["weights"] = torch.tensor(available["weights"], dtype=torch.float64)
        with self._at_fault(name):
            if not self.method.fixed:
                whole = Segment(steps[0], 0, steps[0].numel)
                available["gram"] = products(whole, len(steps), reader(steps, scratch), scratch)
            return combined(steps, call(self.method.function, available).tolist())

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        name = self.ties.get(name, name)
        spec = self.specs[name]
        working = accumulator(spec.dtype) if is_editable(spec.dtype) else spec.dtype
        if self.method.kind == "combination" or not is_editable(spec.dtype) or not spec.numel:
            return through(reader(plan(LinearForm.of(self), [name]), scratch), working, scratch)
        available = self._at(name)
        available["weights"] = torch.tensor(available["weights"], dtype=torch.float64).to(scratch.device, working)
        with self._at_fault(name):
            made = self._chunks if self.method.kind == "chunks" else self._whole
            return made(name, available, working, scratch)

    def _steps(self, name: str) -> list[Step]:
        return [plan(form, [name])[0] for form in self.inputs]

    @contextmanager
    def _at_fault(self, name: str) -> Iterator[None]:
        """Errors say in which method and at which tensor."""
        try:
            yield
        except WeightopsError as error:
            raise type(error)(f"{self.method.name} at {name}: {error}") from error

    def _chunks(
        self, name: str, available: dict[str, Any], working: torch.dtype, scratch: Scratch
    ) -> Callable[[int, int], torch.Tensor]:
        parts = self._parts(name, scratch)
        available = {**available, "parts": parts, "vector": self._vector}
        for statistic in self.method.function.__dict__["statistics"]:
            available[statistic.__name__] = call(statistic, available)
        stacked = "deltas" if self.space == "delta" else "models"

        @lru_cache(maxsize=1)
        def result(index: int) -> torch.Tensor:
            chunk = parts.chunk(index)
            unsound = chunk.values.sum(0) * 0 if has_nonfinite(chunk.values) else None
            given = {**available, stacked: chunk.values, "start": chunk.start, "draws": chunk.draws}
            made: torch.Tensor = call(self.method.function, given)
            return (made if unsound is None else made + unsound).reshape(-1)

        def part(start: int, stop: int) -> torch.Tensor:
            out = scratch.get(3, stop - start, working)
            for index in range(start // parts.length, -(-stop // parts.length)):
                first = index * parts.length
                a, b = max(start, first), min(stop, first + parts.length)
                out[a - start : b - start] = result(index)[a - first : b - first]
            return out

        return part

    def _parts(self, name: str, scratch: Scratch) -> Parts:
        spec, by_rows = self.specs[name], self.method.function.__dict__["by_rows"]
        read, working = reader(self._steps(name), scratch), accumulator(spec.dtype)
        return Parts(read, len(self.inputs), spec.shape, working, scratch, by_rows=by_rows, seed=self.seed, name=name)

    def _whole(
        self, name: str, available: dict[str, Any], working: torch.dtype, scratch: Scratch
    ) -> Callable[[int, int], torch.Tensor]:
        shape, read = self.specs[name].shape, reader(self._steps(name), scratch)
        with alone():
            stack = torch.empty((len(self.inputs), *shape), dtype=working, device=scratch.device)
            rows = stack.view(len(stack), -1)
            for start in range(0, rows.shape[1], CHUNK):
                stop = min(start + CHUNK, rows.shape[1])
                read(start, stop, rows[:, start:stop].unbind())
            available["deltas" if self.space == "delta" else "models"] = stack
            unsound = has_nonfinite(rows)  # of which no method need know
            made: torch.Tensor = stack[0].fill_(math.nan) if unsound else call(self.method.function, available)
        if tuple(made.shape) != shape:
            raise WeightopsError(f"the result has shape {tuple(made.shape)}, not {shape}")
        flat = made.reshape(-1)
        return lambda start, stop: flat[start:stop]

    @property
    def leaves(self) -> list[Source]:
        return list(dict.fromkeys(leaf for form in self.inputs for leaf in form.leaves))

    def working_bytes(self, name: str) -> int:
        spec, k = self.specs[name], len(self.inputs)
        rows = (
            spec.numel // spec.shape[0]
            if self.method.function.__dict__.get("by_rows") and spec.numel and spec.shape
            else 0
        )
        elements = spec.numel if self.method.kind == "whole" else min(spec.numel, max(CHUNK, rows))
        return elements * accumulator(spec.dtype).itemsize * (3 * k if self.method.kind != "combination" else k + 2)

    def describe(self) -> dict[str, object]:
        """Method, options, weights and inputs."""
        inputs = [provenance(form) for form in self.inputs]
        return {
            "method": self.method.name,
            "options": self.options,
            "weights": self.weights,
            "seed": self.seed,
            "inputs": inputs,
        }

    @cached_property
    def fingerprint(self) -> str:
        """Of what it is computed from: the result itself isn't known until it is computed."""
        return sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]
