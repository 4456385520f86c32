"""Task vectors and the arithmetic on them (arXiv 2212.04089)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from weightops.algebra.linear_form import Alpha, LinearForm
from weightops.algebra.provenance import as_written
from weightops.checkpoints import ties
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.loading import load_into
from weightops.checkpoints.matching import in_common_names, match_names, open_matched
from weightops.checkpoints.module_copy import filled_copy
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.checkpoints.origin import Origin
from weightops.checkpoints.vector_files import open_vector, write_lora, write_vector
from weightops.engine.evaluate import OnNonfinite
from weightops.engine.reduce import cosine, gram
from weightops.engine.tensors import Tensors
from weightops.errors import CheckpointError, MismatchError, SpaceError
from weightops.support.atomic import Overwrite
from weightops.support.lazy import nn, torch
from weightops.support.text import first_few

log = logging.getLogger("weightops")

M = TypeVar("M", "nn.Module", "dict[str, torch.Tensor]", Checkpoint)
"""Kinds of weights that are edited to the same kind; a path or ref gives a `Checkpoint`."""


class TaskVector(Tensors):
    """The change of weights by fine-tuning, ``tau = theta_ft - theta_pre`` (arXiv 2212.04089).

    Nothing is computed or copied at first. ``+ - * /``, negation and ``sum()`` return further lazy
    vectors, and `apply` evaluates the whole expression in one pass. Tensors that aren't
    floating-point take no part.

    Args:
        pre: the pre-trained weights: a path, a ref, a `Checkpoint`, a ``dict[str, Tensor]`` or an
            ``nn.Module``.
        finetuned: the fine-tuned weights, of any of these kinds; or a LoRA adapter or saved task
            vector, which is applied to ``pre``. Prefixes of wrappers and transformers' or
            open_clip's names for CLIP don't matter, and ``pre`` completes an image encoder alone.
        strict: refuse checkpoints of which one has tensors that the other lacks; with False these
            tensors are left out and named in a warning.
        same_config: refuse checkpoints that are configured differently, and a stored vector of
            another base, instead of warning.

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
    __array_ufunc__ = None  # lets numpy's numbers be multiplied with a vector

    base: Origin | None

    def __init__(
        self,
        pre: CheckpointLike,
        finetuned: CheckpointLike,
        *,
        strict: bool = True,
        same_config: bool = False,
    ) -> None:
        base = open_checkpoint(pre)
        other = open_matched(finetuned, base, strict=same_config)
        base = ties.with_tied_names(base, other.specs)
        self.form, left_out = LinearForm.difference(other.form, base.form, strict=strict)
        self.base = Origin.of(base)
        if left_out:
            log.warning(
                "left out, as only one of the checkpoints has them: %s", first_few(left_out)
            )

    @classmethod
    def of_form(cls, form: LinearForm, base: Origin | None) -> TaskVector:
        """Return the vector that a form of deltas gives, with the base that it was made from."""
        vector = cls.__new__(cls)
        vector.form, vector.base = form, base
        return vector

    def __repr__(self) -> str:
        return f"TaskVector({as_written(self.form)!r}, {len(self)} tensors)"

    def __add__(self, other: TaskVector | int) -> TaskVector:
        if other == 0:  # the first summand of sum()
            return self
        if not isinstance(other, TaskVector):
            return NotImplemented
        mine, theirs = (Origin.checkpoint_of(v.base, v.form) for v in (self, other))
        form = self.form.plus(match_names(theirs, mine))
        return TaskVector.of_form(form, Origin.common(self.base, other.base))

    __radd__ = __add__

    def __mul__(self, alpha: Alpha | TaskVector) -> TaskVector:
        if isinstance(alpha, TaskVector):
            raise SpaceError(
                "task vectors can't be multiplied with each other",
                hint="dot() and cosine() compare them",
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
        """Return the vector with only the tensors whose names match a pattern, or one of several.

        Args:
            patterns: shell patterns, such as ``"visual.*"``.

        Raises:
            UnknownNameError: if a pattern matches nothing.
        """
        return TaskVector.of_form(self.form.select(patterns), self.base)

    @overload
    def norm(self, *, per_tensor: Literal[False] = False) -> float: ...
    @overload
    def norm(self, *, per_tensor: Literal[True]) -> dict[str, float]: ...
    def norm(self, *, per_tensor: bool = False) -> float | dict[str, float]:
        """Return the Euclidean norm ``||tau||``, of all tensors together or of each."""
        squares = {name: float(products[0, 0]) for name, products in gram([self.form]).items()}
        if per_tensor:
            return {name: math.sqrt(value) for name, value in squares.items()}
        return math.sqrt(math.fsum(squares.values()))

    @overload
    def dot(self, other: TaskVector, *, per_tensor: Literal[False] = False) -> float: ...
    @overload
    def dot(self, other: TaskVector, *, per_tensor: Literal[True]) -> dict[str, float]: ...
    def dot(self, other: TaskVector, *, per_tensor: bool = False) -> float | dict[str, float]:
        """Return the inner product ``<tau, other>`` over the tensors that both vectors have.

        Names are matched as in sums. Vectors without a tensor in common are a `MismatchError`.
        """
        grams = gram(in_common_names([self.form, other.form]))
        products = {name: float(products[0, 1]) for name, products in grams.items()}
        return products if per_tensor else math.fsum(products.values())

    @overload
    def cosine(self, other: TaskVector, *, per_tensor: Literal[False] = False) -> float: ...
    @overload
    def cosine(self, other: TaskVector, *, per_tensor: Literal[True]) -> dict[str, float]: ...
    def cosine(self, other: TaskVector, *, per_tensor: bool = False) -> float | dict[str, float]:
        """Return the cosine of the angle between the vectors, as `dot`; NaN if one is zero."""
        grams = gram(in_common_names([self.form, other.form]))
        if per_tensor:
            return {name: cosine(products) for name, products in grams.items()}
        return cosine(sum(grams.values(), torch.zeros(2, 2, dtype=torch.float64)))

    @overload
    def apply(
        self, base: M, alpha: Alpha = 1.0, *, strict: bool = False, on_nonfinite: OnNonfinite = ...
    ) -> M: ...
    @overload
    def apply(
        self,
        base: str | Path,
        alpha: Alpha = 1.0,
        *,
        strict: bool = False,
        on_nonfinite: OnNonfinite = ...,
    ) -> Checkpoint: ...
    def apply(
        self,
        base: CheckpointLike,
        alpha: Alpha = 1.0,
        *,
        strict: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> Any:
        """Return the edited model ``theta = theta_base + alpha * tau``; no argument is changed.

        ``alpha=0`` gives the base to the bit; for one vector on its own base, ``alpha=1`` gives the
        fine-tuned weights to the bit. Other results are accumulated in float32 (float64 for
        float64) and rounded once to the base's dtype.

        Args:
            base: the model to edit: a module, a state dict, a path, a ref or a `Checkpoint`.
            alpha: one coefficient; a mapping of name patterns to coefficients (the first that
                matches counts, 0 where none does); a list of coefficients over the depth of the
                layers; or such a list as ``{"lines": [...]}``, whose first number tensors outside
                of the layers get, too (LiNeS, arXiv 2410.17146).
            strict: refuse a base that isn't the vector's own, instead of warning.
            on_nonfinite: what to do about NaN or Inf in the result of a module or dict: "ignore",
                "warn" or "error".

        Returns:
            For a module, a new one of its class on its device; for a dict, a dict; for all else, a
            lazy `Checkpoint`, which is computed when it is saved or loaded.

        Raises:
            MismatchError: if the base lacks tensors of the vector, has them in other shapes, or
                isn't the vector's own and ``strict=True``.
            UnknownNameError: if a pattern of ``alpha`` matches nothing.
            NonfiniteError: naming the tensors, if ``on_nonfinite="error"``.
        """
        opened = ties.with_tied_names(open_checkpoint(base), self.form.specs)
        form = self._edited(opened, alpha, strict)
        edited = Checkpoint(form, ties.architecture_of_ends(form, opened))
        if isinstance(base, (str, Path, Checkpoint)):
            return edited
        if isinstance(base, nn.Module):
            return filled_copy(base, form, on_nonfinite=on_nonfinite)
        return edited.state_dict(like=base, on_nonfinite=on_nonfinite)

    def apply_(
        self,
        module: nn.Module,
        alpha: Alpha = 1.0,
        *,
        base: CheckpointLike | None = None,
        strict: bool = False,
    ) -> nn.Module:
        """Set a module to the edited base in place, so that many alphas need only one model.

        Args:
            module: the module to fill. The vector's tensors are overwritten, whatever they are; the
                others stay.
            alpha: as in `apply`.
            base: the model to edit; by default the vector's own base. It must not be the module
                itself, whose values change.
            strict: as in `apply`.

        Returns:
            The module.

        Raises:
            MismatchError: if module, base and vector don't match.
            CheckpointError: if there is no base, or the module's own tensors are the base or part
                of the vector.
        """
        own = self.base.checkpoint if self.base else None
        opened = open_checkpoint(base) if base is not None else own
        if opened is None:
            raise CheckpointError(
                "this task vector doesn't hold its base", hint="apply_(module, alpha, base=...)"
            )
        form = self._edited(opened, alpha, strict).part(self.form.specs)
        targets = module.state_dict(keep_vars=True)
        missing = [name for name in form.specs if name not in targets]
        if missing:
            raise MismatchError(
                f"{type(module).__name__} lacks {len(missing)} tensors of the task vector: "
                f"{first_few(missing)}"
            )
        load_into(form, module, strict=None)
        return module

    def _edited(self, base: Checkpoint, alpha: Alpha, strict: bool) -> LinearForm:
        if isinstance(alpha, (list, tuple)) and len(alpha) > 1:
            log.warning(
                "alpha's %d numbers are spread over the depth of the layers, as {'*': [...]} says "
                "without this warning; a model for each is [tau.apply(base, a) for a in alphas]",
                len(alpha),
            )
        start = self.base.start_at(base, self.form, strict=strict) if self.base else base.form
        vector = Origin.checkpoint_of(self.base, self.form.times(alpha))
        return start.plus(match_names(vector, base))

    def save(
        self,
        path: str | Path,
        *,
        overwrite: Overwrite = False,
        dtype: torch.dtype | None = None,
        compress: str | None = None,
    ) -> Path:
        """Write the deltas to a safetensors file; its metadata name base and expression.

        Args:
            path: the file.
            overwrite: replace a file that exists.
            dtype: the dtype of the deltas; by default float32 (float64 for float64). Deltas are
                rounded to it, so that only a vector that still refers to both checkpoints gives the
                fine-tuned weights to the bit.
            compress: ``"bf16"``, ``"int8"`` (a scale for each row), ``"sparse:0.1"`` (the largest
                tenth of each tensor's elements), ``"sparse:lossless"`` (all that aren't 0) or
                ``"lowrank:16"``. The relative error is in the metadata.

        Raises:
            OptionError: if there is no such compression, or it is given with a dtype.
            OutputError: if the file exists or can't be written.
        """
        base = self.base.describe() if self.base else None
        return write_vector(
            self.form, Path(path), base=base, overwrite=overwrite, dtype=dtype, compress=compress
        )

    def save_lora(
        self, folder: str | Path, rank: int, *, overwrite: Overwrite = False
    ) -> dict[str, float]:
        """Write the nearest LoRA of a rank, as a folder that peft loads (arXiv 2106.09685).

        The base's model shows which weights are of linear and embedding layers, and their names.

        Args:
            folder: the output.
            rank: the rank of each matrix ``B A``, the delta's truncated singular value
                decomposition.
            overwrite: replace a folder that exists.

        Returns:
            ``relative_error``: the norm of the error over that of the vector; ``left_out``: how
            many changed tensors are of other layers.

        Raises:
            OptionError: if no matrix changed.
            OutputError: if the folder exists or can't be written.
        """
        base, ref = (self.base.checkpoint, self.base.ref) if self.base else (None, None)
        return write_lora(self.form, Path(folder), rank, base=base, ref=ref, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> TaskVector:
        """Open a file that `save` wrote; its tensors are read when they are used.

        Raises:
            SpaceError: if the file holds weights rather than a task vector.
        """
        source = open_vector(path)
        return cls.of_form(LinearForm.of(source), Origin.of_record(source.made_from.get("base")))
