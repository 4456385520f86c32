"""Which tensors arithmetic may touch, and in what precision."""

from __future__ import annotations

import torch

SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
"""What safetensors headers call the dtypes."""

_EDITABLE = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def is_editable(dtype: torch.dtype) -> bool:
    """True for the floating-point dtypes that weights are edited in; others are carried from the base."""
    return dtype in _EDITABLE


_QUANTISED = {
    "qweight",
    "qzeros",
    "absmax",
    "quant_map",
    "quant_state",
    "SCB",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_zero_point",
}
"""Parts of the names under which libraries keep what belongs to quantised weights."""


def is_unfit(name: str, dtype: torch.dtype) -> bool:
    """True for tensors whose differences would mean nothing: quantised weights and what belongs to them, float8, complex."""
    odd = (dtype.is_floating_point or dtype.is_complex) and not is_editable(dtype)
    return odd or not _QUANTISED.isdisjoint(name.split("."))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
