"""Parts of tensors that the processes of a distributed save leave in safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from weightops import open_checkpoint
from weightops.errors import CheckpointError

HuggingFaceStorageWriter = pytest.importorskip(  # of torch 2.8
    "torch.distributed.checkpoint.hf_storage"
).HuggingFaceStorageWriter

WHOLE = {"w": torch.arange(28.0).reshape(7, 4), "b": torch.arange(3.0), "scale": torch.tensor(2.0)}


def write_parts(folder: Path, rows: int, parts: tuple[int, ...] = (0, 1)) -> None:
    """Write the files that two processes leave, of which the second begins at a row."""
    for rank in parts:
        tensors = {"w": WHOLE["w"][rows * rank : rows if rank == 0 else None].clone()}
        tensors |= {"b": WHOLE["b"], "scale": WHOLE["scale"]} if rank == 0 else {}
        offsets = {n: {"saved_offsets": [0] * t.dim()} for n, t in tensors.items()}
        offsets["w"]["saved_offsets"][0] = rows * rank
        metadata = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)}
        name = f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        save_file(tensors, folder / name, metadata=metadata)


def test_all_parts_together_are_whole(tmp_path: Path) -> None:
    write_parts(tmp_path, 4)
    opened = open_checkpoint(tmp_path)
    assert all(torch.equal(opened[name], tensor) for name, tensor in WHOLE.items())
    written = open_checkpoint(opened.save(tmp_path / "whole.safetensors"))
    assert all(torch.equal(written[name], tensor) for name, tensor in WHOLE.items())


def test_a_part_is_never_taken_as_whole(tmp_path: Path) -> None:
    write_parts(tmp_path, 4)
    for rank in (1, 2):
        with pytest.raises(CheckpointError, match="one process's part of a distributed save"):
            open_checkpoint(tmp_path / f"shard-{rank:05}-model-00001-of-00001.safetensors")
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the parts of w don't make up its shape"):
        open_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torchs_writer_leaves(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, options in ((whole, {}), (parts, {"save_distributed": True})):
        writer = HuggingFaceStorageWriter(str(folder), **options)
        dcp.save(dict(WHOLE), storage_writer=writer, no_dist=True)
    for place in (whole, whole / "model-00001-of-00001.safetensors", parts):
        opened = open_checkpoint(place)
        assert all(torch.equal(opened[name], tensor) for name, tensor in WHOLE.items())
    index = whole / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] *= 2  # as where a second process held as many rows
    index.write_text(json.dumps(content))
    for place in (whole, whole / "model-00001-of-00001.safetensors"):
        with pytest.raises(CheckpointError, match="it is the part of one process"):
            open_checkpoint(place)
