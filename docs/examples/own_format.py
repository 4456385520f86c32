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
        self._path = path
        self.ref = str(path)  # what messages and metadata call it
        self.ties = {}  # alias -> name, of tensors that share memory
        with np.load(path, allow_pickle=False) as arrays:
            self.specs = {name: _spec(array) for name, array in arrays.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        with np.load(self._path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays[name])


def _spec(array: np.ndarray) -> Spec:
    tensor = torch.from_numpy(array)
    return Spec(tuple(tensor.shape), tensor.dtype)


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
