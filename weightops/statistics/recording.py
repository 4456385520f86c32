"""Record the Gram matrices of the inputs of all linear maps, whichever module computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode

from weightops.algebra.kernels import add_gram
from weightops.errors import CheckpointError
from weightops.support.lazy import F, nn, torch

_GROUPED_PRODUCT = getattr(torch.ops.aten, "_grouped_mm", None)
"""The operator of packed experts; older versions of torch lack it."""
_PRODUCTS = {
    torch.ops.aten.mm: (0, 1),
    torch.ops.aten.bmm: (0, 1),
    torch.ops.aten.addmm: (1, 2),
    torch.ops.aten.baddbmm: (1, 2),
}
"""Operator -> the places of the two factors among its arguments."""


_ROWS = 1024
"""The inputs of a convolution that are unfolded together, where those of one image aren't more."""


class Gram(NamedTuple):
    """The Gram matrices of the inputs of one weight.

    Attributes:
        tensor: the mean of ``x x'`` over inputs x, shape ``(d, d)``; or ``(blocks, d, d)`` for a
            weight whose parts, of equal height, have inputs of their own.
        input_first: the weight's first dimension is the input, not the last.
        rows: how many inputs there were; a list if there are several matrices.
    """

    tensor: torch.Tensor
    input_first: bool
    rows: int | list[int]


class _Use(NamedTuple):
    """The use of a weight by a product: of which equal parts, and with which dimension first."""

    parts: int
    used: range
    input_first: bool


@dataclass
class _Sum:
    """The sum of ``x x'`` for each part of one weight.

    Attributes:
        total: shape ``(parts, d, d)``, at least float32; only the lower triangle is complete.
        rows: the number of inputs of each part.
        input_first: see `Gram`.
        uses: how many products there were.
    """

    total: torch.Tensor
    rows: list[int]
    input_first: bool
    uses: int = 0

    def add(self, part: int, inputs: torch.Tensor) -> None:
        rows = inputs.to(self.total.dtype)
        add_gram(self.total[part], rows)
        self.rows[part] += len(rows)

    def gram(self) -> Gram:
        rows = torch.tensor(self.rows, dtype=self.total.dtype, device=self.total.device)
        mean = self.total.tril().add_(self.total.tril(-1).mT)
        mean = mean.div_(rows.clamp(min=1)[:, None, None]).cpu()
        if len(mean) == 1:
            return Gram(mean[0], self.input_first, self.rows[0])
        return Gram(mean, self.input_first, list(self.rows))


@dataclass
class _Share:
    """A weight whose inputs are another's: its owner, and how many products there were."""

    owner: str
    input_first: bool
    uses: int = 0


class GramRecorder(TorchDispatchMode):
    """A context in which each product with a parameter of a module adds to its Gram matrix.

    The products are seen below all modules, so nothing depends on their names or classes: a linear
    layer, a projection by a bare parameter, transformers' Conv1D, packed heads, packed experts and
    convolutions without groups, which are unfolded. Maps that take one input, such as q, k and v,
    share one matrix. Only the inputs of one map are held at a time.

    Args:
        module: the module. It must run without gradients.
        only: the names of the weights to record; all by default.
    """

    def __init__(self, module: nn.Module, only: Collection[str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = {
            parameter.untyped_storage().data_ptr(): (name, parameter)
            for name, parameter in module.named_parameters()
            if parameter.dim() > 1 and (only is None or name in only)
        }
        self._sums: dict[str, _Sum] = {}
        self._shares: dict[str, _Share] = {}
        self._last: tuple[torch.Tensor, int, str] | None = None

    def grams(self) -> dict[str, Gram]:
        """Return name -> Gram matrix; names with the same inputs share one tensor.

        Raises:
            CheckpointError: if a weight shared its inputs with another only at times.
        """
        made = {name: total.gram() for name, total in self._sums.items()}
        for name, share in self._shares.items():
            if share.uses != self._sums[share.owner].uses:
                raise CheckpointError(
                    f"{name} and {share.owner} have the same inputs only at times"
                )
            made[name] = made[share.owner]._replace(input_first=share.input_first)
        return made

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        operator: Any = getattr(func, "overloadpacket", None)
        if operator in _PRODUCTS:
            left, right = (args[place] for place in _PRODUCTS[operator])
            if self._find(right):
                self._see_product(left, right)
            elif self._find(left):
                self._see_product(right.mT, left.mT)
        elif operator is _GROUPED_PRODUCT:
            self._see_groups(*args[:3])
        elif operator is torch.ops.aten.convolution:
            self._see_convolution(*args)
        return func(*args, **(kwargs or {}))

    def _find(self, tensor: torch.Tensor) -> tuple[str, nn.Parameter] | None:
        """Return the parameter that a tensor is a view of, and its name."""
        return self._parameters.get(tensor.untyped_storage().data_ptr())

    def _see_product(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the inputs of ``inputs @ weight``, matrices or batches of them."""
        found = self._find(weight)
        assert found is not None
        name, parameter = found
        if weight.dim() == 3 and weight.stride(0) == 0:  # one matrix, expanded
            inputs, weight = inputs.reshape(-1, inputs.shape[-1]), weight[0]
        use = _use_of(weight, parameter)
        if use is None:
            return
        if weight.dim() == 3:
            self._add(name, use, list(inputs))
        else:
            self._add(name, use, [inputs] * len(use.used))

    def _see_groups(
        self, inputs: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor | None = None
    ) -> None:
        """Add the inputs of packed experts, each of which takes the rows up to its end."""
        found = self._find(weight)
        use = _use_of(weight, found[1]) if found and weight.dim() == 3 else None
        if found and use is not None and ends is not None and inputs.dim() == 2:
            groups = inputs[: int(ends[-1])].tensor_split(ends[:-1].tolist())
            self._add(found[0], use, list(groups))

    def _see_convolution(
        self,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> None:
        """Add the unfolded inputs of a convolution in one or two dimensions."""
        found = self._find(weight)
        if found is None or transposed or groups != 1 or weight.dim() not in (3, 4):
            return
        size = list(weight.shape[2:])
        if len(size) == 1:
            inputs, size = inputs[:, :, None], [1, *size]
            stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
        window = [tuple(given) for given in (size, dilation, padding, stride)]
        places = F.unfold(inputs[:1, :1], *window).shape[-1]
        for images in torch.split(inputs, max(_ROWS // places, 1)):
            rows = F.unfold(images, *window).mT.flatten(0, 1)
            self._add(found[0], _Use(1, range(1), False), [rows])

    def _add(self, name: str, use: _Use, inputs: list[torch.Tensor]) -> None:
        """Add the inputs of the used parts of a weight, or note whose inputs they are."""
        owner = self._owner_of(inputs[0]) if use.parts == 1 else None
        if name not in self._sums and owner is not None and owner != name:
            share = self._shares.setdefault(name, _Share(owner, use.input_first))
            share.uses += 1
            if share.owner == owner:
                return
        if name in self._shares:
            raise CheckpointError(f"{name} has the inputs of another weight only at times")
        if name not in self._sums:
            size, dtype = inputs[0].shape[-1], torch.promote_types(inputs[0].dtype, torch.float32)
            total = torch.zeros(use.parts, size, size, dtype=dtype, device=inputs[0].device)
            self._sums[name] = _Sum(total, [0] * use.parts, use.input_first)
        sums = self._sums[name]
        if len(sums.rows) != use.parts:
            raise CheckpointError(f"{name} is used whole and in parts")
        sums.uses += 1
        for part, rows in zip(use.used, inputs, strict=True):
            sums.add(part, rows)
        self._last = (inputs[0], inputs[0]._version, name)

    def _owner_of(self, inputs: torch.Tensor) -> str | None:
        """Return the weight that had the same inputs just before."""
        if self._last is None:
            return None
        last, version, name = self._last
        same = (
            last.data_ptr() == inputs.data_ptr()
            and last.shape == inputs.shape
            and last.stride() == inputs.stride()
            and version == inputs._version
            and len(self._sums[name].rows) == 1
        )
        return name if same else None


def _use_of(weight: torch.Tensor, parameter: torch.Tensor) -> _Use | None:
    """Return how a product's right factor uses a parameter; None if it isn't a simple part of it.

    Args:
        weight: a view of the parameter, shape ``(d, n)``, or ``(batch, d, n)``.
        parameter: shape ``(height, width)`` or ``(parts, height, width)``.
    """
    *_, height, width = parameter.shape
    if not parameter.is_contiguous() or parameter.dim() > 3:
        return None
    start = weight.storage_offset() - parameter.storage_offset()
    d, n = weight.shape[-2:]
    turned = weight.stride()[-2:] == (1, width) and d == width
    if not turned and (weight.stride()[-2:] != (width, 1) or d != height):
        return None
    if parameter.dim() == 3:
        if n != (height if turned else width):
            return None
        first, count = start // (height * width), weight.shape[0] if weight.dim() == 3 else 1
        return _Use(len(parameter), range(first, first + count), not turned)
    if weight.dim() != 2:
        return None
    first, whole = (start // width, height) if turned else (start, width)
    unit = math.gcd(n, first, whole)
    used = range(first // unit, (first + n) // unit)
    return _Use(whole // unit, used, not turned)
