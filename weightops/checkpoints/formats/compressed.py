"""Task vectors in fewer bytes: bfloat16, int8 with row scales, the largest entries, or low rank."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.source import Source, Spec
from weightops.checkpoints.formats.memory import MemorySource
from weightops.engine.evaluate import allocate, materialize
from weightops.engine.layout import layout
from weightops.errors import CheckpointError, NonfiniteError, OptionError
from weightops.support.lazy import torch
from weightops.support.registry import unknown

StoredTensors: TypeAlias = "dict[str, torch.Tensor]"
"""Suffix of a name -> one of the tensors that a delta is stored as."""

_LOSSLESS = -1.0
"""The density of ``sparse:lossless``."""
_MAX_NUMEL = 2**33
"""The most elements of a tensor; files that claim more for a few stored numbers are traps."""


class Coding(NamedTuple):
    """A way to store a float32 tensor in fewer bytes.

    Attributes:
        encode: the tensor and the number after the colon -> the stored tensors.
        decode: the stored tensors and the shape -> the tensor.
        check: the number after the colon -> whether it is allowed; None if no number is taken.
    """

    encode: Callable[[torch.Tensor, float], StoredTensors]
    decode: Callable[[Mapping[str, torch.Tensor], tuple[int, ...]], torch.Tensor]
    check: Callable[[float], bool] | None = None


def _plain(delta: torch.Tensor, _: float = 0) -> StoredTensors:
    return {"": delta.bfloat16()}


def _from_plain(stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    return stored[""].float().reshape(shape)


def _int8(delta: torch.Tensor, _: float) -> StoredTensors:
    rows = delta.flatten(1) if delta.ndim > 1 else delta.reshape(1, -1)
    scale = rows.abs().amax(1, keepdim=True) / 127 if rows.numel() else rows.new_zeros(len(rows), 1)
    return {"": torch.where(scale > 0, rows / scale, 0).round().to(torch.int8), "scale": scale}


def _from_int8(stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    codes, scale = stored[""], stored["scale"]
    # Other shapes would be multiplied to more than is stored.
    if codes.numel() != math.prod(shape) or tuple(scale.shape) != (len(codes), 1):
        raise ValueError(f"codes and scales of {tuple(codes.shape)} and {tuple(scale.shape)}")
    return (codes.float() * scale).reshape(shape)


def _sparse(delta: torch.Tensor, density: float) -> StoredTensors:
    """Keep a density of the largest entries; of `_LOSSLESS`, all that aren't 0, in float32."""
    flat = delta.reshape(-1)
    if density == _LOSSLESS:
        kept, values = flat.nonzero()[:, 0], flat[flat != 0]
    else:
        kept = flat.abs().topk(math.ceil(density * len(flat)), sorted=False).indices.sort().values
        values = flat[kept].bfloat16()
    indices = kept.to(torch.int32 if len(flat) < 2**31 else torch.int64)
    return {"indices": indices, "values": values}


def _from_sparse(stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    values = stored["values"]
    if values.dtype == torch.float32 and not len(values):
        return torch.zeros(1).expand(math.prod(shape)).reshape(shape)
    if values.dtype != torch.float32 and math.prod(shape) > 1001 * len(values):
        raise ValueError("it holds fewer entries than any density leaves")
    indices = stored["indices"].long()
    if len(indices) and (int(indices[0]) < 0 or not bool((indices.diff() > 0).all())):
        raise ValueError("its indices don't rise from 0 on")
    flat = torch.zeros(math.prod(shape))
    flat[indices] = values.float()
    return flat.reshape(shape)


def _low_rank(delta: torch.Tensor, rank: float) -> StoredTensors:
    matrix = delta.flatten(1) if delta.ndim > 1 else delta.reshape(1, -1)
    if rank * sum(matrix.shape) >= matrix.numel():
        return _plain(delta)
    left, right = nearest_pair(matrix, int(rank))
    return {"left": left.contiguous(), "right": right.contiguous()}


def nearest_pair(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two factors of a rank, or less, whose product is nearest to a matrix.

    Raises:
        NonfiniteError: if the matrix holds NaN or infinities.
    """
    if not matrix.isfinite().all():
        raise NonfiniteError("the change holds NaN or Inf, and has no nearest matrix of a rank")
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _from_low_rank(stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    if "" in stored:
        return _from_plain(stored, shape)
    left, right = stored["left"], stored["right"]
    if left.ndim != 2 or right.ndim != 2 or left.shape[0] * right.shape[1] != math.prod(shape):
        raise ValueError(f"factors of {tuple(left.shape)} and {tuple(right.shape)}")
    return (left @ right).reshape(shape)


CODINGS: dict[str, Coding] = {
    "bf16": Coding(_plain, _from_plain),
    "int8": Coding(_int8, _from_int8),
    "sparse": Coding(_sparse, _from_sparse, lambda density: 0.001 <= density <= 1),
    "lowrank": Coding(
        _low_rank, _from_low_rank, lambda rank: 1 <= rank < 2**31 and rank == int(rank)
    ),
}
"""The values of ``compress``; ``sparse`` and ``lowrank`` take a number after a colon, or the former
"lossless"."""


def coding(how: str) -> tuple[Coding, float]:
    """Return the coding that a text such as ``int8`` or ``sparse:0.1`` names, and its number.

    Raises:
        OptionError: if the number is missing or not allowed.
        UnknownNameError: if there is no such coding.
    """
    name, colon, text = how.partition(":")
    if name not in CODINGS:
        raise unknown("compression", name, CODINGS)
    if how == "sparse:lossless":
        return CODINGS[name], _LOSSLESS
    check = CODINGS[name].check
    try:
        number = float(text) if colon else 0.0
        sound = check(number) if check else not colon
    except ValueError:
        sound = False
    if not sound:
        raise OptionError(
            "a compression is bf16, int8, sparse:DENSITY (0.001 to 1), sparse:lossless or "
            f"lowrank:RANK (1 or more), not {how!r}"
        )
    return CODINGS[name], number


def write_compressed(form: LinearForm, path: Path, how: str, metadata: Mapping[str, Any]) -> float:
    """Write a delta compressed; the metadata state the relative error.

    Args:
        form: the delta, tau.
        path: the file to write.
        how: the name of a coding, with its number.
        metadata: the provenance record to add to.

    Returns:
        ``||tau - tau'|| / ||tau||`` over all tensors, for the stored ``tau'``.
    """
    chosen, number = coding(how)
    tied = tied_names(form)
    tensors: StoredTensors = {}
    total = lost = 0.0
    for name, spec in form.specs.items():
        if name in tied:
            continue
        delta = float_tensor(form, name)
        stored = chosen.encode(delta, number)
        lost += squared_norm(chosen.decode(stored, spec.shape) - delta)
        total += squared_norm(delta)
        tensors |= {f"{name}:{suffix}": tensor for suffix, tensor in stored.items()}
    error = math.sqrt(lost / total) if total else 0.0
    shapes = {name: list(spec.shape) for name, spec in form.specs.items()}
    compressed = {"how": how, "relative_error": error, "shapes": shapes, "ties": tied}
    write_tensors(path, tensors, {**metadata, "compressed": compressed})
    return error


def float_tensor(form: LinearForm, name: str) -> torch.Tensor:
    """Return one tensor of a form in float32."""
    one = form.part([name])
    tensors = allocate(one)
    materialize(one, tensors)
    return tensors[name].float()


def squared_norm(tensor: torch.Tensor) -> float:
    """Return the sum of squares, accumulated in float64."""
    return float(tensor.square().sum(dtype=torch.float64))


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]
) -> None:
    """Write tensors and a provenance record to a safetensors file, the same bytes in every process.

    The safetensors library orders metadata by a hash that is seeded anew in each process.
    """
    metadata = {"format": "pt", "weightops": json.dumps(record)}
    form = LinearForm.of(MemorySource(tensors, path.name))
    file = layout(form, path.name, metadata)[0]
    with open(path, "wb") as stream:
        stream.write(file.header)
        for name in file.offsets:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)


class CompressedSource(Source):
    """The tensors of a compressed task vector, decoded when they are read.

    Args:
        stored: the tensors in the file.
        made_from: the provenance record of the file.

    Raises:
        CheckpointError: if the record doesn't describe the tensors.
    """

    space = "delta"
    computed = True

    def __init__(self, stored: Source, made_from: Mapping[str, Any]) -> None:
        self.ref, self._stored, self.made_from = stored.ref, stored, made_from
        self.files = stored.files
        self.identity = None if stored.identity is None else ("compact", stored.identity)
        try:
            record = made_from["compressed"]
            self._coding, _ = coding(record["how"])
            self.specs = {
                name: Spec(_shape(shape), "float32") for name, shape in record["shapes"].items()
            }
            self.ties = {
                alias: name
                for alias, name in record["ties"].items()
                if alias in self.specs and name in self.specs
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{self.ref} is a compressed task vector whose metadata aren't sound"
            ) from error
        self._stored_names: dict[str, dict[str, str]] = {name: {} for name in self.specs}
        for stored_name in stored.specs:
            name, _, suffix = stored_name.rpartition(":")
            self._stored_names.setdefault(name, {})[suffix] = stored_name
        if set(self._stored_names) != set(self.specs):
            raise CheckpointError(f"{self.ref} holds other tensors than its metadata say")

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of what is stored: to identify a file computes nothing."""
        return self._stored.fingerprint

    def read(self, name: str) -> torch.Tensor:
        stored_names = self._stored_names[self.ties.get(name, name)]
        stored = {suffix: self._stored.read(key) for suffix, key in stored_names.items()}
        try:
            return self._coding.decode(stored, self.specs[name].shape)
        except (KeyError, RuntimeError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{self.ref} is damaged at {name}: {str(error).splitlines()[0]}"
            ) from error


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(value)
    if len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise ValueError("that isn't a shape")
    if math.prod(shape) > _MAX_NUMEL:
        raise ValueError(f"{shape} is not the shape of a stored tensor")
    return shape
