"""Distributed checkpoints that torch writes in one process and in two, read without a group."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from weightops import TaskVector, merge, open_checkpoint
from weightops.cli.main import run
from weightops.errors import CheckpointError


def save(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(folder))
    return folder


def test_edits_and_merges(net: nn.Module, tuned: nn.Module, tmp_path: Path) -> None:
    pre = save(
        {"model": net.state_dict(), "epoch": 3, "optim": {"m": torch.ones(2)}}, tmp_path / "pre"
    )
    ft = save(tuned.state_dict(), tmp_path / "ft")
    assert set(open_checkpoint(pre)) == set(net.state_dict())
    assert open_checkpoint(pre).source.skipped == ("epoch", "optim.m")
    expected = TaskVector(net, tuned).apply(net, 0.4).state_dict()
    edited = TaskVector(pre, ft).apply(pre, 0.4)
    assert all(torch.equal(edited[name], expected[name]) for name in edited)
    assert len(merge([pre, ft])) == len(net.state_dict())
    assert run(["inspect", str(pre)]) == 0
    assert run(["vector", str(pre), str(ft), "-o", str(tmp_path / "v.safetensors")]) == 0


@pytest.mark.parametrize("form", ["app", "optimizer beside"])
def test_states_of_optimizers_are_no_weights(net: nn.Module, form: str, tmp_path: Path) -> None:
    """Weights are under a key of the script's own, or beside the optimizer without a key."""
    optimizer = torch.optim.AdamW(net.parameters())
    torch.stack([parameter.sum() for parameter in net.parameters()]).sum().backward()
    optimizer.step()
    model, states = get_state_dict(net, optimizer)
    state = {"app": {"model": model, "optim": states}}
    saved = save(state if form == "app" else {**model, "optimizer": states}, tmp_path / "dcp")
    opened = open_checkpoint(saved)
    assert opened.keys() == net.state_dict().keys()
    assert all(torch.equal(opened[name], tensor) for name, tensor in model.items())
    assert any("exp_avg" in name for name in opened.source.skipped)


SHARDED = """
import os, sys, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
rank, folder, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
rows, columns = torch.arange(35.0).reshape(7, 5), torch.arange(24.0).reshape(2, 12).bfloat16()
model = {
    "rows": distribute_tensor(rows, mesh, [Shard(0)]),
    "columns": distribute_tensor(columns, mesh, [Shard(1)]),
    "both": torch.ones(3),
}
dcp.save({"model": model}, checkpoint_id=folder)
dist.barrier()
os._exit(0)  # gloo's threads may abort a process that ends by itself
"""


def test_shards_of_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SHARDED]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "out"), str(tmp_path / "store")])
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    assert len(list((tmp_path / "out").glob("*.distcp"))) == 2
    read = open_checkpoint(tmp_path / "out")
    assert torch.equal(read["rows"], torch.arange(35.0).reshape(7, 5))
    assert torch.equal(read["columns"], torch.arange(24.0).reshape(2, 12).bfloat16())
    assert torch.equal(read["both"], torch.ones(3))
    (tmp_path / "out" / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"lists __1_0\.distcp, which is missing"):
        open_checkpoint(tmp_path / "out")


def test_metadata_with_wrong_claims(tmp_path: Path) -> None:
    folder = save({"w": torch.ones(4, 4)}, tmp_path / "x")
    metadata, data = (folder / ".metadata").read_bytes(), (folder / "__0_0.distcp").read_bytes()
    for old, new, message in (
        (b"__0_0.distcp", b"../../../etc", "outside its folder"),
        (b"\x8c\x07float32", b"\x8c\x07float64", "don't make up its shape|of shape"),
        (b"\x8c\x07float32", b"\x8c\x07floatXX", "no known dtype"),
        (
            b"K\x04K\x04\x86",
            b"K\x04K\x05\x86",
            "don't make up its shape|sizes that can't be|doesn't say where|of shape",
        ),
        (b"TensorStorageMetadata", b"TensorStorageMetadatx", None),
    ):
        assert old in metadata
        (folder / ".metadata").write_bytes(metadata.replace(old, new))
        if message:
            with pytest.raises(CheckpointError, match=message):
                open_checkpoint(folder).state_dict()
        else:
            # the names of classes don't matter
            assert open_checkpoint(folder)["w"].sum() == 16
    (folder / ".metadata").write_bytes(metadata)
    (folder / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="is behind the end"):
        open_checkpoint(folder)
    (folder / "__0_0.distcp").write_bytes(bytes(len(data)))
    with pytest.raises(CheckpointError, match=r"\(w\) can't be read as a torch file"):
        open_checkpoint(folder)["w"]
