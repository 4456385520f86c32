"""Pack several models into one file: a unified vector, and a mask for each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from weightops.algebra.dtypes import accumulator, is_editable
from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.names import Each
from weightops.algebra.provenance import provenance
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import ExpressionSource, Source, Spec
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.packed import BASE, MASKS, RECORD, UNIFIED
from weightops.checkpoints.matching import open_matched
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.engine.evaluate import buffered, reader, stacked
from weightops.engine.plan import plan
from weightops.errors import OptionError
from weightops.merging.methods.option_values import per_input
from weightops.support.arguments import check_arguments
from weightops.support.lazy import np, torch
from weightops.support.text import portable

Packing = Literal["emr", "tall"]
"""How several task vectors become one with masks."""


class Packed(NamedTuple):
    """The unified vector at one tensor, shape ``(n,)``, and the tasks' masks, ``(k, n)``."""

    unified: torch.Tensor
    masks: torch.Tensor


def elected(deltas: torch.Tensor) -> Packed:
    """Return the largest changes of the elected sign, and where each task has that sign (EMR)."""
    sign = torch.where(deltas.sum(0) > 0, 1.0, -1.0).to(deltas.dtype)
    masks = deltas * sign > 0
    return Packed(sign * (deltas.abs() * masks).amax(0), masks)


def localized(deltas: torch.Tensor, mask_scales: Sequence[float]) -> Packed:
    """Return the sum of the changes, and where it is nearest to each task's own (TALL masks)."""
    total = deltas.sum(0)
    scales = torch.tensor(mask_scales, dtype=deltas.dtype)[:, None]
    return Packed(total, deltas.abs() >= scales * (total - deltas).abs())


class PackSource(ExpressionSource):
    """The tensors of a file of several models, computed when they are read.

    Args:
        base: the base.
        models: task -> its model, in the base's names.
        method: how the task vectors become one.
        mask_scales: the thresholds of TALL masks, one for each task.
    """

    def __init__(
        self,
        base: Checkpoint,
        models: Mapping[str, Checkpoint],
        method: Packing,
        mask_scales: Sequence[float],
    ) -> None:
        self._base, self._tasks, self._method = base, list(models), method
        self._mask_scales = mask_scales
        self._deltas = [LinearForm.difference(m.form, base.form)[0] for m in models.values()]
        tied = [tied_names(form) for form in (base.form, *self._deltas)]
        common = {
            alias: name
            for alias, name in tied[0].items()
            if all(other.get(alias, name) == name for other in tied)
        }
        self._record_ties = common
        self.ref = f"{method}({', '.join(model.ref for model in models.values())})"
        self.ties: dict[str, str] = {}
        own = {name: spec for name, spec in base.specs.items() if name not in common}
        self._scales, changed = self._measure(own)
        self.specs = {BASE + name: spec for name, spec in own.items()}
        for name in changed:
            width = -(-own[name].numel // 8)
            self.specs[UNIFIED + name] = own[name]
            self.specs[MASKS + name] = Spec((len(self._tasks), width), "uint8")

    def _measure(self, specs: Mapping[str, Spec]) -> tuple[list[float], list[str]]:
        """Return each task's scale, and the tensors that any task changes."""
        own, unified = (torch.zeros(len(self._tasks), dtype=torch.float64) for _ in range(2))
        changed = []
        for name, spec in specs.items():
            if not spec.is_editable or not spec.numel:
                continue
            deltas = self._read(name)
            if not bool(deltas.any()):
                continue
            changed.append(name)
            packed = self._pack(deltas)
            own += deltas.abs().mean(1, dtype=torch.float64)
            unified += (packed.unified.abs() * packed.masks).mean(1, dtype=torch.float64)
        scales = torch.where(unified > 0, own / unified, 1.0).tolist()
        return scales if self._method == "emr" else [1.0] * len(scales), changed

    def _read(self, name: str) -> torch.Tensor:
        """Return the task vectors at a tensor, shape ``(k, n)``, on CPU."""
        dtype = accumulator(self._base.specs[name].dtype)
        return stacked(self._deltas, name, dtype, Scratch()).view(len(self._deltas), -1)

    def _pack(self, deltas: torch.Tensor) -> Packed:
        return elected(deltas) if self._method == "emr" else localized(deltas, self._mask_scales)

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        part, _, inner = name.partition("/")
        if f"{part}/" == BASE:
            dtype = self.specs[name].dtype
            working = accumulator(dtype) if is_editable(dtype) else dtype
            return buffered(reader(plan(self._base.form, [inner]), scratch), working, scratch)
        packed = self._pack(self._read(inner))
        bits = torch.from_numpy(np.packbits(packed.masks.numpy(), axis=1)).reshape(-1)
        flat = packed.unified if f"{part}/" == UNIFIED else bits
        return lambda start, stop: flat[start:stop].to(scratch.device)

    @property
    def leaves(self) -> list[Source]:
        forms = (self._base.form, *self._deltas)
        return list(dict.fromkeys(leaf for form in forms for leaf in form.leaves))

    def working_bytes(self, name: str) -> int:
        spec = self._base.specs.get(name.partition("/")[2])
        return 0 if spec is None else 3 * len(self._tasks) * spec.numel * 4

    def describe(self) -> dict[str, object]:
        """Return what a reader of the file needs, and the provenance of base and models."""
        return {
            "ref": portable(self.ref),
            RECORD: {
                "method": self._method,
                "tasks": self._tasks,
                "scales": self._scales,
                "ties": self._record_ties,
                "mask_scales": list(self._mask_scales) if self._method == "tall" else None,
            },
            "made_of": [provenance(form) for form in (self._base.form, *self._deltas)],
        }


def pack(
    models: Mapping[str, CheckpointLike],
    base: CheckpointLike,
    out: str | Path,
    *,
    method: Packing = "emr",
    mask_scale: float | Each | None = None,
    overwrite: bool = False,
    strict: bool = False,
) -> Path:
    """Write several models to one file, from which each opens by its name: ``packed:mnist``.

    A task's weights are ``base + scale_i (mask_i * unified)``. Beside the base the file has one
    vector and a bit for each weight and task. EMR takes the largest changes of the elected sign,
    and scales that keep each task's size, the sum over tensors of their mean magnitudes, as its
    authors do (arXiv 2405.17461). TALL masks take the sum of the
    changes, where ``|tau_i| >= mask_scale |tau - tau_i|`` (arXiv 2405.07813).

    Args:
        models: name -> fine-tuned weights.
        base: the weights that all of them started from.
        out: the .safetensors file.
        method: emr or tall.
        mask_scale: the threshold of TALL masks, for all tasks or for each; 0.4 by default.
        overwrite: replace an output that exists.
        strict: refuse weights that are configured differently from the base, instead of warning.

    Returns:
        The file.

    Raises:
        OptionError: if there are no models, or a name or the threshold can't be used.
        MismatchError: if the weights don't match the base.

    >>> import tempfile
    >>> base, a, b = ({"w": torch.tensor(x)} for x in ([0.0, 0.0], [2.0, 0.0], [0.0, 1.0]))
    >>> file = pack({"a": a, "b": b}, base, Path(tempfile.mkdtemp(), "both.safetensors"))
    >>> open_checkpoint(f"{file}:b")["w"]
    tensor([0., 1.])
    """
    check_arguments(pack, method=method)
    start = open_checkpoint(base)
    if method != "tall" and mask_scale is not None:
        raise OptionError(f"mask_scale is the threshold of TALL masks, and {method} has none")
    scales = per_input(0.4 if mask_scale is None else mask_scale, len(models))
    if not models:
        raise OptionError("a file of several models needs one model at least")
    unusable = next((name for name in map(str, models) if not name or ":" in name), None)
    if unusable is not None:
        raise OptionError(
            f"{unusable!r} can't be the name of a model, as {Path(out).name}:NAME opens it",
            hint="give a name without a colon",
        )
    if not all(math.isfinite(scale) and scale >= 0 for scale in scales):
        raise OptionError(f"mask_scale is at least 0, not {mask_scale}")
    if Path(out).suffix != ".safetensors":
        raise OptionError(f"several models go into one .safetensors file, not {out}")
    opened = {str(n): open_matched(model, start, strict=strict) for n, model in models.items()}
    source = PackSource(start, opened, method, scales)
    return Checkpoint(LinearForm.of(source)).save(out, overwrite=overwrite)
