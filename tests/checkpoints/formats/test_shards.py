"""Shards with an index: names in several files, aliases, and names that no file has."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from weightops import open_checkpoint
from weightops.errors import CheckpointError

TIED = torch.arange(6.0).reshape(2, 3)


def test_aliases_of_the_index_are_names(tmp_path: Path) -> None:
    for folder, limit in (("one", "1GB"), ("many", "0.5KB")):
        state = {"embed.weight": TIED, "lm_head.weight": TIED, "a": torch.zeros(100)}
        state["b"] = torch.ones(100)
        (tmp_path / folder).mkdir()
        save_torch_state_dict(state, tmp_path / folder, max_shard_size=limit)
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert set(one) == set(many) == {"embed.weight", "lm_head.weight", "a", "b"}
    assert many.source.ties == one.source.ties == {"lm_head.weight": "embed.weight"}
    assert torch.equal(many["lm_head.weight"], TIED)
    assert many.fingerprint == one.fingerprint


def indexed(
    folder: Path, files: dict[str, dict[str, torch.Tensor]], listed: dict[str, str]
) -> Path:
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return folder


def test_of_a_tensor_in_two_shards_the_last_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {
        "a.safetensors": {"w": torch.zeros(2), "v": torch.ones(1), "same": torch.ones(3)},
        "b.safetensors": {"w": torch.ones(2), "same": torch.ones(3)},
    }
    listed = {"w": "a.safetensors", "v": "a.safetensors", "same": "b.safetensors"}
    with caplog.at_level(logging.WARNING, "weightops"):
        opened = open_checkpoint(indexed(tmp_path, files, listed))
    assert opened["w"].tolist() == [1, 1]
    assert "several shards hold w, with different values" in caplog.text


def test_a_tied_name_that_no_shard_has(tmp_path: Path) -> None:
    folder = indexed(
        tmp_path,
        {"a.safetensors": {"embed.weight": TIED}},
        {"embed.weight": "a.safetensors", "lm_head.weight": "a.safetensors"},
    )
    with pytest.raises(CheckpointError, match=r"lists lm_head\.weight in a\.safetensors"):
        open_checkpoint(folder)
    config = {"model_type": "llama", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert list(open_checkpoint(folder)) == ["embed.weight"]
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"lists lm_head\.weight in a\.safetensors"):
        open_checkpoint(folder)
