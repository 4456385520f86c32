"""The names that tensors have in a module of transformers, and those in its files.

Since version 5, transformers keeps tensors under other names in memory than in files, and some of
them stacked or divided; its own conversion mapping says how. Files of one class may differ in
names, too: the mapping leads from each of them to the names in memory, and so to each other.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from weightops.algebra.source import Spec
from weightops.checkpoints.conversion import Conversion, TensorMapping
from weightops.support.lazy import nn, torch


class _Group(NamedTuple):
    """Tensors of a file that transformers converts together.

    Attributes:
        converter: transformers' ``WeightConverter``.
        first: the name that the converter gives to the first tensor in memory.
        members: pattern of the converter -> the names in the file.
    """

    converter: Any
    first: str
    members: dict[str, list[str]]


_Found = tuple[dict[str, str], list[tuple[_Group, Conversion]]]
"""Name in memory -> its name in a file, and the groups of tensors with their conversions."""


class MemoryNames:
    """The names of a module's tensors, and how the tensors are read from files and put into files.

    Args:
        module: a model of transformers 5, which may be on the meta device.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self.specs = {n: Spec(tuple(t.shape), t.dtype) for n, t in module.state_dict().items()}
        ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._plans: dict[object, _Found] = {}
        self._ignored = [re.compile(pattern) for pattern in ignored]

    @classmethod
    def of(cls, module: nn.Module) -> MemoryNames | None:
        """Return the names of a module of transformers 5; None for other modules."""
        transformers = sys.modules.get("transformers")
        if transformers is None or not isinstance(module, transformers.PreTrainedModel):
            return None
        try:
            import transformers.conversion_mapping
        except ImportError:  # before version 5, both have the same names
            return None
        return cls(module)

    def is_ignored(self, name: str) -> bool:
        """Return whether transformers leaves out a tensor of a file on purpose."""
        return any(pattern.search(name) for pattern in self._ignored)

    def loading(self, file: Mapping[str, Spec]) -> dict[str, TensorMapping]:
        """Return name in memory -> how its tensor is obtained from those of a file."""
        copies, conversions = self._found(file)
        mapped = {name: TensorMapping("copy", (old,)) for name, old in copies.items()}
        for _, conversion in conversions:
            mapped |= _outputs(conversion)
        return mapped

    def saving(self, file: Mapping[str, Spec]) -> dict[str, TensorMapping]:
        """Return name in a file -> how its tensor is obtained from those in memory."""
        copies, conversions = self._found(file)
        mapped = {old: TensorMapping("copy", (name,)) for name, old in copies.items()}
        for group, conversion in conversions:
            mapped |= _outputs(_reversed(conversion, group, self._module))
        return mapped

    def _found(self, file: Mapping[str, Spec]) -> _Found:
        """Return the plan for a file with its conversions; those of the last files are kept."""
        key = tuple(file.items())
        if key not in self._plans:
            copies, groups = self._plan(file)
            conversions = [(group, self._conversion(group, file)) for group in groups]
            for oldest in list(self._plans)[:-3]:
                del self._plans[oldest]
            self._plans[key] = copies, [(group, c) for group, c in conversions if c is not None]
        return self._plans[key]

    def _plan(self, file: Mapping[str, Spec]) -> tuple[dict[str, str], list[_Group]]:
        """Return name in memory -> its name in a file, and the groups that are converted."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(self._module)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        place = (self._module.base_model_prefix, self.specs)
        copies: dict[str, str] = {}
        groups: dict[str, _Group] = {}
        for name in sorted(file, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, *place)
            if target not in self.specs and name in self.specs:
                target, pattern = rename_source_key(name, [], [], *place)
            if target not in self.specs:
                continue
            if pattern is None:
                copies.setdefault(target, name)
                continue
            group = groups.setdefault(target, _Group(by_pattern[pattern], target, {}))
            group.members.setdefault(pattern, []).append(name)
        return copies, list(groups.values())

    def _conversion(self, group: _Group, file: Mapping[str, Spec]) -> Conversion | None:
        """Return the conversion of a group, or None if its tensors don't give the module's."""
        patterns = [p for p in group.converter.source_patterns if p in group.members]
        names = tuple(name for pattern in patterns for name in group.members[pattern])
        counts = [len(group.members[pattern]) for pattern in patterns]

        def convert(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
            remaining = iter(tensors)
            collected = {
                p: [next(remaining) for _ in range(n)]
                for p, n in zip(patterns, counts, strict=True)
            }
            return _run(group.converter, group.first, collected, self._module)

        try:
            made = convert([_meta(file[name]) for name in names])
        except Exception:  # transformers' operations raise whatever they meet
            return None
        specs = tuple(Spec(tuple(tensor.shape), tensor.dtype) for tensor in made.values())
        if any(
            n not in self.specs or s.shape != self.specs[n].shape
            for n, s in zip(made, specs, strict=True)
        ):
            return None
        return Conversion(
            names,
            tuple(made),
            tuple(file[name].shape for name in names),
            specs,
            lambda tensors: list(convert(tensors).values()),
        )


def _reversed(conversion: Conversion, group: _Group, module: nn.Module) -> Conversion:
    """Return the conversion from the tensors in memory to those of the file."""
    reverse = group.converter.reverse_transform()
    first, _ = reverse.rename_source_key(conversion.outputs[0])
    patterns = reverse.source_patterns

    def run(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        collected = {p: [tensor] for p, tensor in zip(patterns, tensors, strict=True)}
        return list(_run(reverse, first, collected, module).values())

    made = run([_meta(spec) for spec in conversion.specs])
    assert tuple(tuple(tensor.shape) for tensor in made) == conversion.shapes
    return Conversion(
        conversion.outputs,
        conversion.inputs,
        tuple(spec.shape for spec in conversion.specs),
        tuple(Spec(tuple(tensor.shape), tensor.dtype) for tensor in made),
        run,
    )


def _run(
    converter: Any, first: str, collected: Mapping[str, list[torch.Tensor]], module: Any
) -> dict[str, torch.Tensor]:
    """Run a converter of transformers, which keeps what it is given, on some tensors."""
    fresh = copy.deepcopy(converter)
    for pattern, tensors in collected.items():
        fresh.collected_tensors[pattern] = list(tensors)
    made = fresh.convert(first, model=module, config=module.config)
    return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def _meta(spec: Spec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


def _outputs(conversion: Conversion) -> dict[str, TensorMapping]:
    return {
        name: TensorMapping("converted", conversion.inputs, i, conversion)
        for i, name in enumerate(conversion.outputs)
    }
