"""Modules without weights: what a checkpoint's model is made of, at no cost of memory."""

from __future__ import annotations

import copy
from typing import Any

from weightops.support.lazy import nn, torch


def blank_copy(module: nn.Module) -> nn.Module:
    """Copy a module with zeros for weights, which take no memory and are not to be written to.

    Tensors that are shared are shared in the copy.

    >>> blank = blank_copy(nn.Linear(1000, 1000))
    >>> blank.weight.shape, blank.weight.untyped_storage().nbytes()
    (torch.Size([1000, 1000]), 4)
    """
    memo: dict[int, Any] = {}
    for tensor in (
        *module.parameters(),
        *(buffer for buffer in module.buffers() if buffer.is_meta or buffer.numel() > 1 << 16),
    ):
        blank = torch.zeros((), dtype=_float(tensor.dtype)).expand(tensor.shape)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(blank, requires_grad=False) if is_parameter else blank
    return copy.deepcopy(module, memo)


def _float(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that weights of a dtype are computed in."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def shared_names(module: nn.Module) -> list[list[str]]:
    """Return the groups of names under which a module has one parameter.

    >>> module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> module[1].weight = module[0].weight
    >>> shared_names(module)
    [['0.weight', '1.weight']]
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]
