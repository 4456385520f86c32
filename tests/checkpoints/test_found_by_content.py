"""Weights in unusual places are found; files that aren't weights are called by their name."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from weightops import TaskVector, merge, open_checkpoint
from weightops.cli.main import run
from weightops.errors import CheckpointError, MismatchError


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """Return a training checkpoint with several dictionaries of weights."""
    content = {
        "state_dict": {"w": torch.ones(2)},
        "state_dict_ema": {"w": torch.zeros(2)},
        "best": {"epoch.3": {"w": torch.full((2,), 5.0)}},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
    }
    torch.save(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_key_of_a_torch_file(training: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "weightops"):
        assert open_checkpoint(training)["w"].tolist() == [1, 1]
    assert "state_dict are opened; FILE:KEY opens others: state_dict_ema" in caplog.text
    ema = open_checkpoint(f"{training}:state_dict_ema")
    assert ema["w"].tolist() == [0, 0]
    assert ema.ref == f"{training}:state_dict_ema"
    assert open_checkpoint(f"{training}:best.epoch.3")["w"].tolist() == [5, 5]
    # Two keys of one file are two checkpoints.
    assert TaskVector(training, f"{training}:state_dict_ema")["w"].tolist() == [-1, -1]
    old = training.with_name("old.pt")
    torch.save({"net": {"w": torch.ones(1)}}, old, _use_new_zipfile_serialization=False)
    assert open_checkpoint(f"{old}:net")["w"].tolist() == [1]


def test_a_key_that_is_not_there(training: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no key 'ema'\nhint: weights are under state_dict, "):
        open_checkpoint(f"{training}:ema")
    save_file({"w": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="holds one set of tensors, and so no key 'w'"):
        open_checkpoint(f"{tmp_path}/m.safetensors:w")


def test_inspect_lists_the_dictionaries(training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(training)]) == 0
    said = capsys.readouterr().out
    assert "opened       state_dict; also state_dict_ema; also best.epoch.3\n" in said
    ends = {"ema_model.w": torch.ones(2), "online_model.w": torch.zeros(2)}
    torch.save({**ends, "step": torch.tensor(3)}, training.with_name("ema.pt"))
    torch.save({"w": torch.ones(2), "b": torch.ones(2)}, training.with_name("plain.pt"))
    for name, keys in {"ema.pt": ["ema_model", "online_model"], "plain.pt": []}.items():
        assert run(["inspect", str(training.with_name(name)), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["keys"] == keys
        for key in keys:
            opened = open_checkpoint(f"{training.with_name(name)}:{key}")
            assert torch.equal(opened["w"], ends[f"{key}.w"])


def test_a_training_checkpoint_opens_by_itself(tmp_path: Path) -> None:
    moments = {"state": {0: {"exp_avg": torch.zeros(2)}}}
    content = {"step": torch.tensor(3), "model_state": {"w": torch.ones(2)}, "optimizer": moments}
    torch.save(content, tmp_path / "step3.pt")
    assert list(open_checkpoint(tmp_path / "step3.pt")) == ["w"]


def test_counters_of_averages_do_not_matter() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = AveragedModel(net, use_buffers=True)
    average.update_parameters(net)
    own = net.state_dict()
    ema = {f"ema_model.{name}": t + 1 if t.is_floating_point() else t for name, t in own.items()}
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(3)}
    assert TaskVector(own, average.state_dict()).norm() == 0
    assert TaskVector(own, ema)["0.bias"].tolist() == pytest.approx([1, 1])


def test_files_that_are_not_weights_are_called_by_name(tmp_path: Path) -> None:
    (tmp_path / "lfs").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")
    (tmp_path / "llama").write_bytes(b"GGUF" + bytes(60))
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "program.pt2")
    for name, message in (
        ("lfs", "is a pointer of Git LFS, not the weights\nhint: `git lfs pull`"),
        ("llama", "is a GGUF file of llama.cpp"),
        ("program.pt2", "is a program of torch.export"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float8_e4m3fn])
def test_codes_that_differ_are_never_taken_from_the_base(dtype: torch.dtype) -> None:
    codes = [torch.arange(6).add(i).to(dtype).reshape(2, 3) for i in range(2)]
    a, b = ({"norm": torch.ones(2), "weight": code, "n": torch.tensor(3)} for code in codes)
    with pytest.raises(MismatchError, match=f"differ in 1 {str(dtype)[6:]} tensors.*: weight"):
        TaskVector(a, b)
    with pytest.raises(MismatchError, match="dequantized: before a path"):
        merge([a, b])
    # What is equal stays, and so may counters differ.
    vector = TaskVector(a, {**a, "norm": torch.zeros(2), "n": torch.tensor(4)})
    edited = vector.apply(a)
    assert torch.equal(edited["weight"].float(), codes[0].float())
    assert edited["n"] == 3


def test_a_difference_at_the_end_of_many_codes_is_seen() -> None:
    codes = torch.zeros(3_000_000, dtype=torch.uint8)
    changed = codes.clone()
    changed[-1] = 1
    with pytest.raises(MismatchError, match="uint8"):
        TaskVector({"w": codes, "s": torch.ones(1)}, {"w": changed, "s": torch.ones(1)})
