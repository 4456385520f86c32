"""The names that a model of transformers has in memory for the tensors of its files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import nn

from weightops.algebra.source import Source, Spec
from weightops.errors import CheckpointError
from weightops.support.text import first_few

Read = Callable[[str], torch.Tensor]


class _Group(NamedTuple):
    """Tensors of files that become tensors in memory together.

    Attributes:
        files: name in the files -> the same name as the converter knows it, and its pattern.
        names: names in memory.
        converter: transformers' rule; None where the one tensor stays as it is.
    """

    files: Mapping[str, tuple[str, str]]
    names: tuple[str, ...]
    converter: Any


class MemoryNames:
    """The way between the names in files and in memory, as transformers' own table has it.

    Args:
        module: the model; its weights aren't read.
        files: the shapes of the tensors in the files.

    Attributes:
        specs: the tensors in memory.
    """

    def __init__(self, module: nn.Module, files: Mapping[str, Spec]) -> None:
        self._module, self._files = module, files
        self._groups = _groups(module, files)
        self.by_name = {name: group for group in self._groups for name in group.names}
        self._names = {
            file: group.names[0]
            for group in self._groups
            for file in group.files
            if group.converter is None
        }
        state = module.state_dict(keep_vars=True)
        dtypes = {name: _dtype(group, files) for name, group in self.by_name.items()}
        self.specs = {
            name: Spec(tuple(state[name].shape), dtype)
            for name, dtype in dtypes.items()
            if name in state
        }

    def read(self, name: str, read: Read) -> torch.Tensor:
        """Return a tensor as it is in memory.

        Args:
            name: the name in memory.
            read: returns a tensor of the files.
        """
        group = self.by_name[name]
        tensors = {file: read(file) for file in group.files}
        return _convert(group, tensors, self._module)[name]

    def in_files(self, source: Source, fill: Read | None) -> Source:
        """Return a source of tensors in memory under the names of the files.

        Args:
            source: the tensors; they may be a part of the model's.
            fill: returns a tensor in memory that the source lacks and that shares tensors of the
                files with one that it has; None for zeros.
        """
        return _InFiles(source, self, fill)

    def name_of(self, file: str) -> str | None:
        """Return the name in memory of a tensor of the files; None if it is part of another."""
        return self._names.get(file)

    def files_of(self, name: str) -> tuple[str, ...]:
        """Return the names in the files of what a tensor in memory is made of; empty for none."""
        group = self.by_name.get(name)
        return tuple(group.files) if group else ()

    def to_files(self, group: _Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the tensors of the files that tensors in memory are made of."""
        if group.converter is None:
            return dict(zip(group.files, tensors.values(), strict=True))
        back = group.converter.reverse_transform()
        key = None
        for name in group.names:
            renamed, pattern = back.rename_source_key(name)
            key = key or renamed
            back.add_tensor(key, name, pattern, tensors[name])
        made = back.convert(key, model=self._module, config=self._module.config)
        prefix = f"{getattr(self._module, 'base_model_prefix', '')}."
        by_tail = {name.removeprefix(prefix): _first(tensor) for name, tensor in made.items()}
        result = {
            file: by_tail.get(known.removeprefix(prefix))
            for file, (known, _) in group.files.items()
        }
        if any(tensor is None for tensor in result.values()):
            raise CheckpointError(
                f"{first_few(group.names)} can't be written in the names of the files: "
                "transformers has no rule for it"
            )
        return result


class _InFiles(Source):
    """Tensors in memory under the names of the files; see `MemoryNames.in_files`."""

    computed = True

    def __init__(self, source: Source, names: MemoryNames, fill: Read | None) -> None:
        self.source, self._memory, self._fill = source, names, fill
        self.ref, self.space, self.made_from = source.ref, source.space, source.made_from
        self._groups = {
            file: group
            for name in source.specs
            for group in (names.by_name[name],)
            for file in group.files
        }
        dtype = next((spec.dtype for spec in source.specs.values()), torch.float32)
        self.specs = {file: Spec(names._files[file].shape, dtype) for file in self._groups}
        single = {group.names[0]: file for file, group in self._groups.items()}
        self.ties = {
            single[alias]: single[name]
            for alias, name in source.ties.items()
            if alias in single and name in single
        }
        self.identity = None if source.identity is None else ("in files", source.identity)
        self._last: tuple[_Group | None, dict[str, torch.Tensor]] = (None, {})
        self._lock = Lock()

    def read(self, name: str) -> torch.Tensor:
        group = self._groups[name]
        with self._lock:
            if self._last[0] is not group:
                tensors = {known: self._tensor(known) for known in group.names}
                self._last = (group, self._memory.to_files(group, tensors))
            return self._last[1][name]

    def _tensor(self, name: str) -> torch.Tensor:
        if name in self.source.specs:
            return self.source.read(name)
        if self._fill is None:
            return torch.zeros(self._memory.specs[name].shape)
        return self._fill(name)

    def describe(self) -> dict[str, object]:
        """Return the description of the source: other names don't change what it was made from."""
        return self.source.describe()


def _groups(module: Any, files: Mapping[str, Spec]) -> list[_Group]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        apply_renamings,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, state = module.base_model_prefix, module.state_dict()
    found: dict[str, tuple[Any, dict[str, tuple[str, str]]]] = {}
    for file in sorted(files, key=dot_natural_key):
        key, pattern = rename_source_key(file, renamings, converters, prefix, state)
        known = apply_renamings(file, renamings)
        if key not in state and file in state:
            (key, pattern), known = rename_source_key(file, [], [], prefix, state), file
        if key in state:
            rule = None if pattern is None else by_pattern[pattern]
            found.setdefault(key, (rule, {}))[1][file] = (known, pattern or file)
    groups = []
    for key, (rule, members) in found.items():
        if rule is None:
            groups.append(_Group(members, (key,), None))
            continue
        shapes = {file: torch.empty(files[file].shape, device="meta") for file in members}
        group = _Group(members, (key,), rule)
        groups.append(group._replace(names=tuple(_convert(group, shapes, module))))
    return groups


def _convert(
    group: _Group, tensors: Mapping[str, torch.Tensor], module: nn.Module
) -> dict[str, torch.Tensor]:
    """Return the tensors in memory that tensors of the files become."""
    if group.converter is None:
        return dict(zip(group.names, tensors.values(), strict=True))
    rule, key = copy.deepcopy(group.converter), group.names[0]
    for file, tensor in tensors.items():
        rule.add_tensor(key, file, group.files[file][1], tensor)
    made = rule.convert(key, model=module, config=module.config)
    return {name: _first(tensor) for name, tensor in made.items()}


def _first(tensor: Any) -> torch.Tensor:
    result: torch.Tensor = tensor[0] if isinstance(tensor, list) else tensor
    return result


def _dtype(group: _Group, files: Mapping[str, Spec]) -> torch.dtype:
    return files[next(iter(group.files))].dtype
