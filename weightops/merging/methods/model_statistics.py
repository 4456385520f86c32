"""The statistics of a merge's models, as a method asks for them: tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from weightops.algebra.names import layer_of
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import Source, Spec
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.engine.evaluate import stacked
from weightops.engine.reduce import gram as inner_products
from weightops.errors import MismatchError, OptionError
from weightops.merging.methods.method import STATISTICS, Method
from weightops.statistics.statistic import Kind, Statistic
from weightops.support.lazy import torch
from weightops.support.text import first_few

log = logging.getLogger("weightops")

Given = Sequence[Mapping[str, Any]]
"""For each model, kind of statistic -> what holds it; see `Statistic`."""


class MatrixLayout(NamedTuple):
    """The cut of a linear map's weight into matrices ``(out, in)`` with Gram matrices.

    Attributes:
        parts: the number of matrices.
        input_first: the weight's first dimension (of each part's matrix) is the input.
    """

    parts: int
    input_first: bool

    def matrices(self, stack: torch.Tensor) -> torch.Tensor:
        """Return the tensors of k models, ``(k, ...)``, as ``(parts, k, out, in)``."""
        k, *shape = stack.shape
        if self.input_first:
            packed = stack.reshape(k, shape[0], self.parts, -1).transpose(1, 2)
            return (stack if len(shape) == 3 else packed).transpose(0, 1).mT
        if len(shape) == 3 and self.parts == shape[0]:
            return stack.transpose(0, 1)
        return stack.reshape(k, self.parts, shape[0] // self.parts, -1).transpose(0, 1)

    def joined(self, matrices: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """Return merged matrices ``(out, in)``, one for each part, as a tensor of a shape."""
        if not self.input_first:
            return torch.stack(list(matrices)).reshape(tuple(shape))
        turned = [matrix.mT for matrix in matrices]
        return torch.stack(turned) if len(shape) == 3 else torch.cat(turned, dim=1)


class ModelStatistics:
    """The statistics that one method takes, of all models.

    Args:
        method: the method.
        given: what holds them; None if nothing was given.
        specs: the tensors that are merged.

    Raises:
        OptionError: if the method takes statistics and there are none, or the reverse.
        MismatchError: if they don't fit the models, or each other.
    """

    def __init__(
        self, method: Method, given: Given | None, count: int, specs: Mapping[str, Spec]
    ) -> None:
        self._specs = specs
        _check_given(method, given, count)
        self.of: dict[Kind, list[Statistic]] = {
            kind: [Statistic(entry[kind], kind) for entry in given or ()]
            for kind in method.statistics
        }
        for kind, statistics in self.of.items():
            self._check_names(kind, statistics)
        self._warn_of_few_inputs()

    def _check_names(self, kind: str, statistics: Sequence[Statistic]) -> None:
        """Refuse statistics of other tensors than the models', or of only some models'."""
        first = statistics[0].checkpoint.specs
        for other in statistics:
            own = other.checkpoint.specs
            if own.keys() != first.keys():
                raise MismatchError(
                    f"{statistics[0].ref} and {other.ref} are statistics of different tensors: "
                    f"only one has {first_few(sorted(own.keys() ^ first.keys()))}",
                    hint="collect both from models of one architecture",
                )
            strange = [name for name in own if name not in self._specs]
            if strange or not own:
                raise MismatchError(
                    f"{other.ref} is a statistic of {first_few(strange) or 'nothing'}, which the "
                    "models don't have",
                    hint="collect it from the models in the library that they are merged in",
                )
            for name in own:
                self._check_shape(kind, other, name)
            self._check_layers(other)

    def _warn_of_few_inputs(self) -> None:
        """Warn of maps with fewer inputs in all Gram matrices than an input has elements."""
        grams = self.of.get("gram", [])
        known = [statistic.record.get("rows", {}) for statistic in grams]
        few = [
            name
            for name, spec in (grams[0].checkpoint.specs.items() if grams else ())
            if all(isinstance(rows.get(name), int) for rows in known)
            and sum(rows[name] for rows in known) < spec.shape[-1]
        ]
        if few:
            log.warning(
                "%s: fewer inputs than their width, from too few images, at %s",
                ", ".join(statistic.ref for statistic in grams),
                first_few(few),
            )

    def _check_layers(self, statistic: Statistic) -> None:
        """Refuse a statistic that lacks a tensor that it has of other layers, or was made with."""
        own = statistic.checkpoint.specs
        alike = {(layer.before, layer.after) for name in own if (layer := layer_of(name))}
        lacking = [
            name
            for name in self._specs
            if name not in own
            and ".experts." not in name  # which few inputs may leave out
            and (layer := layer_of(name))
            and (layer.before, layer.after) in alike
        ]
        if lacking:
            raise MismatchError(
                f"{statistic.ref} lacks {first_few(lacking)}, and has the same of other layers",
                hint="collect it again from the whole model",
            )
        made = statistic.record.get("tensors", len(own))
        if made != len(own):
            raise MismatchError(
                f"{statistic.ref} holds {len(own)} of the {made} tensors that it was made with",
                hint="collect it again from the whole model",
            )

    def _check_shape(self, kind: str, statistic: Statistic, name: str) -> None:
        shape, dtype = statistic.checkpoint.specs[name]
        weight = self._specs[name]
        if kind == "fisher":
            fits = shape == weight.shape
        else:
            fits = len(shape) in (2, 3) and shape[-1] == shape[-2] and self._fits(statistic, name)
        if not fits:
            again = f"collect it from the models: `weightops statistics --kind {kind}`"
            raise MismatchError(
                f"{statistic.ref} holds {name} with shape {shape}, and no {kind} of a weight of "
                f"shape {weight.shape} has that",
                hint=again if statistic.record else f"it doesn't say of what model it is; {again}",
            )
        if weight.dtype_name == "float64" != dtype:
            raise MismatchError(
                f"{statistic.ref} holds {name} in float32, and the weight is float64",
                hint="collect the statistic from the model in float64",
            )

    def _fits(self, statistic: Statistic, name: str) -> bool:
        """Return True if a Gram matrix has the size of the inputs of a weight."""
        layout, shape = self._layout(statistic, name), self._specs[name].shape
        size = statistic.checkpoint.specs[name].shape[-1]
        if len(shape) < 2:
            return False
        if layout.input_first:
            other = shape[-1] if len(shape) == 2 else layout.parts
            return shape[-2] == size and other % layout.parts == 0
        packed = len(shape) == 3 and layout.parts == shape[0] and layout.parts > 1
        inputs = shape[2] if packed else torch.Size(shape[1:]).numel()
        return inputs == size and shape[0] % layout.parts == 0

    def _layout(self, statistic: Statistic, name: str) -> MatrixLayout:
        shape = statistic.checkpoint.specs[name].shape
        return MatrixLayout(shape[0] if len(shape) == 3 else 1, name in statistic.input_first)

    def arguments(self, name: str, dtype: torch.dtype, scratch: Scratch) -> dict[str, Any]:
        """Return the arguments of the method at a tensor: None for statistics without it.

        Raises:
            NonfiniteError: if a statistic holds NaN or infinities.
            MismatchError: if it holds what no statistic of its kind does.
        """
        found: dict[str, Any] = {"fisher_norms": None}
        for parameter, kind in STATISTICS.items():
            statistics = self.of.get(kind, ())
            found[parameter] = None
            if not statistics or name not in statistics[0].checkpoint.specs:
                continue
            stack = stacked([statistic.form for statistic in statistics], name, dtype, scratch)
            for statistic, tensor in zip(statistics, stack, strict=True):
                statistic.check_values(tensor)
            found[parameter] = stack
        if "fisher" in self.of:
            found["fisher_norms"] = self._norms.to(scratch.device, dtype)
        return found

    def layout(self, name: str) -> MatrixLayout | None:
        """Return how the weight of a linear map is cut; None if there is no Gram matrix of it.

        Raises:
            MismatchError: if the models use it differently.
        """
        statistics = self.of.get("gram", ())
        if not statistics or name not in statistics[0].checkpoint.specs:
            return None
        layouts = {self._layout(statistic, name) for statistic in statistics}
        if len(layouts) > 1:
            raise MismatchError("the models use the weight in different ways, by their statistics")
        return layouts.pop()

    @cached_property
    def _norms(self) -> torch.Tensor:
        """The norm of each model's Fisher information over all tensors, shape ``(k,)``."""
        products = inner_products([statistic.form for statistic in self.of["fisher"]])
        norms = torch.stack([matrix.diagonal() for matrix in products.values()]).sum(0).sqrt()
        for statistic, norm in zip(self.of["fisher"], norms.tolist(), strict=True):
            if norm == 0:
                raise MismatchError(
                    f"{statistic.ref} is 0 everywhere: it says nothing of the model",
                    hint="collect it from more images, or with labels true",
                )
        return norms

    def merged(
        self,
        name: str,
        stack: torch.Tensor,
        merge: Callable[[Mapping[str, Any]], torch.Tensor],
        parameter: str,
        scratch: Scratch,
    ) -> torch.Tensor:
        """Merge the tensors of one name, matrix by matrix where they have Gram matrices.

        Args:
            name: the name of the tensor.
            stack: the models' tensors, shape ``(k, ...)``.
            merge: calls the method with some more arguments.
            parameter: the name of the method's parameter for the tensors.
            scratch: the buffers to read statistics with.
        """
        given = self.arguments(name, stack.dtype, scratch)
        layout = self.layout(name)
        if layout is None:
            return merge({parameter: stack, **given})
        grams = given.pop("grams")
        grams = grams.transpose(0, 1) if grams.dim() == 4 else grams[None]
        pairs = zip(layout.matrices(stack), grams, strict=True)
        merged = [merge({parameter: part, **given, "grams": gram}) for part, gram in pairs]
        return layout.joined(merged, stack.shape[1:])

    @property
    def leaves(self) -> list[Source]:
        """The places that are read."""
        return [leaf for each in self.of.values() for s in each for leaf in s.form.leaves]

    def working_bytes(self, name: str) -> int:
        """Return the bytes that the statistics of a tensor take."""
        sizes = [
            statistic.checkpoint.specs[name].nbytes
            for each in self.of.values()
            for statistic in each
            if name in statistic.checkpoint.specs
        ]
        return 2 * sum(sizes)

    def describe(self) -> dict[str, Any]:
        """Return what identifies them, for provenance; nothing if there are none."""
        records = {kind: [s.describe() for s in each] for kind, each in self.of.items()}
        return {"statistics": records} if records else {}


def _check_given(method: Method, given: Given | None, count: int) -> None:
    """Refuse statistics that a method doesn't take, and a method without those that it takes."""
    kinds = method.statistics
    if not kinds:
        if given and any(given):
            raise OptionError(f"{method.name} takes no statistics", hint="leave out statistics=")
        return
    one = given if isinstance(given, (str, Path, Mapping)) else None
    listed = list(given or ()) if one is None else [one]
    plain = [isinstance(entry, Mapping) and not isinstance(entry, Checkpoint) for entry in listed]
    if one is not None or not all(plain):
        strange = listed[plain.index(False)] if one is None else one
        raise OptionError(
            f"statistics= has a mapping for each model, not {strange!r:.80}",
            hint=f'[{{"{kinds[0]}": "a.safetensors"}}, {{"{kinds[0]}": "b.safetensors"}}]',
        )
    if len(listed) != count:
        raise OptionError(
            f"{method.name} needs the {' and '.join(kinds)} statistics of {count} models, and "
            f"there are those of {len(listed)}",
            hint="statistics= has an entry for each model; `weightops statistics` makes them",
        )
    for i, entry in enumerate(listed):
        if set(entry) != set(kinds):
            raise OptionError(
                f"{method.name} takes the statistics {' and '.join(kinds)}, and model {i + 1} has "
                f"{first_few(entry) or 'none'}",
                hint=f"`weightops statistics --kind {kinds[0]}` makes one",
            )
