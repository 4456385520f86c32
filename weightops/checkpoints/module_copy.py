"""Copy a module, with other weights or without any."""

from __future__ import annotations

import copy
from typing import Any

from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.linearized import check_taken_by
from weightops.engine.evaluate import OnNonfinite, materialize
from weightops.support.lazy import nn, torch


def filled_copy(
    module: nn.Module, form: LinearForm, *, on_nonfinite: OnNonfinite = "ignore"
) -> nn.Module:
    """Return a new module of a module's class, on its device, with the tensors of a form."""
    check_taken_by(module, form)
    copied, tensors = empty_copy(module)
    materialize(form, tensors, on_nonfinite=on_nonfinite)
    return copied


def empty_copy(module: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Copy a module, with parameters and buffers that are allocated but not filled.

    Tensors that share memory do so in the copy. Buffers that aren't part of the state, such as an
    attention mask, are copied with their values.

    Returns:
        The copy, and its tensors by name.
    """
    memo: dict[int, Any] = {}
    blanks: dict[tuple[Any, ...], torch.Tensor] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        if id(tensor) in memo:
            continue
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride())
        with torch.inference_mode(False):
            blank = blanks.setdefault(
                memory if tensor.numel() else (id(tensor),),
                torch.empty_like(tensor, requires_grad=False),
            )
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if is_parameter else blank
    copied = copy.deepcopy(module, memo)
    return copied, copied.state_dict(keep_vars=True)
