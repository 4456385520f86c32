"""Task vectors stored in fewer bytes: bfloat16, int8 with a scale for each row, the largest entries only, or low rank."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.source import Source, Spec
from weightops.engine.evaluate import allocate, materialize
from weightops.errors import CheckpointError, OptionError
from weightops.support.registry import unknown

Parts = dict[str, torch.Tensor]
_MOST = 2**33
"""Elements of a tensor that a few stored numbers may stand for; files that claim more are traps."""


class Coding(NamedTuple):
    """A way to store a float32 tensor in parts.

    Attributes:
        encode: the tensor, and the number behind the colon -> its parts.
        decode: the parts and the shape -> the tensor.
        check: the number behind the colon -> whether it can be; None if there is none.
    """

    encode: Callable[[torch.Tensor, float], Parts]
    decode: Callable[[Mapping[str, torch.Tensor], tuple[int, ...]], torch.Tensor]
    check: Callable[[float], bool] | None = None


def _plain(delta: torch.Tensor, _: float = 0) -> Parts:
    return {"": delta.bfloat16()}


def _from_plain(parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    return parts[""].float().reshape(shape)


def _int8(delta: torch.Tensor, _: float) -> Parts:
    rows = delta.flatten(1) if delta.ndim > 1 else delta.reshape(1, -1)
    scale = rows.abs().amax(1, keepdim=True) / 127 if rows.numel() else rows.new_zeros(len(rows), 1)
    return {"": torch.where(scale > 0, rows / scale, 0).round().to(torch.int8), "scale": scale}


def _from_int8(parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    return (parts[""].float() * parts["scale"]).reshape(shape)


def _sparse(delta: torch.Tensor, density: float) -> Parts:
    flat = delta.reshape(-1)
    kept = flat.abs().topk(math.ceil(density * len(flat)), sorted=False).indices.sort().values
    return {
        "indices": kept.to(torch.int32 if len(flat) < 2**31 else torch.int64),
        "values": flat[kept].bfloat16(),
    }


def _from_sparse(parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    if math.prod(shape) > 1001 * len(parts["values"]):
        raise ValueError("it holds fewer entries than any density leaves")
    flat = torch.zeros(math.prod(shape))
    flat[parts["indices"].long()] = parts["values"].float()
    return flat.reshape(shape)


def _low_rank(delta: torch.Tensor, rank: float) -> Parts:
    matrix = delta.flatten(1) if delta.ndim > 1 else delta.reshape(1, -1)
    if rank * sum(matrix.shape) >= matrix.numel():
        return _plain(delta)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[: int(rank)].sqrt()
    return {
        "left": (u[:, : int(rank)] * root).contiguous(),
        "right": (root[:, None] * vh[: int(rank)]).contiguous(),
    }


def _from_low_rank(parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    return (
        _from_plain(parts, shape)
        if "" in parts
        else (parts["left"] @ parts["right"]).reshape(shape)
    )


CODINGS: dict[str, Coding] = {
    "bf16": Coding(_plain, _from_plain),
    "int8": Coding(_int8, _from_int8),
    "sparse": Coding(_sparse, _from_sparse, lambda density: 0.001 <= density <= 1),
    "lowrank": Coding(
        _low_rank, _from_low_rank, lambda rank: 1 <= rank < 2**31 and rank == int(rank)
    ),
}
"""What ``compress`` may name; ``sparse`` and ``lowrank`` with a number behind a colon."""


def coding(how: str) -> tuple[Coding, float]:
    """The coding that a text such as ``int8`` or ``sparse:0.1`` names, and its number.

    Raises:
        OptionError: if the number is missing or can't be.
        UnknownNameError: if there is no such coding.
    """
    name, colon, text = how.partition(":")
    if name not in CODINGS:
        raise unknown("compression", name, CODINGS)
    found = CODINGS[name]
    try:
        number = float(text) if colon else 0.0
        sound = found.check(number) if found.check else not colon
    except ValueError:
        sound = False
    if not sound:
        raise OptionError(
            f"a compression is bf16, int8, sparse:DENSITY (0.001 to 1) or lowrank:RANK (1 or more), not {how!r}"
        )
    return found, number


def write_compressed(form: LinearForm, path: Path, how: str, metadata: Mapping[str, Any]) -> float:
    r"""Write a delta compressed, with the error that this introduces in its metadata.

    Returns:
        :math:`\lVert\tau - \tau'\rVert / \lVert\tau\rVert` over all tensors, for the stored :math:`\tau'`.
    """
    chosen, number = coding(how)
    tied = tied_names(form)
    tensors: Parts = {}
    total = lost = 0.0
    for name, spec in form.specs.items():
        if name in tied:
            continue
        part = form.part([name])
        out = allocate(part)
        materialize(part, out)
        delta = out[name].float()
        parts = chosen.encode(delta, number)
        lost += float((chosen.decode(parts, spec.shape) - delta).square().sum(dtype=torch.float64))
        total += float(delta.square().sum(dtype=torch.float64))
        tensors |= {f"{name}:{suffix}": stored for suffix, stored in parts.items()}
    error = math.sqrt(lost / total) if total else 0.0
    shapes = {name: list(spec.shape) for name, spec in form.specs.items()}
    record = {
        **metadata,
        "compressed": {"how": how, "relative_error": error, "shapes": shapes, "ties": tied},
    }
    write_file(path, tensors, record)
    return error


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors that are in memory, and what is to be known of them; who may read the file is for the system to say."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt", "weightops": json.dumps(record)})
    path.chmod(mode)  # which the library makes the owner's alone


class CompressedSource(Source):
    """The tensors of a compressed task vector, restored when they are read."""

    space = "delta"
    computed = True

    def __init__(self, stored: Source, made_from: Mapping[str, Any]) -> None:
        self.ref, self.skipped, self._stored, self.made_from = stored.ref, (), stored, made_from
        self.identity = None if stored.identity is None else ("compact", stored.identity)
        try:
            record = made_from["compressed"]
            self._coding, _ = coding(record["how"])
            self.specs = {
                name: Spec(_shape(shape), torch.float32) for name, shape in record["shapes"].items()
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
        self._parts: dict[str, dict[str, str]] = {name: {} for name in self.specs}
        for name in stored.specs:
            tensor, _, suffix = name.rpartition(":")
            self._parts.setdefault(tensor, {})[suffix] = name
        if set(self._parts) != set(self.specs):
            raise CheckpointError(f"{self.ref} holds other tensors than its metadata say")

    def read(self, name: str) -> torch.Tensor:
        parts = {
            suffix: self._stored.read(key)
            for suffix, key in self._parts[self.ties.get(name, name)].items()
        }
        try:
            return self._coding.decode(parts, self.specs[name].shape)
        except (KeyError, RuntimeError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{self.ref} is damaged at {name}: {str(error).splitlines()[0]}"
            ) from error


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(value)
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) > _MOST:
        raise ValueError(f"{shape} is no shape of a stored tensor")
    return shape
