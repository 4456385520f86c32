"""Tensors found in pickled objects: state dicts in wrappers, and modules whose classes are gone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.same_weights import holds
from torch import nn

from weightops import TaskVector, merge, open_checkpoint
from weightops.cli.main import run
from weightops.errors import CheckpointError

SRC = """
import torch
class ImageEncoder(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.model = torch.nn.Module()
        self.model.visual = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
        self.model.logit_scale = torch.nn.Parameter(torch.ones([]))
        self.model.bias = None
        self.model.register_parameter("nothing", None)
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("mask", torch.zeros(3), persistent=False)
        self.transform = Transform()
        self.helper = helper
class Transform:
    def __init__(self):
        self.size = 224
def helper():
    pass
"""
SAVE = """
import sys, torch
from src.modeling import ImageEncoder
folder = sys.argv[1]
for seed in (0, 1):
    model = ImageEncoder(seed)
    torch.save(model, f"{folder}/zip{seed}.pt")
    torch.save(model, f"{folder}/stream{seed}.pt", _use_new_zipfile_serialization=False)
    parallel = torch.nn.DataParallel(model)
    torch.save(parallel, f"{folder}/parallel{seed}.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": model, "epoch": 3}, f"{folder}/wrapped{seed}.pt")
    torch.save(model.state_dict(), f"{folder}/state{seed}.pt")
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write files of modules whose classes are in a package that is then deleted."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "src").mkdir()
    (folder / "src" / "modeling.py").write_text(SRC)
    subprocess.run([sys.executable, "-c", SAVE, str(folder)], cwd=folder, check=True)
    shutil.rmtree(folder / "src")
    return folder


@pytest.mark.parametrize("form", ["zip", "stream", "parallel", "wrapped"])
def test_modules_without_their_classes(
    modules: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pre, ft = modules / f"{form}0.pt", modules / f"{form}1.pt"
    plain = [modules / f"state{seed}.pt" for seed in (0, 1)]
    prefix = "module." if form == "parallel" else ""
    opened = open_checkpoint(pre)
    expected = open_checkpoint(plain[0])
    assert list(opened) == [prefix + name for name in expected]
    assert all(torch.equal(opened[prefix + name], expected[name]) for name in expected)
    edited, wanted = TaskVector(pre, ft).apply(pre, 0.4), TaskVector(*plain).apply(plain[0], 0.4)
    assert all(torch.equal(edited[prefix + name], wanted[name]) for name in wanted)
    assert len(merge([pre, ft])) == len(expected)
    assert run(["inspect", str(ft), "--json"]) == 0
    skipped = json.loads(capsys.readouterr().out)["passed_over"]
    assert {"src.modeling.ImageEncoder", "src.modeling.Transform", "src.modeling.helper"} <= set(
        skipped
    )
    assert "torch._utils._rebuild_tensor_v2" not in skipped
    assert any(name.endswith("mask") for name in skipped)
    assert run(["vector", str(pre), str(ft), "-o", str(tmp_path / "v.safetensors"), "--json"]) == 0


def test_torchscript(net: nn.Module, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(net.hidden, torch.randn(2, 5))
        torch.jit.save(script, str(tmp_path / "script.pt"))
        deeper = torch.jit.trace(nn.Sequential(net.hidden, net.norm), torch.randn(2, 5))
        torch.jit.save(deeper, str(tmp_path / "deeper.pt"))
    for path, module in (("script.pt", script), ("deeper.pt", deeper)):
        read = open_checkpoint(tmp_path / path).state_dict()
        expected = module.state_dict()
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert TaskVector(tmp_path / "script.pt", tmp_path / "script.pt").norm() == 0


def test_what_holds_more_than_one_mapping_of_weights(tmp_path: Path) -> None:
    torch.save({"bank": torch.ones(3), "net": {"w": torch.ones(2)}}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"tensors at the top \(bank\) and under net"):
        open_checkpoint(tmp_path / "two.pt")
    around: dict[str, object] = {}
    around["model"] = around
    torch.save(around, tmp_path / "around.pt")
    with pytest.raises(CheckpointError, match="a mapping with keys model"):
        open_checkpoint(tmp_path / "around.pt")
    torch.save({"module": {"w": torch.ones(2)}, "global_steps": 3}, tmp_path / "deepspeed.pt")
    assert set(open_checkpoint(tmp_path / "deepspeed.pt")) == {"w"}


def test_quantised_tensors_are_refused_by_name(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
        torch.save({"w": torch.zeros(2), "q": quantised}, tmp_path / "q.pt")
    with pytest.raises(
        CheckpointError, match=r"q\.pt .*storage is a torch.QInt8Storage, which isn't known"
    ):
        open_checkpoint(tmp_path / "q.pt")
    torch.save({"w": torch.zeros(2), "s": torch.eye(3).to_sparse()}, tmp_path / "s.pt")
    with pytest.raises(
        CheckpointError,
        match=r"s is what torch\._utils\._rebuild_sparse_tensor makes of stored numbers",
    ):
        open_checkpoint(tmp_path / "s.pt")


def test_both_ends_of_ema_pytorch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    average, trained = {"a.w": torch.ones(2)}, {"a.w": torch.zeros(2)}
    state = {"initted": torch.tensor(True), "step": torch.tensor(3)}
    state |= {f"ema_model.{name}": tensor for name, tensor in average.items()}
    state |= {f"online_model.{name}": tensor for name, tensor in trained.items()}
    path = tmp_path / "ema.pt"
    torch.save(state, path)
    assert holds(open_checkpoint(path), average)
    assert "FILE:online_model opens what was trained" in caplog.text
    assert holds(open_checkpoint(f"{path}:ema_model"), average)
    assert holds(open_checkpoint(f"{path}:online_model"), trained)
    with pytest.raises(CheckpointError, match="no key 'none'"):
        open_checkpoint(f"{path}:none")


def test_keys_of_ones_own(net: nn.Module, tmp_path: Path) -> None:
    """DINO keeps a student and a teacher; YOLO's last.pt has its weights under ``ema`` alone."""
    torch.save({"model": None, "ema": net.half(), "epoch": 1}, tmp_path / "last.pt")
    assert open_checkpoint(tmp_path / "last.pt").keys() == net.state_dict().keys()
    pair = {"student": net.state_dict(), "teacher": net.state_dict(), "optimizer": {"state": {}}}
    torch.save(pair, tmp_path / "dino.pth")
    with pytest.raises(CheckpointError, match=r"hint: FILE:KEY opens .*: student, teacher$"):
        open_checkpoint(tmp_path / "dino.pth")
    assert open_checkpoint(f"{tmp_path / 'dino.pth'}:teacher").keys() == net.state_dict().keys()
