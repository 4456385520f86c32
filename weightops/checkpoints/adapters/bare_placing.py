"""Find the weights of a base that a bare adapter edits, by names without dots."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.source import Source, Spec
from weightops.checkpoints.adapters.bare import BareAdapter, Edit, is_unscaled
from weightops.checkpoints.adapters.factors import with_norms
from weightops.checkpoints.adapters.ldm_names import in_diffusers
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.compressed import float_tensor
from weightops.errors import MismatchError
from weightops.support.lazy import torch
from weightops.support.text import first_few

log = logging.getLogger("weightops")

_TOWER = "text_model_"
"""What CLIP's text encoders have before their names, but for those of transformers 5."""


class _Part(NamedTuple):
    """A part of an adapter on a base.

    Attributes:
        prefix: what the base has before the modules' names.
        edits: name in the base -> edit.
    """

    prefix: str
    edits: dict[str, Edit]


class _Placed(Source):
    """The deltas of a bare adapter in the names and shapes of a base."""

    space = "delta"
    computed = True

    def __init__(self, adapter: BareAdapter, edits: Mapping[str, Edit], base: LinearForm) -> None:
        self.ref, self.files, self.ties = adapter.ref, adapter.files, {}
        self.made_from = adapter.made_from
        self._adapter, self._edits, self._base = adapter, edits, base
        self._scales = {name: adapter.scale_of(edit) for name, edit in edits.items()}
        self.specs = {name: Spec(base.specs[name].shape, "float32") for name in edits}
        self.identity = adapter.identity and ("placed", adapter.identity, tuple(edits))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the stored tensors."""
        return self._adapter.fingerprint

    def read(self, name: str) -> torch.Tensor:
        edit, shape = self._edits[name], self.specs[name].shape
        delta = self._scales[name] * self._adapter.unscaled(edit).reshape(shape)
        magnitude = self._adapter.magnitude(edit, len(shape))
        if magnitude is None:
            return delta
        weight = float_tensor(self._base, name)
        return with_norms(weight + delta, magnitude) - weight


def place_bare(adapter: BareAdapter, base: Checkpoint) -> Source:
    """Return the deltas of a bare adapter in the names of a base.

    A file may hold edits of several models of a pipeline; those of other models than the base are
    left out with a warning.

    Raises:
        MismatchError: if a part fits the base in several ways, or none fits.
    """
    form, found = base.form, _found(adapter, base.specs, base)
    if not found and base.names_in_memory is not None:
        form, found = base.memory.form, _found(adapter, base.memory.specs, base)
    others = [part for part in adapter.parts if part not in found]
    is_one_of_several = any(part.prefix not in ("", _TOWER) for part in found.values())
    if others and (not found or is_one_of_several):
        part = adapter.parts[others[0]]
        known = {module for module, _ in _index(base.specs)}
        lost = [module for module, _ in part if module not in known]
        raise MismatchError(
            f"{adapter.ref} edits modules that {base.ref} doesn't have, or has in other shapes: "
            f"{first_few(lost or [module for module, _ in part])}",
            hint="name the model of the pipeline that the adapter was made on, as a folder of "
            "diffusers or transformers, or as a file in the names of the adapter",
        )
    if others:
        log.warning(
            "%s edits other models than %s, too: the edits of %s are left out",
            adapter.ref,
            base.ref,
            first_few(f"{part or 'one'} ({len(adapter.parts[part])})" for part in others),
        )
    placed = {name: edit for part in found.values() for name, edit in part.edits.items()}
    source = _Placed(adapter, placed, form)
    return source if form is base.form else base.memory.in_files(source)


def _found(adapter: BareAdapter, specs: Mapping[str, Spec], base: Checkpoint) -> dict[str, _Part]:
    """Return the parts of an adapter that are on a base.

    Raises:
        MismatchError: if two of them are edits of the same weights.
    """
    folder = base.architecture.folder.name if base.architecture else ""
    index = _index(specs)
    found = {}
    for name, edits in adapter.parts.items():
        is_other_tower = "text_encoder" in name and "text_encoder" in folder and name != folder
        part = None if is_other_tower else _part(adapter, edits, index, specs)
        if part is not None:
            found[name] = part
            if part.prefix == f"{name}_" and any(map(is_unscaled, edits.values())):
                raise MismatchError(
                    f"{adapter.ref} says no alpha, and is no adapter of a model of diffusers: "
                    f"{base.ref} itself has names that begin with {name}"
                )
    if sum(len(part.edits) for part in found.values()) > len(
        {edit for part in found.values() for edit in part.edits}
    ):
        raise MismatchError(
            f"{adapter.ref} edits several models with the names and shapes of {base.ref}: "
            f"{first_few(found)}",
            hint="the base's folder is to have the name that it has in its pipeline",
        )
    return found


def _part(
    adapter: BareAdapter,
    edits: Mapping[tuple[str, str], Edit],
    index: Mapping[tuple[str, str], list[str]],
    specs: Mapping[str, Spec],
) -> _Part | None:
    """Return one part of an adapter on a base; None if the base lacks a module of it."""
    layers = _layers_per_block(index)
    ways: tuple[Callable[[str], str], ...] = (
        str,
        lambda module: module.removeprefix(_TOWER),
        lambda module: in_diffusers(module, layers),
    )
    for way in ways:
        named = {(way(module), end): edit for (module, end), edit in edits.items()}
        if len(named) < len(edits):
            continue
        fitting = {}
        for prefix in _prefixes(named, index):
            fitting[prefix] = {
                (module, end): [
                    name
                    for name in index.get((prefix + module, end), ())
                    if _fits(edit.shape, specs[name].shape)
                ]
                for (module, end), edit in named.items()
            }
        fitting = {prefix: names for prefix, names in fitting.items() if all(names.values())}
        several = [str(n) for names in fitting.values() for n in names.values() if len(n) > 1]
        if len(fitting) > 1 or several:
            raise MismatchError(
                f"{adapter.ref} fits several parts of its base: {first_few(several or fitting)}"
            )
        if fitting:
            [(prefix, names)] = fitting.items()
            return _Part(prefix, {names[key][0]: edit for key, edit in named.items()})
    return None


def _prefixes(
    edits: Iterable[tuple[str, str]], index: Mapping[tuple[str, str], list[str]]
) -> list[str]:
    """Return what may stand before the first module's name so that it is a base's."""
    module, end = next(iter(edits))
    if (module, end) in index:
        return [""]
    same_end = (other for other, its_end in index if its_end == end)
    return [other.removesuffix(module) for other in same_end if other.endswith(f"_{module}")]


def _layers_per_block(index: Iterable[tuple[str, str]]) -> int:
    """Return the number of layers of a resolution in a UNet of diffusers."""
    found = [re.match(r"down_blocks_0_resnets_(\d+)_", module) for module, _ in index]
    return max((int(match[1]) + 1 for match in found if match), default=1)


def _index(specs: Mapping[str, Spec]) -> dict[tuple[str, str], list[str]]:
    """Return (module without dots, "weight" or "bias") -> the names that are written so."""
    index: dict[tuple[str, str], list[str]] = {}
    for name in specs:
        module, _, end = name.rpartition(".")
        index.setdefault((module.replace(".", "_"), end), []).append(name)
    return index


def _fits(delta: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Return whether a delta is one of a weight's, with dimensions after the first flattened.

    >>> _fits((8, 36), (8, 4, 3, 3)), _fits((8, 4, 1, 1), (8, 4)), _fits((4, 8), (8, 4))
    (True, True, False)
    """
    return delta[0] == weight[:1][0] and math.prod(delta) == math.prod(weight) if weight else False
