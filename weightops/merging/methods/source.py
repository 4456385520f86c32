"""The lazy source that runs a merge method on several forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial, reduce
from typing import Any

from weightops.algebra.dtypes import accumulator, is_editable
from weightops.algebra.kernels import CHUNK, has_nonfinite
from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.names import PerTensor, check_per_tensor, depths, value_at
from weightops.algebra.provenance import provenance
from weightops.algebra.scratch import Scratch, Slot
from weightops.algebra.source import ExpressionSource, Factors, Source
from weightops.engine.evaluate import buffered, reader, stacked
from weightops.engine.plan import Segment, Step, combined_coefficients, plan
from weightops.engine.reduce import products
from weightops.engine.threads import all_torch_threads
from weightops.errors import MethodError, MismatchError, OptionError, SpaceError, WeightopsError
from weightops.merging.methods.inputs import ModelInputs, TensorInputs
from weightops.merging.methods.low_rank import elements_of, rank_of
from weightops.merging.methods.model_statistics import Given, ModelStatistics
from weightops.merging.methods.table import METHODS, MethodLike, as_method
from weightops.support.arguments import call
from weightops.support.lazy import torch
from weightops.support.text import first_few


class MethodSource(ExpressionSource):
    """The result of a merge method, computed when it is read, in the working precision.

    Args:
        method: the name of a method, a `Method`, or a function that is one.
        inputs: forms of one space, deltas or weights, with equal names.
        weights: a number, or a `PerTensor`, for each input; 1 by default.
        seed: the seed of methods that draw.
        options: the method's own options; each may be a `PerTensor`.
        statistics: for each input, kind -> statistic, for methods that take them.

    Raises:
        UnknownNameError: for an unknown method, option or choice, or a pattern without a match.
        OptionError: for weights or options that the method doesn't take.
        SpaceError: if the method doesn't merge what the inputs are.
        MismatchError: if the names of the inputs differ.
    """

    def __init__(
        self,
        method: MethodLike,
        inputs: Sequence[LinearForm],
        *,
        weights: Sequence[PerTensor] | None = None,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        statistics: Given | None = None,
    ) -> None:
        self.method, self.inputs, self.seed = as_method(method), list(inputs), seed
        self.options = self.method.check(options or {})
        self._given_statistics = statistics
        self.weights = [1.0] * len(self.inputs) if weights is None else list(weights)
        self._check()
        first = self.inputs[0]
        self.space = first.space
        self.specs = {
            name: spec
            for name, spec in first.specs.items()
            if all(name in form.specs for form in self.inputs)
        }
        refs = [source.ref for form in self.inputs for source in form.sources]
        self.ref = f"{self.method.name}({', '.join(refs)})"
        for weight in self.weights:
            check_per_tensor(weight, self.specs, "weight")
        for option, value in self.options.items():
            check_per_tensor(value, self.specs, option, words=True)
        self.statistics = ModelStatistics(self.method, statistics, len(self.inputs), self.specs)
        self._depths = depths(self.specs)
        self.ties = self._common_ties()
        sizes = {name: spec.numel for name, spec in self.specs.items() if name not in self.ties}
        merged = {name: numel for name, numel in sizes.items() if self._is_merged(name)}
        self._model_inputs = ModelInputs(self._inputs_at, merged, len(self.inputs))

    def __reduce__(self) -> Any:
        name = self.method.name
        method = name if name in METHODS and METHODS[name] is self.method else self.method
        how: dict[str, Any] = {"weights": self.weights, "seed": self.seed, "options": self.options}
        again = partial(MethodSource, statistics=self._given_statistics, **how)
        return again, (method, self.inputs)

    def _check(self) -> None:
        """Refuse inputs and weights that the method doesn't take."""
        name, weights, inputs = self.method.name, self.weights, self.inputs
        if not inputs or len(weights) != len(inputs):
            raise OptionError(
                f"{name} needs one input at least, and as many weights as inputs; there are "
                f"{len(inputs)} inputs and {len(weights)} weights"
            )
        spaces = {form.space for form in inputs}
        if len(spaces) > 1 or not self.method.works_on(inputs[0].space):
            kinds = {"delta": "task vectors", "weights": "weights"}
            others = [kinds[space] for space in spaces - {self.method.space}]
            raise SpaceError(f"{name} merges {kinds[self.method.space]}, not {others[0]}")
        names = inputs[0].specs.keys()
        for form in inputs[1:]:
            if form.specs.keys() != names and not self.method.fixed:
                raise MismatchError(
                    f"{name} takes inputs with the same tensors, and only some have "
                    f"{first_few(sorted(names ^ form.specs.keys()))}",
                    hint="adapters of different layers are merged into weights: base=...",
                )
        if any(weight != 1.0 for weight in weights) and not self.method.takes("weights"):
            raise OptionError(f"{name} takes no weights: it finds them itself")

    def _is_merged(self, name: str) -> bool:
        """Return True if the method computes a tensor, which is otherwise the first input's."""
        spec = self.specs[name]
        return spec.is_editable and spec.numel > 0

    def _common_ties(self) -> dict[str, str]:
        """Return alias -> owner of the tensors that are tied in the result, too.

        They are tied in all inputs, and have the same options and weights.
        """
        tied = [tied_names(form) for form in self.inputs]
        return {
            alias: owner
            for alias, owner in tied[0].items()
            if all(other.get(alias) == owner for other in tied)
            and self._values_at(alias) == self._values_at(owner)
        }

    def _values_at(self, name: str) -> dict[str, Any]:
        """Return the options at a tensor, and its weights as a list."""

        def value(setting: PerTensor, default: Any) -> Any:
            return value_at(setting, name, self._depths[name], default)

        values = {
            option: value(setting, self.method.options[option].default)
            for option, setting in self.options.items()
        }
        return values | {"weights": [float(value(weight, 1.0)) for weight in self.weights]}

    def as_form(self) -> LinearForm:
        """Return the result as a form.

        A fixed combination becomes a form of the inputs themselves, which is one fused pass.
        """
        settings = [*self.weights, *self.options.values()]
        varies = any(isinstance(setting, (Mapping, list, tuple)) for setting in settings)
        if not self.method.fixed or varies:
            return LinearForm.of(self)
        numbers = [float(weight) for weight in self.weights]
        coefficients = self._coefficients({**self.options, "weights": numbers})
        if self.space == "delta":
            pairs = zip(self.inputs, coefficients, strict=True)
            return reduce(LinearForm.plus, [form.times(value) for form, value in pairs])
        if abs(math.fsum(coefficients) - 1) > 1e-12:
            return LinearForm.of(self)
        first, *rest = self.inputs
        shifts = [
            LinearForm.difference(form, first)[0].times(value)
            for form, value in zip(rest, coefficients[1:], strict=True)
        ]
        return reduce(LinearForm.plus, shifts, first)

    def _coefficients(self, arguments: Mapping[str, Any]) -> list[float]:
        """Return the coefficients of a combination; ``weights`` are given as a list."""
        if self.method.computation.of_numbers:
            numbers: list[float] = call(self.method.function, arguments)
            return numbers
        weights = torch.tensor(arguments["weights"], dtype=torch.float64)
        coefficients = call(self.method.function, {**arguments, "weights": weights})
        _check_result(coefficients, (len(self.inputs),))
        values: list[float] = coefficients.tolist()
        return values

    def combination(self, name: str, scratch: Scratch) -> Mapping[Source, float] | None:
        name = self.ties.get(name, name)
        steps = self._steps(name)
        if not self._is_merged(name):
            return steps[0].coefficients
        if self.method.kind != "combination":
            return None
        arguments = self._values_at(name)
        with self._located(name):
            if not self.method.fixed:
                whole = Segment(steps[0], 0, steps[0].numel)
                arguments["gram"] = products(whole, len(steps), reader(steps, scratch), scratch)
            return combined_coefficients(steps, self._coefficients(arguments))

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        name = self.ties.get(name, name)
        dtype = self.specs[name].dtype
        working = accumulator(dtype) if is_editable(dtype) else dtype
        if self.method.kind == "combination" or not self._is_merged(name):
            return buffered(reader(plan(LinearForm.of(self), [name]), scratch), working, scratch)
        arguments = self._values_at(name)
        weights = torch.tensor(arguments["weights"], dtype=torch.float64)
        arguments["weights"] = weights.to(scratch.device, working)
        if self.rank(name) is not None:
            return elements_of(self.factors(name), working, scratch.device)
        opened = self._open_chunks if self.method.kind == "chunks" else self._open_whole
        with self._located(name):
            return opened(name, arguments, working, scratch)

    def _steps(self, name: str) -> list[Step]:
        return [plan(form, [name])[0] for form in self.inputs]

    @contextmanager
    def _located(self, name: str) -> Iterator[None]:
        """Put the method and the tensor before the fact of an error."""
        try:
            yield
        except WeightopsError as error:
            raise error.prefixed(f"{self.method.name} at {name}") from error

    def _open_chunks(
        self, name: str, arguments: dict[str, Any], working: torch.dtype, scratch: Scratch
    ) -> Callable[[int, int], torch.Tensor]:
        inputs = self._inputs_at(name, scratch)
        self._add_statistics(arguments, inputs)
        stacked = "deltas" if self.method.space == "delta" else "models"

        @lru_cache(maxsize=1)
        def merged_chunk(index: int) -> torch.Tensor:
            values, start, draws = inputs.chunk(index)
            nonfinite = values.sum(0) * 0 if has_nonfinite(values) else None
            given = {**arguments, stacked: values, "start": start, "draws": draws}
            with self._located(name):
                merged: torch.Tensor = call(self.method.function, given)
                _check_result(merged, values.shape[1:])
            return (merged if nonfinite is None else merged + nonfinite).reshape(-1).to(working)

        def elements(start: int, stop: int) -> torch.Tensor:
            offset = start - start % inputs.length
            if stop - offset <= inputs.length:
                return merged_chunk(offset // inputs.length)[start - offset : stop - offset]
            out = scratch.get(Slot.RESULT, stop - start, working)
            for index in range(start // inputs.length, -(-stop // inputs.length)):
                offset = index * inputs.length
                low, high = max(start, offset), min(stop, offset + inputs.length)
                chunk = merged_chunk(index)
                out[low - start : high - start] = chunk[low - offset : high - offset]
            return out

        return elements

    def _add_statistics(self, arguments: dict[str, Any], inputs: TensorInputs) -> None:
        """Add the values of the method's own statistics to its arguments."""
        arguments |= {"inputs": inputs, "model_inputs": self._model_inputs}
        for parameter, statistic in self.method.computation.statistics.items():
            arguments[parameter] = call(statistic, arguments)

    def _inputs_at(self, name: str, scratch: Scratch) -> TensorInputs:
        spec = self.specs[name]
        return TensorInputs(
            reader(self._steps(name), scratch),
            len(self.inputs),
            spec.shape,
            accumulator(spec.dtype),
            scratch,
            by_rows=self.method.computation.by_rows,
            seed=self.seed,
            name=name,
        )

    def _open_whole(
        self, name: str, arguments: dict[str, Any], working: torch.dtype, scratch: Scratch
    ) -> Callable[[int, int], torch.Tensor]:
        shape = self.specs[name].shape
        if self.method.computation.statistics:
            self._add_statistics(arguments, self._inputs_at(name, scratch))
        with all_torch_threads():
            stack = stacked(self.inputs, name, working, scratch)
            if has_nonfinite(stack):  # so that no method need handle them
                merged = stack[0].fill_(math.nan)
            else:
                merged = self.statistics.merged(
                    name,
                    stack,
                    lambda given: call(self.method.function, {**arguments, **given}),
                    "deltas" if self.space == "delta" else "models",
                    scratch,
                )
        _check_result(merged, shape)
        flat = merged.reshape(-1)
        return lambda start, stop: flat[start:stop]

    def rank(self, name: str) -> int | None:
        if self.method.computation.of_factors is None or not self._is_merged(name):
            return None
        return rank_of(self.inputs, self.ties.get(name, name))

    def factors(self, name: str) -> Factors:
        name = self.ties.get(name, name)
        given = [form.factors(name) for form in self.inputs]
        weights = torch.tensor(self._values_at(name)["weights"], dtype=given[0][1].dtype)
        arguments = {**self._values_at(name), "weights": weights, "factors": given}
        with self._located(name), all_torch_threads():
            merged: Factors = call(self.method.computation.of_factors, arguments)  # type: ignore[arg-type]
        return merged

    @property
    def leaves(self) -> list[Source]:
        inputs = [leaf for form in self.inputs for leaf in form.leaves]
        return list(dict.fromkeys([*inputs, *self.statistics.leaves]))

    def working_bytes(self, name: str) -> int:
        spec, k, rank = self.specs[name], len(self.inputs), self.rank(name)
        if rank is not None:  # factors in float64, twice, and one chunk
            return 8 * (2 * rank * sum(spec.shape) + min(spec.numel, CHUNK + spec.shape[1]))
        has_rows = self.method.computation.by_rows and spec.numel and spec.shape
        width = spec.numel // spec.shape[0] if has_rows else 0
        elements = spec.numel if self.method.kind == "whole" else min(spec.numel, max(CHUNK, width))
        copies = k + 2 if self.method.kind == "combination" else 3 * k
        own = elements * max(spec.itemsize, 4) * copies
        return own + self.statistics.working_bytes(name)

    def describe(self) -> dict[str, object]:
        """Return the method, its options, and the weights and provenance of the inputs."""
        return {
            "method": self.method.name,
            "options": self.options,
            "weights": self.weights,
            "seed": self.seed,
            "inputs": [provenance(form) for form in self.inputs],
            **self.statistics.describe(),
        }


def _check_result(result: object, shape: Sequence[int]) -> None:
    """Refuse what isn't a tensor of a shape.

    Raises:
        MethodError: naming what it is.
    """
    if not isinstance(result, torch.Tensor):
        raise MethodError(f"the method returned {type(result).__name__}, not a tensor")
    if tuple(result.shape) != tuple(shape):
        raise MethodError(f"the result has shape {tuple(result.shape)}, not {tuple(shape)}")
