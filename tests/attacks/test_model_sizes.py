"""Configurations that claim huge models: refused by the key, before memory is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_configurations import FOLDERS

from weightops import open_checkpoint
from weightops.errors import CheckpointError

HUGE: list[tuple[str, list[str], int]] = [
    ("open_clip", ["model_cfg", "vision_cfg", "layers"], 5_000_000),
    ("open_clip", ["model_cfg", "vision_cfg", "layers"], 900_000),
    ("open_clip", ["model_cfg", "vision_cfg", "image_size"], 2**20),
    ("open_clip", ["model_cfg", "vision_cfg", "width"], 10**6),
    ("open_clip", ["model_cfg", "text_cfg", "vocab_size"], 10**12),
    ("open_clip", ["model_cfg", "text_cfg", "vocab_size"], 10**9),
    ("open_clip", ["model_cfg", "text_cfg", "context_length"], 10**6),
    ("open_clip", ["model_cfg", "embed_dim"], 10**9),
    ("transformers", ["num_hidden_layers"], 10**7),
    ("transformers", ["num_hidden_layers"], 100_000),
    ("transformers", ["vocab_size"], 10**12),
    ("transformers", ["vocab_size"], 10**9),
    ("transformers", ["hidden_size"], 10**8),
    ("transformers", ["intermediate_size"], 10**9),
    ("transformers", ["num_labels"], 10**9),
    ("timm", ["num_classes"], 10**12),
    ("timm", ["model_args", "depth"], 10**6),
    ("timm", ["model_args", "depth"], 10**9),
    ("timm", ["model_args", "embed_dim"], 10**8),
    ("timm", ["model_args", "img_size"], 10**6),
]
"""Library, key, and the number that it is set to."""


@pytest.mark.parametrize(("library", "keys", "number"), HUGE)
def test_huge_models(tmp_path: Path, library: str, keys: list[str], number: int) -> None:
    path = FOLDERS[library](tmp_path / "model")
    content = json.loads(path.read_text())
    settings: dict[str, Any] = content
    for key in keys[:-1]:
        settings = settings[key]
    settings[keys[-1]] = number
    path.write_text(json.dumps(content))
    place = r"\.".join(keys)
    says = rf"sets {place} to {number}, |describes a model of more than .* {place} {number:,}"
    with pytest.raises(CheckpointError, match=rf"{path.name} ({says})"):
        open_checkpoint(path.parent).model()


def test_parts_of_models_by_the_million(tmp_path: Path) -> None:
    """A model of few numbers and very many modules is refused as they are made."""
    path = FOLDERS["timm"](tmp_path / "model")
    content = json.loads(path.read_text())
    content["model_args"] |= {"embed_dim": 2, "num_heads": 1, "depth": 100_000, "mlp_ratio": 1}
    path.write_text(json.dumps(content))
    message = "describes a model of more than 20,000 modules for .* model_args.depth 100,000"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path.parent).model()
