"""A checkpoint format of your own: arrays of NumPy in an .npz file.

python own_format.py FILE.npz OUT.safetensors
"""

import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

import weightops
from weightops.algebra.source import Source, Spec


class NpzSource(Source):
    """The tensors of an .npz file; one at a time is in memory."""

    def __init__(self, path: Path) -> None:
        self._arrays = np.load(path, allow_pickle=False)
        self.ref = str(path)  # what messages and metadata call it
        self.ties = {}  # alias -> name, of tensors that share memory
        self.specs = {name: self._spec(name) for name in self._arrays.files}

    def _spec(self, name: str) -> Spec:
        tensor = self.read(name)
        return Spec(tuple(tensor.shape), tensor.dtype)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        return torch.from_numpy(self._arrays[name])


def recognises(path: Path) -> bool:
    """Return whether a file is an .npz file, by its content."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


weightops.register_format("npz", recognises=recognises, open=NpzSource)

if __name__ == "__main__":
    checkpoint = weightops.open_checkpoint(sys.argv[1])
    checkpoint.save(sys.argv[2])
    print(f"{sys.argv[2]}: {len(checkpoint)} tensors")
