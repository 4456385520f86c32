"""Task vectors and the arithmetic on them (arXiv 2212.04089)."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from weightops.algebra.dtypes import accumulator
from weightops.algebra.linear_form import Alpha, LinearForm, provenance
from weightops.algebra.source import Spec, same_weights
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.compressed import coding, write_compressed
from weightops.checkpoints.formats.lora import write_adapter
from weightops.checkpoints.loading import load_into
from weightops.checkpoints.matching import match_to_base, open_matched
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint, open_ref
from weightops.checkpoints.renaming import rename_to_match
from weightops.engine.evaluate import OnNonfinite, materialize
from weightops.engine.layout import layout
from weightops.engine.reduce import gram
from weightops.engine.tensors import Tensors
from weightops.engine.write import write
from weightops.errors import CheckpointError, MismatchError, OptionError, SpaceError
from weightops.hub.cards import adapter_card
from weightops.support.atomic import atomic_output, resumable_output
from weightops.support.text import first_few

log = logging.getLogger("weightops")

M = TypeVar("M", nn.Module, dict[str, torch.Tensor], Checkpoint)
"""Kinds that come back as they went in; a path or ref comes back as a `Checkpoint`."""


class TaskVector(Tensors):
    r"""What fine-tuning changed: :math:`\tau = \theta_{ft} - \theta_{pre}`, tensor by tensor (arXiv 2212.04089).

    Nothing is computed or copied here. ``+ - * /``, negation and ``sum()`` give further lazy vectors, and
    `apply` evaluates the whole expression in one pass. Only floating-point tensors take part.

    Args:
        pre: the pre-trained weights: a path, a ref, a `Checkpoint`, a ``dict[str, Tensor]`` or an ``nn.Module``.
        finetuned: the fine-tuned weights, any of the same; or a LoRA adapter or saved task vector, applied to ``pre``. Prefixes of wrappers
            and transformers' or open_clip's names for CLIP don't matter, and an image encoder alone is completed from ``pre``.
        strict: refuse checkpoints of which one has tensors that the other lacks; with False these tensors are
            left out and named in a warning.

    Raises:
        MismatchError: if names, shapes or dtypes differ.

    >>> pre, finetuned = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([2.0, 0.0])}
    >>> tau = TaskVector(pre, finetuned)
    >>> tau.apply(pre, alpha=0.5)["w"]
    tensor([1.5000, 1.0000])
    >>> (-tau).apply(pre)["w"]
    tensor([0., 4.])
    """

    __slots__ = ("base", "form")
    __array_ufunc__ = None  # numpy's numbers leave multiplication to us

    def __init__(
        self, pre: CheckpointLike, finetuned: CheckpointLike, *, strict: bool = True
    ) -> None:
        base = open_checkpoint(pre)
        form, left_out = LinearForm.difference(
            open_matched(finetuned, base).form, base.form, strict=strict
        )
        if left_out:
            log.warning(
                "left out of the task vector, as only one of the checkpoints has them: %s",
                first_few(left_out),
            )
        self.form = form
        self.base: Origin | None = Origin.of(base)

    @classmethod
    def of_form(cls, form: LinearForm, base: Origin | None) -> TaskVector:
        vector = cls.__new__(cls)
        vector.form, vector.base = form, base
        return vector

    def __repr__(self) -> str:
        terms = [
            f"{coefficient:+g} {factor.source.ref}"
            for factor, coefficient in self.form.terms.items()
        ]
        return f"TaskVector({' '.join(terms) or '0'}, {len(self)} tensors)"

    # ------------------------------------------------------------ algebra

    def __add__(self, other: TaskVector | int) -> TaskVector:
        if other == 0:  # what sum() starts from
            return self
        if not isinstance(other, TaskVector):
            return NotImplemented
        return TaskVector.of_form(
            self.form.plus(rename_to_match(other.form, self.form)), Origin.common(self.base, other.base)
        )

    __radd__ = __add__

    def __mul__(self, alpha: Alpha | TaskVector) -> TaskVector:
        if isinstance(alpha, TaskVector):
            raise SpaceError(
                "task vectors can't be multiplied with each other; dot() and cosine() compare them"
            )
        return TaskVector.of_form(self.form.times(alpha), self.base)

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + (-other)

    def __truediv__(self, divisor: float) -> TaskVector:
        return self * (1.0 / divisor)

    def select(self, patterns: str | Iterable[str]) -> TaskVector:
        """Only the tensors whose names match a shell pattern, such as ``"visual.*"``, or one of several.

        Raises:
            UnknownNameError: if a pattern matches nothing.
        """
        return TaskVector.of_form(self.form.select(patterns), self.base)

    # ------------------------------------------------------------ numbers

    @overload
    def norm(self, *, per_tensor: None = None) -> float: ...
    @overload
    def norm(self, *, per_tensor: bool) -> dict[str, float]: ...
    def norm(self, *, per_tensor: bool | None = None) -> float | dict[str, float]:
        r"""The Euclidean norm :math:`\lVert\tau\rVert_2`, of the whole or of each tensor, in one streaming pass."""
        squares = {name: float(g[0, 0]) for name, g in gram([self.form]).items()}
        return (
            {name: math.sqrt(value) for name, value in squares.items()}
            if per_tensor
            else math.sqrt(math.fsum(squares.values()))
        )

    @overload
    def dot(self, other: TaskVector, *, per_tensor: None = None) -> float: ...
    @overload
    def dot(self, other: TaskVector, *, per_tensor: bool) -> dict[str, float]: ...
    def dot(self, other: TaskVector, *, per_tensor: bool | None = None) -> float | dict[str, float]:
        r"""The inner product :math:`\langle\tau, \tau'\rangle` over the tensors that both have."""
        products = {name: float(g[0, 1]) for name, g in gram([self.form, other.form]).items()}
        return products if per_tensor else math.fsum(products.values())

    @overload
    def cosine(self, other: TaskVector, *, per_tensor: None = None) -> float: ...
    @overload
    def cosine(self, other: TaskVector, *, per_tensor: bool) -> dict[str, float]: ...
    def cosine(
        self, other: TaskVector, *, per_tensor: bool | None = None
    ) -> float | dict[str, float]:
        """The cosine of the angle between two vectors over the tensors that both have; NaN if one of them is zero."""
        grams = gram([self.form, other.form])
        if per_tensor:
            return {name: _cosine(g) for name, g in grams.items()}
        return _cosine(sum(grams.values(), torch.zeros(2, 2, dtype=torch.float64)))

    # -------------------------------------------------------------- apply

    @overload
    def apply(
        self,
        base: M,
        alpha: Alpha = 1.0,
        *,
        strict: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> M: ...
    @overload
    def apply(
        self,
        base: str | Path,
        alpha: Alpha = 1.0,
        *,
        strict: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> Checkpoint: ...
    def apply(
        self,
        base: CheckpointLike,
        alpha: Alpha = 1.0,
        *,
        strict: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> Any:
        r"""The edited model :math:`\theta = \theta_{base} + \alpha\tau`. Nothing that is passed in is changed.

        ``alpha=0`` gives the base to the bit; for one vector on its own base, ``alpha=1`` gives the fine-tuned weights to
        the bit. Otherwise it accumulates in float32 (float64 for float64) and rounds once to the base's dtype.

        Args:
            base: what to edit: a module, a state dict, a path, a ref or a `Checkpoint`.
            alpha: one coefficient; a mapping of name patterns to coefficients, of which the first that matches counts, 0 where none does;
                or a list of coefficients over the depth of the layers (LiNeS, arXiv 2410.17146).
            strict: refuse a base that isn't the vector's own, instead of warning.
            on_nonfinite: what to do about NaN or Inf in the result of a module or dict: "ignore", "warn" or "error".

        Returns:
            What went in, edited: for a module a new one of its class and on its device, for a dict a dict, for all else a
            lazy `Checkpoint`, which is computed when it is saved or loaded.

        Raises:
            MismatchError: if the base lacks tensors of the vector, or has them in other shapes, or isn't its own and ``strict`` is True.
            UnknownNameError: if a pattern of ``alpha`` matches nothing.
            NonfiniteError: naming the tensors, if asked for.
        """
        opened = open_checkpoint(base)
        form = self._edit(opened, alpha, strict)
        if isinstance(base, nn.Module):
            module, tensors = _empty_copy(base)
            materialize(form, tensors, on_nonfinite=on_nonfinite)
            return module
        edited = Checkpoint(form, opened.architecture)
        if isinstance(base, Mapping) and not isinstance(base, Checkpoint):
            return edited.state_dict(like=base, on_nonfinite=on_nonfinite)
        return edited

    def apply_(
        self,
        module: nn.Module,
        alpha: Alpha = 1.0,
        *,
        base: CheckpointLike | None = None,
        strict: bool = False,
    ) -> nn.Module:
        """Make a resident module the base edited by ``alpha``, in place: for one alpha after another, without a second model.

        Args:
            module: what to fill. Its present values don't matter for the tensors that the vector has; the others are left as they are.
            alpha: as in `apply`.
            base: what to edit; the vector's own base by default. It must not be the module itself, whose values change.
            strict: as in `apply`.

        Returns:
            The module.

        Raises:
            MismatchError: if module, base and vector don't match.
            CheckpointError: if the module's own tensors are the base or part of the vector, or there is no base.
        """
        own = self.base.checkpoint if self.base else None
        opened = open_checkpoint(base) if base is not None else own
        if opened is None:
            raise CheckpointError(
                "this task vector doesn't hold its base; say apply_(module, alpha, base=...)"
            )
        form = self._edit(opened, alpha, strict).part(self.form.specs)
        targets = module.state_dict(keep_vars=True)
        missing = [name for name in form.specs if name not in targets]
        if missing:
            raise MismatchError(
                f"{type(module).__name__} lacks {len(missing)} tensors of the task vector: {first_few(missing)}"
            )
        load_into(form, module, strict=None)
        return module

    def _edit(self, base: Checkpoint, alpha: Alpha, strict: bool) -> LinearForm:
        start = base.form
        if self.base is not None:
            own = self.base.like(base)
            if own.matches(base):
                # The same weights in another place: take them from the vector's, so that coefficients cancel exactly.
                start = own.checkpoint.form if own.checkpoint else start
            else:
                mine, other = (
                    f"{self.base.ref} ({self.base.fingerprint})",
                    f"{base.ref} ({base.fingerprint})",
                )
                message = f"this task vector was made from {mine} and is applied to {other}"
                if strict:
                    raise MismatchError(message)
                log.warning(message)
        return start.plus(rename_to_match(self.form.times(alpha), base.form))

    # --------------------------------------------------------------- file

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        dtype: torch.dtype | None = None,
        compress: str | None = None,
    ) -> Path:
        """Write the deltas to a safetensors file whose metadata name base, expression and fingerprints.

        Args:
            path: the file.
            overwrite: replace a file that is there.
            dtype: of the deltas; by default float32 (float64 for float64). A saved delta is rounded to it, so the fine-tuned
                weights come back to the bit only from a vector that still refers to both checkpoints.
            compress: ``"bf16"``, ``"int8"`` (a scale for each row), ``"sparse:0.1"`` (the largest tenth of each tensor's entries) or
                ``"lowrank:16"``. The relative error that it introduces is in the metadata.

        Raises:
            OptionError: if there is no such compression, or a dtype is given beside it.
            OutputError: if the file exists or can't be written.
        """
        path = Path(path)
        if compress is not None:
            coding(compress)
            if dtype is not None:
                raise OptionError(
                    "a compressed task vector has the dtypes of its compression; leave dtype out"
                )
        specs = {
            n: Spec(s.shape, dtype or accumulator(s.dtype)) for n, s in self.form.specs.items()
        }
        form = replace(self.form, specs=specs)
        base = {"ref": self.base.ref, "fingerprint": self.base.fingerprint} if self.base else None
        record = {"kind": "task vector", **provenance(form), "base": base}
        if compress is not None:
            with atomic_output(path, overwrite=overwrite) as part:
                write_compressed(form, part, compress, record)
            return path
        with resumable_output(path, single=True, overwrite=overwrite) as folder:
            write(
                form,
                folder,
                layout(form, path.name, {"format": "pt", "weightops": json.dumps(record)}),
            )
        return path

    def save_lora(
        self,
        folder: str | Path,
        rank: int,
        *,
        fan_in_fan_out: bool = False,
        overwrite: bool = False,
    ) -> dict[str, float]:
        r"""Write the LoRA of a rank that is nearest to the vector, as a folder that peft loads (arXiv 2106.09685).

        Args:
            folder: the output.
            rank: of every matrix's :math:`BA`, which is its truncated singular value decomposition.
            fan_in_fan_out: weights are of shape ``(in, out)``, as in GPT-2.
            overwrite: replace a folder that is there.

        Returns:
            ``relative_error``: the norm of what the adapter lacks over the vector's; ``left_out``: changed tensors that aren't matrices.

        Raises:
            OptionError: if no matrix changed.
            OutputError: if the folder exists or can't be written.
        """
        base = self.base.ref if self.base else None
        with atomic_output(folder, overwrite=overwrite) as part:
            part.mkdir()
            lost = write_adapter(self.form, part, rank, fan_in_fan_out=fan_in_fan_out, base=base)
            (part / "README.md").write_text(
                adapter_card(base, rank, lost["relative_error"]), encoding="utf-8"
            )
            return lost

    @classmethod
    def load(cls, path: str | Path) -> TaskVector:
        """Open a file that `save` wrote; it is read when it is used.

        Raises:
            SpaceError: if the file holds weights rather than a task vector.
        """
        source = open_ref(path).form.sources[0]
        if source.space != "delta":
            raise SpaceError(
                f"{path} holds weights, not a task vector; make one with `weightops vector BASE {path}`"
            )
        if getattr(source, "replaced", None) is not None:
            raise SpaceError(
                f"{path} replaces whole modules, and so needs its base: TaskVector(base, {str(path)!r})"
            )
        record = getattr(source, "made_from", {}).get("base")
        if not isinstance(record, dict) or not {"ref", "fingerprint"} <= record.keys():
            return cls.of_form(LinearForm.of(source), None)
        return cls.of_form(LinearForm.of(source), Origin(record["ref"], record["fingerprint"], None))


class Origin:
    """The base that a task vector was made from: its name and fingerprint, and the weights where they are at hand."""

    def __init__(self, ref: str, fingerprint: str | None, checkpoint: Checkpoint | None) -> None:
        self.ref = ref
        self.recorded = fingerprint
        self.checkpoint = checkpoint

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Origin:
        """The base that a checkpoint is."""
        return cls(checkpoint.ref, None, checkpoint)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the base's weights."""
        if self.recorded is not None:
            return self.recorded
        assert self.checkpoint is not None
        return self.checkpoint.fingerprint

    def like(self, other: Checkpoint) -> Origin:
        """The same base in another checkpoint's names."""
        return Origin(
            self.ref, self.recorded, match_to_base(self.checkpoint, other) if self.checkpoint else None
        )

    def matches(self, other: Checkpoint) -> bool:
        """True if ``other`` is this base: the same place, or the same bits."""
        if self.checkpoint is None or other is self.checkpoint:
            return other is self.checkpoint or self.fingerprint == other.fingerprint
        a, b = self.checkpoint.form, other.form
        if len(a.terms) == len(b.terms) == 1 and a.base and b.base:
            return same_weights(a.base, b.base) and dict(a.specs) == dict(b.specs)
        return self.fingerprint == other.fingerprint

    @staticmethod
    def common(a: Origin | None, b: Origin | None) -> Origin | None:
        """The base of a sum: the one that both have, if they have one."""
        if a is None or b is None:
            return None
        if a is b or (a.checkpoint and b.checkpoint and a.matches(b.checkpoint)):
            return a
        same = a.checkpoint is None or b.checkpoint is None
        return (a if a.checkpoint else b) if same and a.fingerprint == b.fingerprint else None


@overload
def interpolate(a: M, b: CheckpointLike, alpha: Alpha) -> M: ...
@overload
def interpolate(a: str | Path, b: CheckpointLike, alpha: Alpha) -> Checkpoint: ...
def interpolate(a: Any, b: CheckpointLike, alpha: Alpha) -> Any:
    r"""Linear interpolation :math:`(1 - \alpha)\,a + \alpha\,b`, as `TaskVector(a, b).apply(a, alpha)` (arXiv 2208.05592).

    Args:
        a: weights at ``alpha = 0``; the result is of this kind (a module, a dict, or a lazy `Checkpoint`).
        b: weights at ``alpha = 1``.
        alpha: a number, or a mapping of name patterns to numbers.

    >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)["w"]
    tensor([0.2500, 0.2500])
    """
    return TaskVector(a, b).apply(a, alpha)


@overload
def average(models: Sequence[M], weights: Sequence[float] | None = None) -> M: ...
@overload
def average(models: Sequence[str | Path], weights: Sequence[float] | None = None) -> Checkpoint: ...
def average(models: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    r"""Weighted average :math:`\sum_i w_i \theta_i / \sum_i w_i` (uniform by default), of the kind of the first model.

    Raises:
        OptionError: if there are no models, or not one weight for each, or the weights sum to 0.
        MismatchError: if names, shapes or dtypes differ.

    >>> average([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], weights=[1, 3])["w"]
    tensor([0.7500, 0.7500])
    """
    weights = [1.0] * len(models) if weights is None else list(weights)
    total = math.fsum(weights)
    if not models or len(weights) != len(models) or total == 0:
        raise OptionError(
            f"average needs at least one model and as many weights, with a sum other than 0; got {len(models)} and {weights}"
        )
    first, *rest = models
    vectors = [
        TaskVector(first, model) * (weight / total)
        for model, weight in zip(rest, weights[1:], strict=True)
    ]
    zero = TaskVector(first, first)
    return sum(vectors, zero).apply(first)


def _cosine(g: torch.Tensor) -> float:
    norms = math.sqrt(float(g[0, 0])) * math.sqrt(float(g[1, 1]))
    return float(g[0, 1]) / norms if norms else math.nan


def _empty_copy(module: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A copy of a module whose parameters and buffers are allocated but not filled, and these by name.

    Buffers that aren't part of the state (such as an attention mask) are copied.
    """
    memo: dict[int, Any] = {}
    shared: dict[tuple[Any, ...], torch.Tensor] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        if id(tensor) not in memo:
            place = (
                (tensor.data_ptr(), tensor.shape, tensor.stride())
                if tensor.numel()
                else (id(tensor),)
            )
            with torch.inference_mode(False):
                blank = shared.setdefault(place, torch.empty_like(tensor, requires_grad=False))
                twin = (
                    nn.Parameter(blank, tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else blank
                )
            memo[id(tensor)] = twin
    copied = copy.deepcopy(module, memo)
    return copied, copied.state_dict(keep_vars=True)
