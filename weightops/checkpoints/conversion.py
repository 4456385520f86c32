"""Mappings from tensors to others that have other names or another arrangement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from weightops.algebra.source import Spec
from weightops.support.lazy import torch

Kind = Literal["copy", "transpose", "stack", "part", "converted"]


@dataclass(frozen=True)
class Conversion:
    """A computation of several tensors from several others, which only moves elements.

    Attributes:
        inputs: the names of the tensors that are read.
        outputs: the names of the tensors that are made.
        shapes: the shapes of the inputs; an input that is missing from a delta is zero.
        specs: the shapes and dtypes of the outputs.
        run: computes the outputs.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = field(repr=False)
    specs: tuple[Spec, ...] = field(repr=False)
    run: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]] = field(compare=False, repr=False)


class TensorMapping(NamedTuple):
    """The way a tensor is obtained from others.

    Attributes:
        kind: "copy", "transpose", "stack" for several joined in their first dimension, "part" for
            one of three equal parts, or "converted" for an output of a conversion.
        names: the names of the tensors that are read.
        part: the index of the part or output.
        conversion: the conversion.
    """

    kind: Kind
    names: tuple[str, ...]
    part: int = 0
    conversion: Conversion | None = None
