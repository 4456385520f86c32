"""TODO."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache, reduce
from hashlib import sha256
from typing import Any, TypeVar

import torch

from weightops.algebra.dtypes import accumulator, is_editable
from weightops.algebra.kernels import CHUNK, has_nonfinite
from weightops.algebra.linear_form import LinearForm, provenance, tied_names
from weightops.algebra.names import PerTensor, check_per_tensor, depths, value_at
from weightops.algebra.scratch import Scratch, Slot
from weightops.algebra.source import ComputedSource, Source
from weightops.engine.evaluate import buffered, reader
from weightops.engine.plan import Segment, Step, combined_coefficients, plan
from weightops.engine.reduce import products
from weightops.engine.threads import all_torch_threads
from weightops.errors import MismatchError, OptionError, SpaceError, WeightopsError
from weightops.merging.methods.inputs import ModelInputs, TensorInputs
from weightops.merging.methods.method import Method
from weightops.support.text import first_few

F = TypeVar("F", bound=Callable[..., Any])


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
        weights: a number, or a `PerTensor`, for each input.
        seed: of what is random.
        options: the method's; each may be a `PerTensor`.
    """

    def __init__(
        self,
        method: Method,
        inputs: Sequence[LinearForm],
        *,
        weights: Sequence[PerTensor] | None = None,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
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
        other = next(
            (form for form in self.inputs if form.specs.keys() != first.specs.keys()), None
        )
        if other is not None and not method.fixed:
            odd = sorted(first.specs.keys() ^ other.specs.keys())
            raise MismatchError(
                f"{method.name} takes inputs with the same tensors; only some have {first_few(odd)}"
            )
        if any(weight != 1.0 for weight in self.weights) and not method.takes("weights"):
            raise OptionError(f"{method.name} takes no weights: it finds them itself")
        self.specs = {
            n: s for n, s in first.specs.items() if all(n in form.specs for form in self.inputs)
        }
        self.ref = f"{method.name}({', '.join(source.ref for form in self.inputs for source in form.sources)})"
        for name, setting in [("weight", weight) for weight in self.weights] + list(
            self.options.items()
        ):
            check_per_tensor(setting, self.specs, name)
        self._depths = depths(self.specs)
        self.ties = self._common_ties()
        chosen = {
            n: s
            for n, s in self.specs.items()
            if n not in self.ties and is_editable(s.dtype) and s.numel
        }
        self._vector = ModelInputs(
            self._parts, {n: s.numel for n, s in chosen.items()}, len(self.inputs)
        )

    def _common_ties(self) -> dict[str, str]:
        """Alias -> owner, of what is tied in all inputs and has the same settings: these are one tensor of the result, too."""
        tied = [tied_names(form) for form in self.inputs]
        return {
            alias: owner
            for alias, owner in tied[0].items()
            if all(other.get(alias) == owner for other in tied)
            and self._at(alias) == self._at(owner)
        }

    def _at(self, name: str) -> dict[str, Any]:
        """Options at a tensor, and weights as a list."""

        def value(setting: PerTensor, default: Any) -> Any:
            return value_at(setting, name, self._depths[name], default)

        options = {
            key: value(setting, self.method.options[key].default)
            for key, setting in self.options.items()
        }
        return options | {"weights": [float(value(weight, 1.0)) for weight in self.weights]}

    def as_form(self) -> LinearForm:
        """The result as a form: of the inputs themselves where it is a fixed combination of them, which is one fused pass."""
        settings = [*self.weights, *self.options.values()]
        if not self.method.fixed or any(
            isinstance(setting, (Mapping, list, tuple)) for setting in settings
        ):
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
            LinearForm.difference(form, first)[0].times(c)
            for form, c in zip(rest, coefficients[1:], strict=True)
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
            return combined_coefficients(steps, call(self.method.function, available).tolist())

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        name = self.ties.get(name, name)
        spec = self.specs[name]
        working = accumulator(spec.dtype) if is_editable(spec.dtype) else spec.dtype
        if self.method.kind == "combination" or not is_editable(spec.dtype) or not spec.numel:
            return buffered(reader(plan(LinearForm.of(self), [name]), scratch), working, scratch)
        available = self._at(name)
        available["weights"] = torch.tensor(available["weights"], dtype=torch.float64).to(
            scratch.device, working
        )
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
            out = scratch.get(Slot.RESULT, stop - start, working)
            for index in range(start // parts.length, -(-stop // parts.length)):
                first = index * parts.length
                a, b = max(start, first), min(stop, first + parts.length)
                out[a - start : b - start] = result(index)[a - first : b - first]
            return out

        return part

    def _parts(self, name: str, scratch: Scratch) -> TensorInputs:
        spec, by_rows = self.specs[name], self.method.function.__dict__["by_rows"]
        read, working = reader(self._steps(name), scratch), accumulator(spec.dtype)
        return TensorInputs(
            read,
            len(self.inputs),
            spec.shape,
            working,
            scratch,
            by_rows=by_rows,
            seed=self.seed,
            name=name,
        )

    def _whole(
        self, name: str, available: dict[str, Any], working: torch.dtype, scratch: Scratch
    ) -> Callable[[int, int], torch.Tensor]:
        shape, read = self.specs[name].shape, reader(self._steps(name), scratch)
        with all_torch_threads():
            stack = torch.empty((len(self.inputs), *shape), dtype=working, device=scratch.device)
            rows = stack.view(len(stack), -1)
            for start in range(0, rows.shape[1], CHUNK):
                stop = min(start + CHUNK, rows.shape[1])
                read(start, stop, rows[:, start:stop].unbind())
            available["deltas" if self.space == "delta" else "models"] = stack
            unsound = has_nonfinite(rows)  # of which no method need know
            made: torch.Tensor = (
                stack[0].fill_(math.nan) if unsound else call(self.method.function, available)
            )
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
        return (
            elements
            * accumulator(spec.dtype).itemsize
            * (3 * k if self.method.kind != "combination" else k + 2)
        )

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
