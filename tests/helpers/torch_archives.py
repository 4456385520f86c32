"""Files as old versions of torch wrote them."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import torch


def tar(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a file as torch did before 0.1.10: tables of storages and tensors, and a pickle."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, value: object) -> object:
            return next((i for i, t in enumerate(state.values()) if t is value), None)

    storages, tensors, content = io.BytesIO(), io.BytesIO(), io.BytesIO()
    for stream in (storages, tensors):
        pickle.dump(len(state), stream, 2)
    for i, tensor in enumerate(state.values()):
        pickle.dump((100 + i, "cpu", torch.FloatStorage), storages, 2)
        storages.write((tensor.untyped_storage().nbytes() // 4).to_bytes(8, "little"))
        storages.write(bytes(tensor.untyped_storage()))
        pickle.dump((i, 100 + i, torch.FloatTensor), tensors, 2)
        numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
        tensors.write(
            tensor.ndim.to_bytes(8, "little") + b"".join(n.to_bytes(8, "little") for n in numbers)
        )
    pickle.dump([], storages, 2)
    Pickler(content, 2).dump(state)
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, stream in (("storages", storages), ("tensors", tensors), ("pickle", content)):
            member = tarfile.TarInfo(name)
            member.size = stream.tell()
            stream.seek(0)
            archive.addfile(member, stream)
