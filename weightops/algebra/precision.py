"""The precision that a model is run in: float32, or bfloat16 where the processor computes in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from weightops.errors import UnknownNameError
from weightops.support.allocator import keep_freed_memory
from weightops.support.lazy import torch

Precision = Literal["auto", "float32", "bfloat16"]
"""The precision to run a model in; auto is bfloat16 where that is native, else float32."""

_CPU_INFO = Path("/proc/cpuinfo")
_NATIVE = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of processors that multiply matrices of bfloat16: x86's and, the last, Arm's."""


def pick_precision(precision: str, device: torch.device) -> str:
    """Return the precision that is meant on a device: "float32" or "bfloat16".

    The environment variable ``WEIGHTOPS_PRECISION`` says what auto means on a machine.

    Raises:
        UnknownNameError: if there is no such precision.

    >>> pick_precision("float32", torch.device("cpu"))
    'float32'
    """
    known = get_args(Precision)
    if precision == "auto":
        precision = os.environ.get("WEIGHTOPS_PRECISION", "auto")
    if precision not in known:
        raise UnknownNameError(
            f"there is no precision {precision!r}", hint=f"known: {', '.join(known)}"
        )
    if precision != "auto":
        return precision
    return "bfloat16" if has_bfloat16(device) else "float32"


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices of bfloat16 without emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has_kernels = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return device.type == "cpu" and has_kernels and _cpu_has_bfloat16()


@cache
def _cpu_has_bfloat16() -> bool:
    with suppress(OSError):
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, flags = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return not _NATIVE.isdisjoint(flags.split())
    return False  # no Linux: torch's own kernels there have no bfloat16


@contextmanager
def computed_in(precision: str, device: torch.device) -> Iterator[None]:
    """Run a model in a precision: its matrices are multiplied in that, its sums are in float32.

    The backward pass of flash attention is slow in bfloat16 on CPU, so where gradients are taken
    there, attention is computed by its formula.

    Args:
        precision: "float32" or "bfloat16".
        device: where the model is.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type == "cpu":
        keep_freed_memory()
    lower = precision == "bfloat16"
    by_formula = lower and device.type == "cpu" and torch.is_grad_enabled()
    attention = sdpa_kernel(SDPBackend.MATH) if by_formula else nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=lower), attention:
        yield
