"""The device that is computed on."""

from __future__ import annotations

from weightops.errors import OptionError
from weightops.support.lazy import torch


def pick_device(device: str) -> torch.device:
    """Return the named device; ``auto`` is CUDA where there is one, else CPU.

    Raises:
        OptionError: if torch can't use the device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"there is no device {device!r} here: {reason}") from error
    return torch.device(device)
