from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weightops import open_checkpoint


@pytest.fixture
def model_files(tmp_path: Path) -> tuple[str, list[str]]:
    """A base and three models of three layers, as files."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (50, 8),
        **{f"layers.{i}.{part}.weight": (8, 8) for i in range(3) for part in ("mlp", "attn")},
        "norm.weight": (8,),
    }
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    paths = []
    for i in range(4):
        state = {
            name: tensor + (0.1 * torch.randn(tensor.shape, generator=generator) if i else 0)
            for name, tensor in base.items()
        }
        file = tmp_path / ("base.safetensors" if i == 0 else f"m{i}.safetensors")
        paths.append(str(open_checkpoint(state).save(file)))
    return paths[0], paths[1:]
