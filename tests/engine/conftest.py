from __future__ import annotations

import pytest
import torch

from weightops.algebra.kernels import CHUNK
from weightops.engine.plan import SEGMENT


@pytest.fixture(scope="module")
def large() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors that end within, at and just after a chunk and a segment, in two state dicts."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, CHUNK - 1, CHUNK, CHUNK + 1, SEGMENT, SEGMENT + 7]
    pre = {f"w{n}": torch.randn(n, generator=generator) for n in sizes}
    return pre, {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in pre.items()}
