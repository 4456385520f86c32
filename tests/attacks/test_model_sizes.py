"""Configurations that claim huge models: refused by the key, before memory is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_configurations import FOLDERS

from weightops import open_checkpoint
from weightops.checkpoints.checkpoint import Checkpoint
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


def _context(checkpoint: Checkpoint) -> int:
    return checkpoint.known_architecture().context


def _names(checkpoint: Checkpoint) -> list[list[str]]:
    return checkpoint.known_architecture().output_names


WRONG: list[tuple[str, list[str], list[Any], Callable[[Checkpoint], Any]]] = [
    ("open_clip", ["preprocess_cfg", "mean"], ["x", {"a": 1}, [None]], Checkpoint.preprocess),
    ("open_clip", ["preprocess_cfg", "std"], ["x", {"a": 1}, [[]]], Checkpoint.preprocess),
    (
        "open_clip",
        ["model_cfg", "text_cfg", "context_length"],
        [None, [1], {"a": 1}, "x", 0, 1.5],
        Checkpoint.tokenizer,
    ),
    ("timm", ["label_names"], [-1, True, 1.5, "x", {"a": "b"}], _names),
    ("timm", ["labels"], [-1, True, 1.5, "x", {"a": "b"}], _names),
    ("timm", ["pretrained_cfg"], [0, -1, "x", [], [1], True], _names),
    ("transformers", ["max_position_embeddings"], ["x", [1], {"a": 1}, -3, 1.5], _context),
    ("transformers", ["n_positions"], ["x", [1], {"a": 1}, True], _context),
]
"""Library, key, values of other types and sizes than it has, and what reads it."""


@pytest.mark.parametrize(("library", "keys", "values", "use"), WRONG)
def test_wrong_values_are_refused_by_key(
    tmp_path: Path,
    library: str,
    keys: list[str],
    values: list[Any],
    use: Callable[[Checkpoint], Any],
) -> None:
    path = FOLDERS[library](tmp_path / "model")
    for value in values:
        content = json.loads(path.read_text())
        settings: dict[str, Any] = content
        for key in keys[:-1]:
            settings = settings.setdefault(key, {})
        settings[keys[-1]] = value
        path.write_text(json.dumps(content))
        named = "label_names" if keys == ["labels"] else keys[-1]
        with pytest.raises(CheckpointError, match=rf"{path.name} .*{named}.* must be "):
            use(open_checkpoint(path.parent))
