"""Methods that choose elements by what all inputs do: SCE and consensus with TALL masks."""

from __future__ import annotations

from typing import Literal

from weightops.algebra.kernels import add_rows
from weightops.algebra.names import Each
from weightops.engine.reduce import sums
from weightops.errors import OptionError
from weightops.merging.methods.consensus import divide_, elect_, flags, multiply_
from weightops.merging.methods.inputs import TensorInputs
from weightops.merging.methods.kept_elements import ALL, Cutoff, cutoffs
from weightops.merging.methods.method import chunks
from weightops.merging.methods.option_values import fraction, per_input
from weightops.support.lazy import torch

Unselected = Literal["drop", "merge"]


def _variance(values: torch.Tensor) -> torch.Tensor:
    """Return the variance over the inputs, shape ``(1, n)`` of ``(k, n)``."""
    centred = values - values.sum(0).div_(len(values))
    return centred.square_().sum(0, keepdim=True).div_(len(values))


def most_varying_elements(inputs: TensorInputs, select_topk: float) -> Cutoff:
    """Return the cutoff of the largest variances, a fraction of the elements that vary at all."""
    share = fraction(select_topk, "select_topk")
    if share == 1:
        return ALL
    [[cutoff]] = cutoffs(inputs, lambda _, n: [int(share * n)], _variance, of_nonzero=True)
    return cutoff


def _select(deltas: torch.Tensor, selected: Cutoff, start: int) -> torch.Tensor:
    return deltas if selected == ALL else deltas.mul_(selected.flags(_variance(deltas)[0], start))


def energy_shares(inputs: TensorInputs, selected: Cutoff, equal_below: float) -> torch.Tensor:
    """Return each input's share of the squares of the selected elements, shape ``(k,)``.

    The shares are equal where all selected elements are 0, or their mean squares sum to less than
    ``equal_below``.
    """
    squares = torch.zeros(inputs.k, dtype=torch.float64)
    for chunk in inputs:
        squares += sums(_select(chunk.values, selected, chunk.start).square_())
    total = squares.sum()
    weighed = total > 0 and total >= equal_below * inputs.numel
    shares = squares / total if weighed else torch.full_like(squares, 1 / len(squares))
    return shares.to(inputs.device, inputs.dtype)


@chunks(selected=most_varying_elements, energy=energy_shares)
def sce(
    deltas: torch.Tensor,
    selected: Cutoff,
    energy: torch.Tensor,
    start: int,
    *,
    select_topk: float = 1.0,
    equal_below: float = 0.0,
    unselected: Unselected = "drop",
) -> torch.Tensor:
    """Select the elements that vary most, weight inputs by energy, erase minority signs (SCE).

        t_i = tau_i where the variance over the inputs is among the largest, else 0
        w_i = ||t_i||^2 / sum_j ||t_j||^2
        agree_i = 1 where t_i sgn(sum_j t_j) > 0, else 0
        merged = sum_i agree_i w_i t_i / sum_i agree_i w_i

    Source: arXiv 2408.07990. Its authors' code selects for the weights w only: ``merge``.

    Args:
        deltas: shape ``(k, n)``.
        selected: the cutoff of the variances.
        energy: the weights w, shape ``(k,)``.
        start: the position of the part.
        select_topk: the fraction of the elements that vary over the inputs which is selected.
        equal_below: the sum of the inputs' mean squares below which all weigh alike; mergekit has
            1e-6, which ordinary fine-tuning is often below.
        unselected: "drop" leaves elements that aren't selected at the base; "merge" merges them
            with the others, t_i = tau_i, as the authors do.
    """
    kept = _select(deltas, selected, start) if unselected == "drop" else deltas
    sign = elect_(kept)
    shares = multiply_(flags(torch.gt, kept, 0), energy)
    return divide_(add_rows(multiply_(kept, energy)).mul_(sign), shares)


@chunks()
def tall_consensus(
    deltas: torch.Tensor, *, mask_scale: float | Each = 0.4, agreement: int = 2
) -> torch.Tensor:
    """Add the deltas where several inputs need an element, and drop it elsewhere (TALL masks).

        tau = sum_i tau_i
        needs_i = 1 where |tau_i| >= mask_scale_i |tau - tau_i|, else 0
        merged = tau where sum_i needs_i >= agreement, else 0

    Source: consensus merging, arXiv 2405.07813. Its code asks for more than the threshold, which
    differs where both are equal, as some are in bfloat16.

    Args:
        deltas: shape ``(k, n)``.
        mask_scale: the threshold of the masks, the paper's lambda, which its authors choose for
            each task by validation.
        agreement: the number of inputs that must need an element for it to be kept.

    Raises:
        OptionError: if a threshold is negative.
    """
    thresholds = per_input(mask_scale, len(deltas))
    if min(thresholds) < 0:
        raise OptionError(f"mask_scale is at least 0, not {mask_scale}")
    total = add_rows(deltas)
    scales = torch.tensor(thresholds, dtype=deltas.dtype).to(deltas.device)
    surplus = deltas.abs() - scales[:, None] * (total - deltas).abs()
    return total * flags(torch.ge, add_rows(flags(torch.ge, surplus, 0)), agreement)
