"""Plain values and tensors that ``torch.save`` wrote, read as a whole without running anything."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightops.checkpoints.formats.file_source import Extent
from weightops.checkpoints.formats.pickle_objects import StoredTensor, name_in_errors
from weightops.checkpoints.formats.torch_source import DAMAGE, EXPANSION, check_storage, dense
from weightops.checkpoints.formats.torch_zip import read_archive
from weightops.errors import CheckpointError
from weightops.support.budget import OBJECT
from weightops.support.lazy import torch

_PLAIN = (str, int, float, bool, bytes, type(None))
_MAX_DEPTH = 50


def read_object(data: bytearray, place: str) -> Any:
    """Read the bytes of an archive: dicts, lists and tuples of plain values and tensors.

    Args:
        data: the bytes, which the tensors don't refer to.
        place: what the bytes are, in errors.

    Raises:
        CheckpointError: if they aren't such an archive.
    """
    try:
        content = read_archive(data)
        return _Builder(data, content.extents, content.budget.spend).build(content.value, 0)
    except CheckpointError as error:
        raise error.prefixed(f"{place} can't be read as a torch file") from error
    except DAMAGE as error:
        raise CheckpointError(f"{place} can't be read as a torch file: {error}") from error


def read_texts(path: Path) -> dict[str, str]:
    """Read the texts of a dictionary in an archive; of its tensors, nothing is read.

    Raises:
        CheckpointError: if it isn't an archive of a dictionary.
    """
    try:
        with (
            open(path, "rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            content = read_archive(data).value
    except CheckpointError as error:
        raise error.prefixed(f"{path} can't be read as a torch file") from error
    except DAMAGE as error:
        raise CheckpointError(f"{path} can't be read as a torch file: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no dictionary")
    return {key: text for key, text in content.items() if isinstance(text, str)}


class _Builder:
    """Builds values from their descriptions; what is one object there is one object here."""

    def __init__(
        self, data: bytearray, extents: Mapping[str, Extent], spend: Callable[[int], None]
    ) -> None:
        self._stored = torch.frombuffer(data, dtype=torch.uint8)
        self._extents, self._spend = extents, spend
        self._left = EXPANSION * len(data)
        self._tensors: dict[StoredTensor, torch.Tensor] = {}

    def build(self, value: Any, depth: int) -> Any:
        """Return a value with tensors in place of their descriptions."""
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"it is nested more than {_MAX_DEPTH} deep")
        if isinstance(value, StoredTensor):
            return self._tensor(value)
        if isinstance(value, dict):
            self._spend(OBJECT * (1 + len(value)))
            return {key: self.build(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            self._spend(OBJECT + 16 * len(value))
            return type(value)([self.build(item, depth + 1) for item in value])
        if not isinstance(value, _PLAIN):
            raise CheckpointError(f"it holds {name_in_errors(value)}, which isn't a plain value")
        return value

    def _tensor(self, tensor: StoredTensor) -> torch.Tensor:
        if tensor not in self._tensors:
            check_storage("a tensor", tensor.storage, self._extents)
            self._left -= tensor.nbytes
            if self._left < 0:
                raise CheckpointError("its tensors claim more bytes than there are")
            stored = self._stored[self._extents[tensor.storage.key].slice].clone()
            self._tensors[tensor] = dense(tensor, stored).clone()
        return self._tensors[tensor]
