"""The dtypes of tensors: which of them can be edited, and in what precision.

A dtype goes by its short name, such as ``float32``, where torch isn't needed.
"""

from __future__ import annotations

from functools import cache

from weightops.errors import CheckpointError
from weightops.support.lazy import torch

SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}
"""Name in safetensors headers -> name of the dtype."""

NUMBERS_IN_AN_ELEMENT = {"F4": 2}
"""Name in safetensors headers -> numbers of the last dimension that torch keeps in one element."""

ITEM_SIZES = {
    name: width
    for width, names in {
        16: ("complex128",),
        8: ("float64", "int64", "uint64", "complex64"),
        4: ("float32", "int32", "uint32", "complex32", "bcomplex32", "qint32"),
        2: ("float16", "bfloat16", "int16", "uint16", "bits16"),
        1: (
            *("bool", "int8", "uint8", "qint8", "quint8", "quint4x2", "quint2x4"),
            *(name for name in SAFETENSORS.values() if name.startswith(("float4", "float8"))),
            *("bits8", "bits4x2", "bits2x4", "bits1x8"),
            *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
        ),
    }.items()
    for name in names
}
"""Name of a dtype of torch -> the bytes of one element."""

EDITABLE = ("float64", "float32", "bfloat16", "float16")
"""The dtypes that are edited and written."""


@cache
def name_of(dtype: torch.dtype | str) -> str:
    """Return the short name of a dtype, such as ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


@cache
def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a short name.

    Raises:
        CheckpointError: if this version of torch doesn't have it.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"torch {torch.__version__} has no dtype {name}", hint="newer versions may have it"
        )
    return dtype


def is_editable(dtype: torch.dtype | str) -> bool:
    """Return True for the dtypes of weights; tensors of other dtypes are copied from the base."""
    return name_of(dtype) in EDITABLE


def accumulator_name(name: str) -> str:
    """Return the name of the dtype to add up in; see `accumulator`."""
    return "float64" if name == "float64" else "float32"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to add up in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
