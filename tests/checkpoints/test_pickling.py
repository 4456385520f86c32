"""Checkpoints and vectors travel as the place and fingerprint of their weights."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.closeness import bits_equal
from helpers.nets import perturbed
from helpers.transformers_folders import saved as saved_model
from helpers.transformers_folders import small_gpt2
from safetensors.torch import save_file
from torch import nn

from weightops import TaskVector, merge, open_checkpoint
from weightops.errors import CheckpointError

IN_ANOTHER_PROCESS = """
import pickle, sys, torch
edited = pickle.load(open(sys.argv[1], "rb"))
torch.save(dict(edited), sys.argv[2])
"""


@pytest.mark.parametrize("kind", ["pickle", "deepcopy"])
def test_a_vector_of_files_is_the_same_after_its_travel(
    saved: tuple[Path, Path], kind: str
) -> None:
    pre, ft = saved
    tau = TaskVector(pre, ft)
    again = pickle.loads(pickle.dumps(tau)) if kind == "pickle" else copy.deepcopy(tau)
    assert repr(again) == repr(tau)
    assert len(again.apply(pre, 1.0).form.terms) == 1  # the base cancels
    assert bits_equal(dict(again.apply(pre, 0.4)), dict(tau.apply(pre, 0.4)))
    assert again.apply(pre, 0.4).fingerprint == tau.apply(pre, 0.4).fingerprint


def test_no_tensor_travels(tmp_path: Path) -> None:
    large = {"w": torch.randn(500_000)}
    path = open_checkpoint(large).save(tmp_path / "large.safetensors")
    assert len(pickle.dumps(open_checkpoint(path))) < 2_000
    assert len(pickle.dumps(TaskVector(path, path) + TaskVector(path, path))) < 4_000


def test_it_opens_in_another_process_and_folder(
    saved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    edited = TaskVector(saved[0].name, saved[1].name).apply(saved[0].name, 0.4)
    (tmp_path / "edited.pkl").write_bytes(pickle.dumps(edited))
    arguments = [str(tmp_path / "edited.pkl"), str(tmp_path / "out.pt")]
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments]
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    subprocess.run(command, check=True, cwd="/", env={**os.environ, "PYTHONPATH": path})
    assert bits_equal(torch.load(tmp_path / "out.pt"), dict(edited))


def test_a_file_that_changed_is_refused(saved: tuple[Path, Path], net: nn.Module) -> None:
    pre, ft = saved
    text = pickle.dumps(TaskVector(pre, ft))
    open_checkpoint(perturbed(net, 9)).save(ft, overwrite=True)
    with pytest.raises(CheckpointError, match=r"ft\.safetensors has changed since it was pickled"):
        pickle.loads(text)
    ft.unlink()
    with pytest.raises(CheckpointError, match="there is no file"):
        pickle.loads(text)


def test_a_file_that_was_copied_back_is_the_same(saved: tuple[Path, Path]) -> None:
    pre, _ = saved
    text, content = pickle.dumps(open_checkpoint(pre)), pre.read_bytes()
    pre.unlink()
    pre.write_bytes(content)
    assert bits_equal(dict(pickle.loads(text)), dict(open_checkpoint(pre)))


def test_models_keep_their_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    embedded = open_checkpoint("embedded")
    embedded.save("clip")
    for ref in ("embedded", "clip"):
        opened = open_checkpoint(ref)
        assert opened.skeleton is not None
        text = pickle.dumps(opened)
        assert len(text) < 50_000
        monkeypatch.chdir("/")
        again = pickle.loads(text)
        monkeypatch.chdir(tmp_path)
        assert bits_equal(again.model().state_dict(), opened.model().state_dict())


def test_adapters_renamed_weights_and_merges_travel(tmp_path: Path) -> None:
    folder = saved_model(small_gpt2(), tmp_path / "gpt2")
    base = open_checkpoint(folder)
    prefixed = {f"module.{name}": tensor + 0.1 for name, tensor in base.items()}
    path = open_checkpoint(prefixed).save(tmp_path / "wrapped.safetensors")
    tau = TaskVector(folder, path)
    tau.save_lora(tmp_path / "lora", 2)
    lora = TaskVector(folder, tmp_path / "lora")
    merged = merge([path, tmp_path / "lora"], "ties", base=folder, density=0.5)
    for one in (tau, lora, merged):
        again = pickle.loads(pickle.dumps(one))
        assert bits_equal(dict(again), dict(one))


def test_dequantised_and_embedded_weights_travel(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(4, 6).to(torch.float8_e4m3fn), "w_scale": torch.tensor(0.5)}
    stored = {f"layer.{name.replace('w', 'weight', 1)}": t for name, t in tensors.items()}
    save_file(stored, tmp_path / "quantised.safetensors")
    for ref in (f"dequantized:{tmp_path / 'quantised.safetensors'}", "embedded"):
        opened = open_checkpoint(ref)
        again = pickle.loads(pickle.dumps(opened))
        assert again.source.ref == opened.source.ref
        assert again.fingerprint == opened.fingerprint
        assert bits_equal(dict(again), dict(opened))


def test_weights_in_memory_travel_with_their_values(net: nn.Module, tuned: nn.Module) -> None:
    tau = TaskVector(net.state_dict(), tuned.state_dict())
    again = copy.deepcopy(tau)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.zero_()
    start = net.state_dict()
    assert not bits_equal(dict(again.apply(start, 1.0)), dict(tau.apply(start, 1.0)))
