"""The dtypes of tensors: which of them can be edited, and in what precision."""

from __future__ import annotations

from functools import cache

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
    **{
        name: getattr(torch, dtype)
        for name, dtype in {
            "F8_E8M0": "float8_e8m0fnu",
            "F8_E4M3FNUZ": "float8_e4m3fnuz",
            "F8_E5M2FNUZ": "float8_e5m2fnuz",
            "F4": "float4_e2m1fn_x2",
        }.items()
        if hasattr(torch, dtype)  # newer versions of torch have more
    },
}
"""Name in safetensors headers -> dtype."""

NUMBERS_IN_AN_ELEMENT = {"F4": 2}
"""Name in safetensors headers -> numbers of the last dimension that torch keeps in one element."""

_EDITABLE = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def is_editable(dtype: torch.dtype) -> bool:
    """Return True for the dtypes of weights; tensors of other dtypes are copied from the base."""
    return dtype in _EDITABLE


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to add up in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def name_of(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, such as ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
