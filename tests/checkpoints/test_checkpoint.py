"""Checkpoints: ties, dtypes, modules to load into, and outputs that appear whole or not at all."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.same_weights import holds
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from weightops import TaskVector, open_checkpoint
from weightops.errors import CheckpointError, MismatchError, OutputError


def test_load_into(net: nn.Module, tuned: nn.Module) -> None:
    open_checkpoint(tuned).load_into(net)
    assert torch.equal(net.hidden.weight, tuned.hidden.weight)
    with pytest.raises(MismatchError, match="only in the checkpoint"):
        open_checkpoint(tuned).load_into(nn.Linear(5, 5))
    with pytest.raises(CheckpointError, match="doesn't say of what model"):
        open_checkpoint(tuned).model()


def test_ties_survive(net: nn.Module, tuned: nn.Module, tmp_path: Path) -> None:
    path = open_checkpoint(net).save(tmp_path / "tied.safetensors")
    assert "out.weight" not in load_file(path)
    assert open_checkpoint(path).source.ties == {"out.weight": "embed.weight"}
    edited = TaskVector(path, tuned).apply(path, 0.5).save(tmp_path / "edited.safetensors")
    state = open_checkpoint(edited).state_dict()
    assert state["out.weight"] is state["embed.weight"]
    module = type(net)()
    load_model(module, edited)
    assert torch.equal(module.out.weight, state["embed.weight"])
    torch.save(net.state_dict(), tmp_path / "tied.pt")
    assert open_checkpoint(tmp_path / "tied.pt").source.ties == {"out.weight": "embed.weight"}


def test_what_we_write_is_plain_safetensors(net: nn.Module, tmp_path: Path) -> None:
    path = open_checkpoint(net).save(tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    recorded = json.loads(metadata["weightops"])
    assert recorded["terms"] == [
        {
            "ref": "Net",
            "fingerprint": open_checkpoint(net).source.fingerprint,
            "coefficient": 1.0,
            "rules": [],
        }
    ]
    again = open_checkpoint(net).save(tmp_path / "b.safetensors")
    assert path.read_bytes() == again.read_bytes()


def test_save_casts_only_floats(net: nn.Module, tmp_path: Path) -> None:
    state = open_checkpoint(
        open_checkpoint(net).save(tmp_path / "half", dtype=torch.bfloat16)
    ).state_dict()
    assert state["ids"].dtype == torch.int64
    assert torch.equal(state["hidden.weight"], net.hidden.weight.bfloat16())
    cast = open_checkpoint(net).to(torch.float16)
    assert torch.equal(cast["hidden.weight"], net.hidden.weight.half())
    assert TaskVector(cast, open_checkpoint(net).to(torch.float16)).norm() == 0


# ----------------------------------------------------------------- bad input


# ------------------------------------------------------------- whole outputs


def test_an_output_is_not_replaced_unasked(
    net: nn.Module, tuned: nn.Module, tmp_path: Path
) -> None:
    path = open_checkpoint(net).save(tmp_path / "x.safetensors")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="overwrite=True replaces it"):
        open_checkpoint(tuned).save(path)
    assert path.read_bytes() == before
    open_checkpoint(tuned).save(path, overwrite=True)
    assert path.read_bytes() != before
    folder = open_checkpoint(net).save(tmp_path / "shards", max_shard_size=100)
    open_checkpoint(net).save(folder, overwrite=True)
    assert [p.name for p in folder.iterdir()] == ["model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards", "x.safetensors"]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("labels.json", "1.png"):
        (pictures / name).write_text("mine")
    with pytest.raises(
        OutputError, match=r"other things than a model or results \(1.png\)\nhint: .*'all'"
    ):
        open_checkpoint(net).save(pictures, overwrite=True)
    assert (pictures / "1.png").read_text() == "mine"
    open_checkpoint(net).save(pictures, overwrite="all")
    assert [p.name for p in pictures.iterdir()] == ["model.safetensors"]


def test_resuming_what_is_finished(net: nn.Module, tuned: nn.Module, tmp_path: Path) -> None:
    for name, size in (("x.safetensors", None), ("shards", 100), ("folder", None)):
        path = open_checkpoint(net).save(tmp_path / name, max_shard_size=size)
        states = {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
        open_checkpoint(net).save(path, max_shard_size=size, resume=True)
        assert states == {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
        with pytest.raises(OutputError, match="exists"):
            open_checkpoint(tuned).save(path, max_shard_size=size, resume=True)


def test_overwriting_an_input_of_the_expression(
    net: nn.Module, tuned: nn.Module, tmp_path: Path
) -> None:
    pre = open_checkpoint(net).save(tmp_path / "pre.safetensors")
    expected = TaskVector(net, tuned).apply(net, 0.5).state_dict()
    edited = TaskVector(pre, tuned).apply(pre, 0.5)
    before = pre.read_bytes()
    with pytest.raises(OutputError, match=r"pre.safetensors is an input.*\n.*overwrite='all'"):
        edited.save(pre, overwrite=True)
    with pytest.raises(OutputError, match=r"holds the input pre.safetensors"):
        edited.save(tmp_path, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "pre.safetensors")
    with pytest.raises(OutputError, match=r"link is an input"):
        edited.save(tmp_path / "link", overwrite=True)
    assert pre.read_bytes() == before
    edited.save(pre, overwrite="all")
    assert holds(open_checkpoint(pre), expected)


SMALL_DISK = """
import resource, sys, torch
from weightops import open_checkpoint
from weightops.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    open_checkpoint({"w": torch.zeros(100_000)}).save(sys.argv[1])
except OutputError as error:
    print(error)
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on file size stands for a full disk: the system refuses the same calls."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] != 0
    run = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(tmp_path / "big.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no space left" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_failures_leave_nothing(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightops.engine import write as module

    calls = []

    def interrupt(*arguments: object) -> None:
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_pwrite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint(net).save(tmp_path / "x.safetensors")
    assert calls
    assert list(tmp_path.iterdir()) == []
