"""Comparison of a checkpoint with the tensors that it should hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weightops import Checkpoint


def holds(checkpoint: Checkpoint, state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a checkpoint has exactly these names, dtypes and values."""
    read = checkpoint.state_dict()
    return read.keys() == state.keys() and all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype
        for name, tensor in state.items()
    )
