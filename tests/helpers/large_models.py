"""Two models whose tensors end at the borders of chunks and segments."""

from __future__ import annotations

from functools import cache

import torch

from weightops.algebra.kernels import CHUNK
from weightops.engine.plan import SEGMENT


@cache
def large_models() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return state dicts with tensors that end within, at and just after a chunk and a segment."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, CHUNK - 1, CHUNK, CHUNK + 1, SEGMENT, SEGMENT + 7]
    pre = {f"w{n}": torch.randn(n, generator=generator) for n in sizes}
    return pre, {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in pre.items()}
