"""Sources and forms under other names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

from weightops.algebra.linear_form import Factor, LinearForm
from weightops.algebra.names import NameRules, escape
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import Factors, Source, Spec
from weightops.checkpoints.conversion import Conversion, TensorMapping
from weightops.errors import MismatchError
from weightops.support.lazy import torch
from weightops.support.text import first_few


class Renamed(Source):
    """A source under other names, with some of its tensors transposed, stacked or divided.

    Conversions of several tensors run once for all of them: the last two results are kept.

    Args:
        source: the source of the tensors.
        mapped: new name -> how its tensor is obtained from the source's tensors.
        specs: the shapes of the new tensors.
    """

    def __init__(
        self, source: Source, mapped: Mapping[str, TensorMapping], specs: Mapping[str, Spec]
    ) -> None:
        self.source = source
        self.ref, self.space, self.skipped = source.ref, source.space, source.skipped
        self.files, self.linearized_at = source.files, source.linearized_at
        self.metadata = source.metadata
        self.mapped = {
            name: mapping
            for name, mapping in mapped.items()
            if any(old in source.specs for old in mapping.names)
        }
        self.specs = {
            name: Spec(specs[name].shape, _first_spec(mapping, source.specs).dtype_name)
            for name, mapping in self.mapped.items()
        }
        self._converted: dict[Conversion, list[torch.Tensor]] = {}
        self._lock = Lock()
        self.computed = source.computed or any(m.kind != "copy" for m in self.mapped.values())
        self.ties = self._find_ties()
        self.identity = (
            None
            if source.identity is None
            else ("renamed", source.identity, tuple(self.mapped.items()))
        )

    def __reduce__(self) -> Any:
        return Renamed, (self.source, self.mapped, self.specs)

    def _find_ties(self) -> dict[str, str]:
        """Return alias -> name for the new names that are copies of one tensor of the source."""
        ties: dict[str, str] = {}
        owners: dict[str, str] = {}
        for name, mapping in self.mapped.items():
            if mapping.kind == "copy":
                old = mapping.names[0]
                owner = owners.setdefault(self.source.ties.get(old, old), name)
                if owner != name:
                    ties[name] = owner
        return ties

    def samples(self, names: Iterable[str]) -> Iterator[bytes]:
        if self.computed:
            return super().samples(names)
        return self.source.samples(self.mapped[name].names[0] for name in names)

    def read(self, name: str) -> torch.Tensor:
        kind, names, index, conversion = self.mapped[name]
        if conversion is not None:
            return self._convert(conversion)[index]
        if kind == "stack":
            height, *rest = self.specs[name].shape
            zero = torch.zeros(1, dtype=self.specs[name].dtype).expand(height // len(names), *rest)
            return torch.cat(
                [self.source.read(old) if old in self.source.specs else zero for old in names]
            )
        tensor = self.source.read(names[0])
        if kind == "part":
            return tensor.chunk(3)[index]
        return tensor.T if kind == "transpose" else tensor

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        mapping = self.mapped[name]
        if mapping.kind == "copy":
            return self.source.open(mapping.names[0], scratch)
        return super().open(name, scratch)

    def read_run(self, names: Sequence[str], scratch: Scratch) -> torch.Tensor:
        mapped = [self.mapped[name] for name in names]
        if any(mapping.kind != "copy" for mapping in mapped):
            return super().read_run(names, scratch)
        return self.source.read_run([mapping.names[0] for mapping in mapped], scratch)

    def rank(self, name: str) -> int | None:
        mapping = self.mapped[name]
        is_one = mapping.kind in ("copy", "transpose") and mapping.conversion is None
        return self.source.rank(mapping.names[0]) if is_one else None

    def factors(self, name: str) -> Factors:
        left, right = self.source.factors(self.mapped[name].names[0])
        return (right.T, left.T) if self.mapped[name].kind == "transpose" else (left, right)

    def _convert(self, conversion: Conversion) -> list[torch.Tensor]:
        with self._lock:
            if conversion not in self._converted:
                dtype = next(
                    self.source.specs[name].dtype
                    for name in conversion.inputs
                    if name in self.source.specs
                )
                inputs = [
                    self.source.read(name)
                    if name in self.source.specs
                    else torch.zeros(1, dtype=dtype).expand(shape)
                    for name, shape in zip(conversion.inputs, conversion.shapes, strict=True)
                ]
                for oldest in list(self._converted)[:-1]:
                    del self._converted[oldest]
                self._converted[conversion] = conversion.run(inputs)
            return self._converted[conversion]

    @property
    def leaves(self) -> list[Source]:
        return [self] if self.source.leaves == [self.source] else self.source.leaves

    def working_bytes(self, name: str) -> int:
        mapping = self.mapped[name]
        itemsize = self.specs[name].itemsize
        converted = mapping.conversion.specs if mapping.conversion else ()
        read = (self.source.working_bytes(n) for n in mapping.names if n in self.source.specs)
        return itemsize * sum(spec.numel for spec in converted) + max(read, default=0)

    def describe(self) -> dict[str, object]:
        """Return the description of the source: other names don't change what it was made from."""
        return self.source.describe()


def with_prefix(source: Source, prefix: str) -> Source:
    """Return a source whose names begin with a prefix."""
    mapped = {prefix + name: TensorMapping("copy", (name,)) for name in source.specs}
    return Renamed(source, mapped, {prefix + name: s for name, s in source.specs.items()})


def renamed(form: LinearForm, mapped: Mapping[str, TensorMapping]) -> LinearForm:
    """Return the form of new tensors: new name -> how it is obtained from the form's tensors."""
    specs = {name: _spec(mapping, form.specs) for name, mapping in mapped.items()}
    sources = {source: Renamed(source, mapped, specs) for source in form.sources}
    terms: dict[Factor, float] = {}
    for factor, coefficient in form.terms.items():
        rules = tuple(_renamed_rules(rule, mapped, factor.source) for rule in factor.rules)
        terms[Factor(sources[factor.source], rules)] = coefficient
    return replace(form, specs=specs, terms=terms, base=sources[form.base] if form.base else None)


def _renamed_rules(
    rules: NameRules, mapped: Mapping[str, TensorMapping], source: Source
) -> NameRules:
    """Return rules on old names as rules on new names.

    Raises:
        MismatchError: if the rules differ within one new tensor.
    """
    items = []
    for name, mapping in mapped.items():
        values = {rules(old) for old in mapping.names if old in source.specs}
        if len(values) > 1:
            raise MismatchError(
                f"{first_few(mapping.names)} have different coefficients, "
                f"and are one tensor {name} in the other"
            )
        items += [(escape(name), value) for value in values]
    return NameRules(tuple(items))


def _first_spec(mapping: TensorMapping, specs: Mapping[str, Spec]) -> Spec:
    return next(specs[old] for old in mapping.names if old in specs)


def _spec(mapping: TensorMapping, specs: Mapping[str, Spec]) -> Spec:
    """Return the spec of a new tensor."""
    shape, dtype = _first_spec(mapping, specs)
    if mapping.conversion is not None:
        return Spec(mapping.conversion.specs[mapping.part].shape, dtype)
    if mapping.kind == "transpose":
        shape = shape[::-1]
    elif mapping.kind == "stack" and shape:
        shape = (shape[0] * len(mapping.names), *shape[1:])
    elif mapping.kind == "part" and shape:
        shape = (shape[0] // 3, *shape[1:])
    return Spec(shape, dtype)
