"""What a merge method is: a function whose signature is its schema, and the lazy source that runs it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, get_args, get_type_hints

import torch

from weightops.dtypes import accumulator, is_editable
from weightops.engine.run import Segment, evaluate, plan
from weightops.errors import SpaceError, UnknownNameError, WeightopsError
from weightops.expression import LinearForm, Source, provenance
from weightops.kernels import Scratch
from weightops.registry import unknown

Draws = Callable[[int], torch.Generator]
"""Gives the random generator of an input by its index; seeded from (seed, tensor name, index)."""


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
    It may also take ``weights`` (a tensor of shape ``(k,)``), ``base`` (the base's tensor) and ``draws`` (see `Draws`). All its
    keyword-only parameters are options.
    """

    name: str
    function: Callable[..., torch.Tensor]

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def takes_deltas(self) -> bool:
        """True for methods on task vectors, False for methods on weights."""
        return next(iter(self._parameters)) == "deltas"

    @property
    def takes(self) -> set[str]:
        """The names of the inputs that it wants."""
        return {
            name for name, parameter in self._parameters.items() if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        }

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
        """
        for name, value in options.items():
            if name not in self.options:
                raise unknown(f"option of {self.name}", name, self.options)
            choices = self.options[name].choices
            if choices and value is not None and value not in choices:
                raise UnknownNameError(f"{name} of {self.name} is {' or '.join(map(repr, choices))}, not {value!r}")
        return {name: options.get(name, option.default) for name, option in self.options.items()}


class MethodSource(Source):
    """The result of a method on several forms, computed tensor by tensor when it is read.

    Args:
        method: what to compute.
        inputs: forms of one kind, deltas or weights, with equal names.
        base: the base's weights, for methods that want them.
        weights: one number for each input.
        seed: of what is random.
        options: the method's.
    """

    whole = True

    def __init__(
        self, method: Method, inputs: Sequence[LinearForm], *, base: LinearForm | None = None, weights: Sequence[float] | None = None,
        seed: int = 0, options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.method, self.inputs, self.base, self.seed = method, list(inputs), base, seed
        self.options = method.check(options or {})
        self.weights = [1.0] * len(self.inputs) if weights is None else [float(w) for w in weights]
        if not self.inputs or len(self.weights) != len(self.inputs):
            raise WeightopsError(
                f"{method.name} needs as many weights as inputs, and one at least: {len(self.weights)} and {len(self.inputs)}"
            )
        first = self.inputs[0]
        self.space = "delta" if method.takes_deltas else "weights"
        if any(form.space != self.space for form in self.inputs):
            raise SpaceError(
                f"{method.name} merges {'task vectors' if method.takes_deltas else 'weights'}, and was given the other"
            )
        self.specs = {n: s for n, s in first.specs.items() if all(n in form.specs for form in self.inputs)}
        self.ties = {}
        self.ref = f"{method.name}({', '.join(source.ref for form in self.inputs for source in form.sources)})"

    def read(self, name: str) -> torch.Tensor:
        spec = self.specs[name]
        scratch = Scratch()
        if not is_editable(spec.dtype):
            return self._evaluate(self.inputs[0], name, spec.dtype, scratch)
        working = accumulator(spec.dtype)
        arguments: dict[str, Any] = {}
        stack = torch.empty((len(self.inputs), *spec.shape), dtype=working)
        for form, row in zip(self.inputs, stack, strict=True):
            row.copy_(self._evaluate(form, name, working, scratch))
        arguments["deltas" if self.method.takes_deltas else "models"] = stack
        if "weights" in self.method.takes:
            arguments["weights"] = torch.tensor(self.weights, dtype=working)
        if "base" in self.method.takes:
            if self.base is None:
                raise WeightopsError(f"{self.method.name} needs the base")
            arguments["base"] = self._evaluate(self.base, name, working, scratch)
        if "draws" in self.method.takes:
            arguments["draws"] = lambda index: _generator(self.seed, name, index)
        result = self.method.function(**arguments, **self.options)
        if tuple(result.shape) != spec.shape:
            raise WeightopsError(f"{self.method.name} made {name} of shape {tuple(result.shape)}, not {spec.shape}")
        return result

    def _evaluate(self, form: LinearForm, name: str, dtype: torch.dtype, scratch: Scratch) -> torch.Tensor:
        [step] = plan(form, [name])
        out = torch.empty(form.specs[name].shape, dtype=dtype)
        evaluate(Segment(step, 0, step.numel), out.view(-1), scratch)
        return out

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


def _generator(seed: int, name: str, index: int) -> torch.Generator:
    digest = sha256(f"{seed}\0{name}\0{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
