"""Readers and writers: every format, told by content; ties; outputs whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from weightops import Checkpoint, TaskVector, open_checkpoint
from weightops.errors import CheckpointError, MismatchError, OutputError


def same(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> bool:
    read = checkpoint.state_dict()
    return read.keys() == state.keys() and all(
        torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in state.items()
    )


def forms(module: nn.Module, folder: Path) -> dict[str, Path]:
    """The module's weights in each form of file."""
    state = module.state_dict()
    untied = {n: t.clone() for n, t in state.items()}
    save_file(untied, folder / "plain.safetensors")
    torch.save(state, folder / "plain.pt")
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, folder / "wrapped.ckpt")
    torch.save({"model": state}, folder / "model.bin")
    torch.save({"model_state_dict": state}, folder / "no_suffix")
    save_file(untied, folder / "lies.bin")
    torch.save(state, folder / "lies.safetensors")
    (folder / "index").mkdir()
    halves = list(state)[::2], list(state)[1::2]
    for i, half in enumerate(halves):
        torch.save(
            {name: state[name] for name in half}, folder / "index" / f"pytorch_model-{i}.bin"
        )
    where = {name: f"pytorch_model-{i}.bin" for i, half in enumerate(halves) for name in half}
    (folder / "index" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": where})
    )
    (folder / "single").mkdir()
    torch.save(state, folder / "single" / "pytorch_model.bin")
    open_checkpoint(module).save(folder / "shards", max_shard_size=200)
    return {
        path.name: path
        for path in (
            folder / name
            for name in (
                "plain.safetensors",
                "plain.pt",
                "wrapped.ckpt",
                "model.bin",
                "no_suffix",
                "lies.bin",
                "lies.safetensors",
                "single",
                "index",
                "shards",
            )
        )
    }


def test_every_form_reads_and_edits_alike(net: nn.Module, tuned: nn.Module, tmp_path: Path) -> None:
    for side in ("pre", "ft"):
        (tmp_path / side).mkdir()
    pre, ft = forms(net, tmp_path / "pre"), forms(tuned, tmp_path / "ft")
    expected = TaskVector(net, tuned).apply(net, 0.4).state_dict()
    for name, path in pre.items():
        assert same(open_checkpoint(path), dict(net.state_dict())), name
        assert same(TaskVector(path, ft[name]).apply(path, 0.4), dict(expected)), name
    assert open_checkpoint(pre["wrapped.ckpt"]).source.skipped == ("epoch", "optimizer")
    assert (
        open_checkpoint(pre["plain.pt"]).source.fingerprint
        == open_checkpoint(pre["plain.safetensors"]).source.fingerprint
    )
    shards = sorted(path.name for path in pre["shards"].iterdir())
    assert shards[0].startswith("model-00001-of-0000")
    assert shards[-1] == "model.safetensors.index.json"
    files = [path for path in pre["shards"].glob("*.safetensors")]
    assert set().union(*(load_file(path) for path in files)) == set(net.state_dict()) - {
        "out.weight"
    }


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


def test_load_into(net: nn.Module, tuned: nn.Module) -> None:
    open_checkpoint(tuned).load_into(net)
    assert torch.equal(net.hidden.weight, tuned.hidden.weight)
    with pytest.raises(MismatchError, match="only in the checkpoint"):
        open_checkpoint(tuned).load_into(nn.Linear(5, 5))
    with pytest.raises(CheckpointError, match="doesn't say of what model"):
        open_checkpoint(tuned).model()


# ----------------------------------------------------------------- bad input


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    cases = {
        "no file or folder": tmp_path / "absent",
        "is not a checkpoint.*begins with b'hello": tmp_path / "text.safetensors",
        "is none of safetensors, index, adapter, distributed checkpoint, torch zip, torch stream, torch tar": tmp_path
        / "empty.pt",
        "holds no file of weights": tmp_path / "hollow",
        "holds 2 files of weights and no one index": tmp_path / "two",
        "not a sound safetensors file|none of": tmp_path / "cut.safetensors",
        "holds a list, not a state dict": tmp_path / "list.pt",
        "not valid JSON|none of": tmp_path / "broken.json",
    }
    (tmp_path / "text.safetensors").write_text("hello world, this is text")
    (tmp_path / "empty.pt").write_bytes(b"")
    for folder in ("hollow", "two"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        save_file({"w": torch.zeros(2)}, tmp_path / "two" / f"{name}.safetensors")
    save_file({"w": torch.zeros(1000)}, tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 2000)
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "broken.json").write_text('{"weight_map": ')
    for message, path in cases.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
    with pytest.raises(CheckpointError, match="holds int at 'w'"):
        open_checkpoint({"w": 3})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="holds a meta tensor"):
        open_checkpoint(nn.Linear(2, 2, device="meta"))


def test_indexes_that_lie(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    save_file({"w": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path.parent / "outside.safetensors")
    for weight_map, message in (
        ({"w": "absent.safetensors"}, "absent.safetensors, which is missing"),
        ({"v": "one.safetensors"}, "lists v in one.safetensors, which doesn't hold it"),
        ({"w": "../outside.safetensors"}, "outside its folder"),
        ({"w": str(tmp_path.parent / "outside.safetensors")}, "outside its folder"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(index)


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
        OutputError, match=r"other things than a model or results \(1.png\)\nhint: it is not"
    ):
        open_checkpoint(net).save(pictures, overwrite=True)
    assert (pictures / "1.png").read_text() == "mine"


def test_overwriting_an_input_of_the_expression(
    net: nn.Module, tuned: nn.Module, tmp_path: Path
) -> None:
    pre = open_checkpoint(net).save(tmp_path / "pre.safetensors")
    expected = TaskVector(net, tuned).apply(net, 0.5).state_dict()
    TaskVector(pre, tuned).apply(pre, 0.5).save(pre, overwrite=True)
    assert same(open_checkpoint(pre), dict(expected))


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
    """A limit on file size stands for a disk that is full: the system refuses the same calls."""
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
