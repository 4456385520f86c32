"""Layouts of quantised weights, each read as the numbers that its own library gives, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from weightops.algebra.dtypes import dtype_of
from weightops.algebra.source import Source, Spec
from weightops.errors import CheckpointError
from weightops.support.json_files import parse_json
from weightops.support.lazy import torch
from weightops.support.text import first_few

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of 4-bit floating-point codes of the OCP Microscaling specification."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place within 32 bits of each of eight neighbouring columns."""
_MOST_NUMBERS = 4
"""The most numbers in a byte, of 2 bits each."""
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


class Decoder(NamedTuple):
    """The computation of a tensor from stored ones.

    Attributes:
        parts: the names of the stored tensors.
        spec: the shape of the result, and its dtype, which is that of the layout's own library.
        decode: computes the result from the stored tensors, in their order.
    """

    parts: tuple[str, ...]
    spec: Spec
    decode: Callable[..., torch.Tensor]


def decoders(stored: Source, settings: Mapping[str, Any]) -> Iterator[tuple[str, Decoder]]:
    """Yield name -> decoder of all quantised tensors, each by the first layout that fits."""
    for name in stored.specs:
        for suffix, layout in _LAYOUTS.items():
            if name.endswith(suffix):
                stem = name.removesuffix(suffix)
                with sound(stored, name):
                    found = layout(stored, stem, settings)
                    if found and found.spec.numel > _MOST_NUMBERS * _bytes(stored, found.parts):
                        raise ValueError("it claims more numbers than it stores")
                if found:
                    new = stem if suffix == "_blocks" else f"{stem}.weight"
                    yield new, found
                    break


@contextmanager
def sound(stored: Source, name: str) -> Iterator[None]:
    """Refuse quantised tensors that don't fit each other, or what is said of them."""
    try:
        yield
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as e:
        reason = first_few(str(e).splitlines() or [type(e).__name__], 1)
        raise CheckpointError(f"{name} of {stored.ref} isn't soundly quantised: {reason}") from e


def _bytes(stored: Source, names: Iterable[str]) -> int:
    return sum(stored.specs[name].nbytes for name in names)


def _existing(stored: Source, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in stored.specs)


# -------------------------------------------------------------------- MXFP4 and float8


def _mxfp4(stored: Source, stem: str, settings: Mapping[str, Any]) -> Decoder | None:
    """Decode blocks of 32 4-bit floats with a power of two each, as GPT-OSS has them."""
    blocks, scales = f"{stem}_blocks", f"{stem}_scales"
    if scales not in stored.specs or len(stored.specs[blocks].shape) != 4:
        return None
    experts, rows, groups, width = stored.specs[blocks].shape
    spec = Spec((experts, groups * width * 2, rows), "bfloat16")

    def decode(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
        table = torch.tensor(_E2M1, dtype=torch.bfloat16)
        values = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], -1)
        scaled = torch.ldexp(values.flatten(-2), exponents[..., None].int() - 127)
        return scaled.reshape(experts, rows, -1).transpose(1, 2)

    return Decoder((blocks, scales), spec, decode)


def _float8(stored: Source, stem: str, settings: Mapping[str, Any]) -> Decoder | None:
    """Decode float8 numbers with a scale for each block, row or tensor."""
    weight = f"{stem}.weight"
    scales = _existing(stored, f"{stem}.weight_scale_inv", f"{stem}.weight_scale")
    if stored.specs[weight].dtype_name not in FLOAT8 or not scales:
        return None
    shape, scale = stored.specs[weight].shape, stored.specs[scales[0]]
    grid = (*scale.shape, 1) if len(scale.shape) == 1 and scale.numel > 1 else scale.shape
    block = settings.get("weight_block_size")
    sizes = {
        dim: block[dim] if block else _block_size(shape[dim], grid[dim])
        for dim in (-2, -1)
        if len(grid) > 1 and grid[dim] > 1
    }
    if any(not size or -(-shape[dim] // size) != grid[dim] for dim, size in sizes.items()):
        raise CheckpointError(
            f"{scales[0]} of {stored.ref} has shape {tuple(scale.shape)}, which doesn't divide "
            f"{weight} of shape {tuple(shape)} into blocks"
        )

    def decode(codes: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        if factors.dtype == torch.uint8:
            factors = torch.ldexp(torch.ones(()), factors.int() - 127)
        factors = factors.float().reshape(grid)
        for dim, size in sizes.items():
            factors = factors.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
        return codes.float() * factors

    spec = Spec(shape, scale.dtype_name if scale.is_editable else "bfloat16")
    return Decoder((weight, scales[0]), spec, decode)


def _block_size(length: int, count: int) -> int:
    """Return the size of ``count`` blocks where no configuration says it; 0 if none fits.

    It is the usual 128 if that gives so many, the last of which may be shorter.
    """
    if -(-length // 128) == count:
        return 128
    return 0 if length % count else length // count


# ------------------------------------------------------------------------ bitsandbytes


def _int8(stored: Source, stem: str, settings: Mapping[str, Any]) -> Decoder | None:
    """Bitsandbytes' 8-bit integers, 127 of which are the largest number of their row."""
    weight, largest = f"{stem}.weight", f"{stem}.SCB"
    if largest not in stored.specs:
        return None

    def decode(codes: torch.Tensor, largest: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return codes * largest.view(-1, 1) * 7.874015718698502e-3

    spec = Spec(stored.specs[weight].shape, "float32")
    parts = (weight, largest, *_existing(stored, f"{stem}.weight_format"))
    return Decoder(parts, spec, decode)


def _four_bit(stored: Source, stem: str, settings: Mapping[str, Any]) -> Decoder | None:
    """Bitsandbytes' indices of 4 bits into a table, with the largest number of each block."""
    weight = f"{stem}.weight"
    states = _existing(
        stored, *(f"{weight}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
    )
    if not states:
        return None
    state = parse_json(stored.read(states[0]).numpy().tobytes())
    nested = _existing(stored, f"{weight}.nested_absmax", f"{weight}.nested_quant_map")
    count = torch.Size(state["shape"]).numel()
    if -(-count // 2) != stored.specs[weight].numel:
        raise ValueError(f"a shape of {count} numbers, of which others are stored")

    def decode(
        codes: torch.Tensor, largest: torch.Tensor, table: torch.Tensor, *more: torch.Tensor
    ) -> torch.Tensor:
        if nested:
            coarse, coarse_table = more[:2]
            fine = coarse_table[largest.long()]
            largest = _by_block(fine, coarse, state["nested_blocksize"]) + state["nested_offset"]
        codes = codes.reshape(-1)
        indices = torch.stack([codes >> 4, codes & 15], -1).reshape(-1)[:count]
        values = _by_block(table[indices.long()].float(), largest.float(), state["blocksize"])
        return values.reshape(state["shape"])

    names = (f"{weight}.absmax", f"{weight}.quant_map")
    spec = Spec(tuple(state["shape"]), dtype_of(state["dtype"]))
    return Decoder((weight, *names, *nested, *states), spec, decode)


def _by_block(values: torch.Tensor, factors: torch.Tensor, size: int) -> torch.Tensor:
    """Return flat values, each block of ``size`` of them multiplied by its factor."""
    if len(factors) != -(-len(values) // size):
        raise ValueError(f"{len(factors)} blocks of {size} don't make {len(values)} numbers")
    return values * factors.repeat_interleave(min(size, len(values)))[: len(values)]


# ------------------------------------------------------- GPTQ, AWQ, compressed-tensors


def _grouped(stored: Source, stem: str, settings: Mapping[str, Any]) -> Decoder | None:
    """Decode GPTQ's and AWQ's integers, with a scale and a zero for each group of inputs."""
    weight, zeros, scales = (f"{stem}.{part}" for part in ("qweight", "qzeros", "scales"))
    if zeros not in stored.specs or scales not in stored.specs:
        return None
    groups, outputs = stored.specs[scales].shape
    columns = stored.specs[weight].shape[1]
    if columns not in (outputs, outputs // 8) or stored.specs[zeros].shape[0] != groups:
        raise CheckpointError(
            f"{stored.ref} has {weight} of shape {tuple(stored.specs[weight].shape)} beside scales "
            f"of shape {(groups, outputs)}, neither as GPTQ has them nor as AWQ's layout 'gemm'",
            hint="save them in one of these layouts, with the library that quantised them",
        )
    bits = stored.specs[zeros].shape[1] * 32 // outputs
    is_gptq = columns == outputs
    if bits not in (2, 4, 8) or (not is_gptq and bits != 4):
        raise CheckpointError(f"{stored.ref} has {bits}-bit weights, which can't be read: {weight}")
    inputs = stored.specs[weight].shape[0] * (32 // bits if is_gptq else 1)
    first = 0 if not is_gptq or settings.get("checkpoint_format") == "gptq_v2" else 1

    def decode(
        codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, *index: torch.Tensor
    ) -> torch.Tensor:
        order = None if is_gptq else _AWQ_ORDER
        numbers = _unpacked(codes.T, bits).T if is_gptq else _unpacked(codes, bits, order)
        offsets = _unpacked(zeros, bits, order) + first
        group = index[0].long() if index else torch.arange(inputs) // -(-inputs // groups)
        return ((numbers - offsets[group]).to(scales.dtype) * scales[group]).T

    spec = Spec((outputs, inputs), stored.specs[scales].dtype_name)
    index = _existing(stored, f"{stem}.g_idx") if is_gptq else ()
    return Decoder((weight, zeros, scales, *index), spec, decode)


def _packed(stored: Source, stem: str, settings: Mapping[str, Any]) -> Decoder | None:
    """Decode compressed-tensors' packed integers, with scales and perhaps zeros by group."""
    weight, scale, shape = (f"{stem}.weight_{part}" for part in ("packed", "scale", "shape"))
    if scale not in stored.specs or shape not in stored.specs:
        return None
    rows, columns = stored.read(shape).tolist()
    words = stored.specs[weight].shape[1]
    bits = next((bits for bits in (2, 4, 8) if -(-columns * bits // 32) == words), 0)
    groups = stored.specs[scale].shape[-1]
    zero = _existing(stored, f"{stem}.weight_zero_point")
    index = _existing(stored, f"{stem}.weight_g_idx")
    if not bits:
        raise CheckpointError(f"{weight} of {stored.ref} isn't packed as 2, 4 or 8 bits a weight")

    def decode(
        codes: torch.Tensor, scales: torch.Tensor, _: torch.Tensor, *more: torch.Tensor
    ) -> torch.Tensor:
        numbers = _unpacked(codes, bits)[:, :columns] - (1 << bits - 1)
        group = more[-1].long() if index else torch.arange(columns) // -(-columns // groups)
        if zero:
            offsets = _unpacked(more[0].T, bits).T[:rows] - (1 << bits - 1)
            return (numbers.to(scales) - offsets.to(scales)[:, group]) * scales[:, group]
        return numbers.to(scales) * scales[:, group]

    spec = Spec((rows, columns), stored.specs[scale].dtype_name)
    return Decoder((weight, scale, shape, *zero, *index), spec, decode)


def _unpacked(codes: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Return the integers in the columns of an int32 matrix, the lowest bits first."""
    places = torch.tensor(order or range(32 // bits)) * bits
    return ((codes[..., None] >> places) & ((1 << bits) - 1)).flatten(-2)


_LAYOUTS = {
    "_blocks": _mxfp4,
    ".weight": lambda *given: _float8(*given) or _int8(*given) or _four_bit(*given),
    ".qweight": _grouped,
    ".weight_packed": _packed,
}
"""The end of a stored name -> the layouts that it may belong to."""
