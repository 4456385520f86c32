"""Weight matching: the permutations of one model's units that bring its weights nearest to others.

Method: Ainsworth et al., "Git Re-Basin: merging models modulo permutation symmetries" (arXiv
2209.04836), section 3.2: one group of axes after another gets the permutation that maximises the
inner product of the weights, as a linear assignment, until none gains. Here the heads of an
attention are assigned by the best assignment of their units, and the first pass goes through the
groups in the model's order, with the weights whose other axes are matched already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TypeAlias

from weightops.algebra.dtypes import accumulator
from weightops.errors import NonfiniteError, missing_extra
from weightops.merging.alignment.axes import QKV, Axes, Heads, group_of
from weightops.support.lazy import torch

Read: TypeAlias = "Callable[[str], torch.Tensor]"
Orders: TypeAlias = "dict[str, torch.Tensor]"
Use = tuple[str, int, str]
"""A tensor, one of its axes, and the axis' label."""

_GAIN = 1e-5
"""The least gain, relative to the inner product, for which a permutation is changed."""
_PASSES = 100


def match_weights(axes: Axes, reference: Read, model: Read) -> Orders:
    """Return label -> the order in which a model's units are like those of a reference.

    Args:
        axes: which axes permute together.
        reference: the function that reads a tensor of the reference.
        model: the function that reads a tensor of the model.

    Raises:
        NonfiniteError: if weights hold NaN or Inf.
        MissingExtraError: without scipy.
    """
    uses: dict[str, list[Use]] = {}
    for name, labels in axes.labels.items():
        for axis, label in enumerate(labels):
            if label is None or "running_" in name:
                continue
            if group_of(label) not in _others(axes, (name, axis, label)):
                uses.setdefault(group_of(label), []).append((name, axis, label))
    orders = {label: torch.arange(size) for label, size in axes.sizes.items()}
    for group, heads in axes.heads.items():
        orders |= {f"{group}:{part}": torch.arange(size) for part, size in _sizes(heads).items()}
    settled, stale = set[str](), dict.fromkeys(uses)
    for _ in range(_PASSES):
        for group in list(stale):
            del stale[group]
            ready = [use for use in uses[group] if _others(axes, use) <= settled]
            if len(ready) < len(uses[group]):
                stale[group] = None
            gains = _gains(axes, ready or uses[group], orders, reference, model)
            settled.add(group)
            changed = _improved(gains, group, axes.heads.get(group), orders)
            if changed:
                orders |= changed
                touched = set[str]().union(*(_others(axes, use) for use in uses[group]))
                stale |= dict.fromkeys(sorted(touched))
        if not stale:
            break
    return orders


def _sizes(heads: Heads) -> dict[str, int]:
    return {
        "q": heads.queries * heads.width,
        "k": heads.values * heads.width,
        "v": heads.values * heads.value_width,
        "o": heads.queries * heads.value_width,
    }


def _others(axes: Axes, use: Use) -> set[str]:
    """Return the groups of the other axes of a tensor."""
    name, axis, _ = use
    labels = [label for i, label in enumerate(axes.labels[name]) if i != axis]
    return {group_of(label) for label in labels if label is not None}


def permuted(
    tensor: torch.Tensor,
    labels: Sequence[str | None],
    orders: Mapping[str, torch.Tensor],
    but: int | None = None,
) -> torch.Tensor:
    """Return a tensor with each of its axes, but one, in the order of its label.

    >>> permuted(torch.tensor([[1, 2], [3, 4]]), ("a", None), {"a": torch.tensor([1, 0])})
    tensor([[3, 4],
            [1, 2]])
    """
    for axis, label in enumerate(labels):
        if label is not None and axis != but:
            tensor = tensor.index_select(axis, orders[label])
    return tensor


def _gains(
    axes: Axes, uses: Sequence[Use], orders: Orders, reference: Read, model: Read
) -> dict[str, torch.Tensor]:
    """Return label -> the inner products of the reference's units (rows) and the model's."""
    gains: dict[str, torch.Tensor] = {}
    for name, axis, label in uses:
        own, other = reference(name), permuted(model(name), axes.labels[name], orders, but=axis)
        rows = [_rows(tensor, axis) for tensor in (own, other)]
        packed = label.endswith(":qkv")
        labels = [f"{group_of(label)}:{part}" for part in QKV] if packed else [label]
        parts = [part.chunk(len(labels)) for part in rows]
        for key, a, b in zip(labels, *parts, strict=True):
            product_ = a @ b.T
            if not product_.isfinite().all():
                raise NonfiniteError(f"{name} holds NaN or Inf: its units can't be matched")
            gains[key] = gains[key] + product_ if key in gains else product_
    return gains


def _rows(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    return tensor.to(accumulator(tensor.dtype)).movedim(axis, 0).reshape(tensor.shape[axis], -1)


def _improved(
    gains: Mapping[str, torch.Tensor], group: str, heads: Heads | None, orders: Orders
) -> Orders | None:
    """Return the best orders of a group's labels; None if they gain nothing."""
    if heads is None:
        found = {group: _assigned(gains[group])}
    else:
        zero = torch.zeros(())
        full = {
            part: gains.get(f"{group}:{part}", zero.expand(size, size))
            for part, size in _sizes(heads).items()
        }
        found = {f"{group}:{part}": order for part, order in _heads_matched(full, heads).items()}
        found[f"{group}:qkv"] = _packed([found[f"{group}:{part}"] for part in QKV])
    before, after = (
        sum(_value(gain, of[label]) for label, gain in gains.items()) for of in (orders, found)
    )
    return found if after - before > _GAIN * abs(before) else None


def _packed(orders: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the order of an axis that has queries, keys and values one after another."""
    return torch.cat([order + i * len(order) for i, order in enumerate(orders)])


def _value(gain: torch.Tensor, order: torch.Tensor) -> float:
    return float(gain[torch.arange(len(order)), order].sum(dtype=torch.float64))


def _assigned(gain: torch.Tensor) -> torch.Tensor:
    """Return for each row the column that is its own, with the largest sum."""
    try:
        from scipy import optimize  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise missing_extra("scipy", "align", "to match the units of models") from None
    return torch.from_numpy(optimize.linear_sum_assignment(gain.numpy(), maximize=True)[1])


def _heads_matched(gains: Mapping[str, torch.Tensor], heads: Heads) -> Orders:
    """Return the order of each part of an attention: of its heads, and of the units within one."""
    blocks = {part: _blocks(gain, heads, part) for part, gain in gains.items()}
    values = torch.zeros(heads.values, heads.values)
    inner: dict[tuple[int, int], tuple[Orders, torch.Tensor]] = {}
    for own, other in product(range(heads.values), repeat=2):
        inner[own, other] = _one_matched(blocks, heads, own, other)
        units, within = inner[own, other]
        queries = _queries(heads, own, torch.arange(heads.per_value)).tolist()
        others = _queries(heads, other, within).tolist()
        values[own, other] = (
            _value(blocks["k"][own, other], units["k"])
            + _value(blocks["v"][own, other], units["v"])
            + sum(
                _value(blocks["q"][i, j], units["k"]) + _value(blocks["o"][i, j], units["v"])
                for i, j in zip(queries, others, strict=True)
            )
        )
    orders: dict[str, list[torch.Tensor]] = {part: [] for part in gains}
    for own, other in enumerate(_assigned(values).tolist()):
        units, within = inner[own, other]
        orders["k"].append(other * heads.width + units["k"])
        orders["v"].append(other * heads.value_width + units["v"])
        for query in _queries(heads, other, within).tolist():
            orders["q"].append(query * heads.width + units["k"])
            orders["o"].append(query * heads.value_width + units["v"])
    return {part: torch.cat(order) for part, order in orders.items()}


def _one_matched(
    blocks: Mapping[str, torch.Tensor], heads: Heads, own: int, other: int
) -> tuple[Orders, torch.Tensor]:
    """Return the order of the units of a head of values, and of the heads of queries it serves."""
    count = heads.per_value
    queries = slice(own * count, (own + 1) * count), slice(other * count, (other + 1) * count)
    q, o = blocks["q"][queries], blocks["o"][queries]
    k, v = blocks["k"][own, other], blocks["v"][own, other]
    fixed = torch.arange(heads.width)
    if count == 1:
        keys = fixed if heads.rotary else _assigned(k + q[0, 0])
        return {"k": keys, "v": _assigned(v + o[0, 0])}, torch.arange(1)
    units = within = _assigned(v)
    for _ in range(2):
        rows = torch.arange(heads.value_width)
        within = _assigned(q[..., fixed, fixed].sum(-1) + o[..., rows, units].sum(-1))
        units = _assigned(v + o[torch.arange(count), within].sum(0))
    return {"k": fixed, "v": units}, within


def _queries(heads: Heads, value: int, within: torch.Tensor) -> torch.Tensor:
    return value * heads.per_value + within


def _blocks(gain: torch.Tensor, heads: Heads, part: str) -> torch.Tensor:
    """Return the inner products by head: shape (heads, heads, units, units)."""
    width = heads.width if part in "qk" else heads.value_width
    count = len(gain) // width
    return gain.reshape(count, width, count, width).permute(0, 2, 1, 3)
