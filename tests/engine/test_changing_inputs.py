"""Inputs that change while they are read: one error that names the file, and nothing is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightops import TaskVector, open_checkpoint
from weightops.errors import CheckpointError, OutputError

JOB = """
import os, signal, sys, time
from pathlib import Path
import weightops.engine.write as write
from weightops import average, open_checkpoint
from weightops.errors import WeightopsError

folder, suffix, resume = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"
written = 0

def slow(*data, real=write._pwrite):
    global written
    written += 1
    (folder / "begun").touch()
    time.sleep(0.05)
    while (folder / "pause").exists():
        time.sleep(0.01)
    return real(*data)

write._pwrite = slow
models = [open_checkpoint(folder / f"{name}{suffix}") for name in "ab"]
try:
    average(models).save(folder / "out", resume=resume)
except WeightopsError as error:
    print(error)
    sys.exit(1)
"""


def save(path: Path, value: float) -> None:
    tensors = {f"w{i}": torch.full((1000, 1500), value) for i in range(4)}
    torch.save(tensors, path) if path.suffix == ".pt" else save_file(tensors, path)


def shortened(path: Path) -> None:
    os.truncate(path, 5000)


def replaced(path: Path) -> None:
    save(path.with_name(f"new{path.suffix}"), 7.0)
    path.with_name(f"new{path.suffix}").replace(path)


def rewritten(path: Path) -> None:
    """Keep the size, as a program does that writes into the file."""
    with open(path, "r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(bytes(4))


def removed(path: Path) -> None:
    path.unlink()


def begin(folder: Path, suffix: str, resume: str = "") -> subprocess.Popen[str]:
    """Start the job and return it when it has written something and waits."""
    (folder / "pause").touch()
    line = [sys.executable, "-c", JOB, str(folder), suffix, resume]
    job = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    while not (folder / "begun").exists():
        assert job.poll() is None
    return job


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("change", [shortened, replaced, rewritten, removed])
@pytest.mark.parametrize("resume", ["", "resume"])
def test_an_input_changes(
    tmp_path: Path, suffix: str, change: Callable[[Path], None], resume: str
) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save(tmp_path / f"{name}{suffix}", value)
    job = begin(tmp_path, suffix, resume)
    change(tmp_path / f"b{suffix}")
    (tmp_path / "pause").unlink()
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert f"b{suffix} " in said
    assert "changed while it was read" in said or "can't be read: No such file" in said
    assert not (tmp_path / "out").exists()
    left = [path.name for path in tmp_path.glob(".out*/*")]
    assert not [name for name in left if "journal" in name or "safetensors" in name]
    if change is not removed and change is not shortened:
        (tmp_path / "begun").unlink()
        job = begin(tmp_path, suffix, "resume")
        (tmp_path / "pause").unlink()
        said, _ = job.communicate(timeout=60)
        assert job.returncode == 0, said  # a new start isn't held up by what the old one left


def test_a_killed_job_is_not_resumed_with_other_inputs(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save(tmp_path / f"{name}.safetensors", value)
    job = begin(tmp_path, ".safetensors", "resume")
    job.kill()
    job.communicate()
    (tmp_path / "pause").unlink()
    rewritten(tmp_path / "b.safetensors")
    models = [open_checkpoint(tmp_path / f"{name}.safetensors") for name in "ab"]
    vector = TaskVector(models[0], models[1]).apply(models[0])
    with pytest.raises(OutputError, match="what another job left, of other inputs"):
        vector.save(tmp_path / "out", resume=True)
    vector.save(tmp_path / "out")


def test_whole_tensors_of_a_changed_file_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", 1.0)
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    source = checkpoint.source
    shortened(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors changed while it was read"):
        source.read("w0")
    with pytest.raises(CheckpointError, match=r"a\.safetensors changed while it was read"):
        checkpoint.state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_was_read_outlives_its_file(tmp_path: Path, suffix: str) -> None:
    """A mapped file that becomes shorter ends the process, when the tensor is looked at."""
    save(tmp_path / f"a{suffix}", 1.0)
    save(tmp_path / f"b{suffix}", 2.0)
    vector = TaskVector(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}")
    whole = open_checkpoint(tmp_path / f"a{suffix}").source.read("w3")
    source = open_checkpoint(tmp_path / f"b{suffix}").source
    shortened(tmp_path / f"a{suffix}")
    shortened(tmp_path / f"b{suffix}")
    assert torch.equal(whole, torch.full((1000, 1500), 1.0))
    with pytest.raises(CheckpointError, match=rf"b{suffix} changed while it was read"):
        _ = source.fingerprint
    with pytest.raises(CheckpointError, match=rf"{suffix} changed while it was read"):
        vector.norm()


def test_layouts_and_views_are_read_right(tmp_path: Path) -> None:
    """What is read in parts is what is mapped as a whole, for every kind of view in a file."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "plain": base,
        "transposed": base.T,
        "part": base[1:3],
        "strided": base[:, ::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "half": base.half(),
        "long": torch.arange(5),
        "shared": base,
    }
    for new in (True, False):
        torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
        source = open_checkpoint(tmp_path / "x.pt").source
        computed = open_checkpoint(tmp_path / "x.pt").state_dict()
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name), tensor), name
            assert torch.equal(computed[name], tensor), name
