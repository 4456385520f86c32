"""Opening weights: formats are recognised by content, and wrong input is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.same_weights import holds
from safetensors.torch import load_file, save_file
from torch import nn

from weightops import TaskVector, open_checkpoint
from weightops.checkpoints import opening
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.opening import FORMATS, Format, register_format
from weightops.errors import CheckpointError, OptionError
from weightops.support.registry import Registry


def files_of(module: nn.Module, folder: Path) -> dict[str, Path]:
    """Write the weights of a module in each format, and return file name -> path."""
    state = module.state_dict()
    untied = {n: t.clone() for n, t in state.items()}
    save_file(untied, folder / "plain.safetensors")
    torch.save(state, folder / "plain.pt")
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, folder / "wrapped.ckpt")
    torch.save({"model": state}, folder / "model.bin")
    torch.save({"model_state_dict": state}, folder / "no_suffix")
    save_file(untied, folder / "safetensors.bin")
    torch.save(state, folder / "torch.safetensors")
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
    names = (
        "plain.safetensors",
        "plain.pt",
        "wrapped.ckpt",
        "model.bin",
        "no_suffix",
        "safetensors.bin",
        "torch.safetensors",
        "single",
        "index",
        "shards",
    )
    return {name: folder / name for name in names}


def test_every_format_gives_the_same_weights_and_edits(
    net: nn.Module, tuned: nn.Module, tmp_path: Path
) -> None:
    for side in ("pre", "ft"):
        (tmp_path / side).mkdir()
    pre, ft = files_of(net, tmp_path / "pre"), files_of(tuned, tmp_path / "ft")
    expected = TaskVector(net, tuned).apply(net, 0.4).state_dict()
    for name, path in pre.items():
        assert holds(open_checkpoint(path), net.state_dict()), name
        assert holds(TaskVector(path, ft[name]).apply(path, 0.4), expected), name
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


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    cases = {
        "no file or folder": tmp_path / "absent",
        "is not a checkpoint.*begins with b'hello": tmp_path / "text.safetensors",
        "is none of safetensors, index, adapter, distributed checkpoint, torch zip": tmp_path
        / "text.safetensors",
        "is empty: it has 0 bytes": tmp_path / "empty.pt",
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


def test_indexes_with_wrong_claims(tmp_path: Path) -> None:
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


def test_ungathered_weights_of_zero_3_are_refused(tmp_path: Path) -> None:
    state = {"a.weight": torch.empty(0), "b.weight": torch.empty(0), "norm": torch.ones(2)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"2 empty tensors: a.weight, b.weight(?s:.*)zero_to"):
        open_checkpoint(tmp_path)


def test_a_folder_with_weights_and_an_adapter_says_which_it_opens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert list(open_checkpoint(tmp_path)) == ["w"]
    assert "holds weights and an adapter: model.safetensors is opened" in caplog.text


def test_torch_files_hold_no_descriptor(tmp_path: Path) -> None:
    for i in range(20):
        torch.save({"w": torch.full((4,), float(i))}, tmp_path / f"{i}.pt")
    before = len(os.listdir("/proc/self/fd"))
    opened = [open_checkpoint(tmp_path / f"{i}.pt") for i in range(20)]
    assert len(os.listdir("/proc/self/fd")) - before < 3
    assert [float(one["w"][0]) for one in opened] == list(range(20))


def test_packed_and_rare_dtypes_of_safetensors(tmp_path: Path) -> None:
    codes = torch.arange(32, dtype=torch.uint8).reshape(4, 8)
    kinds = ("float8_e8m0fnu", "float8_e4m3fnuz", "float4_e2m1fn_x2")
    tensors = {
        kind: codes.clone().view(getattr(torch, kind)) for kind in kinds if hasattr(torch, kind)
    }
    tensors["complex"] = torch.randn(2, 3, dtype=torch.complex64)
    for name in list(tensors):
        try:
            save_file({name: tensors[name]}, tmp_path / "one.safetensors")
        except KeyError:  # an older safetensors doesn't write it
            del tensors[name]
    save_file(tensors, tmp_path / "rare.safetensors")
    copied = open_checkpoint(tmp_path / "rare.safetensors").save(tmp_path / "copy.safetensors")
    for opened in (load_file(copied), open_checkpoint(copied)):
        for name, tensor in tensors.items():
            assert opened[name].shape == tensor.shape
            assert torch.equal(opened[name].view(torch.uint8), tensor.view(torch.uint8))
    header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    file = tmp_path / "six.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(CheckpointError, match="six"):
        open_checkpoint(file)


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Registry[Format]:
    """A copy of the table of formats, to which a test may add."""
    copy: Registry[Format] = Registry("checkpoint format", "formats", dict(FORMATS))
    monkeypatch.setattr(opening, "FORMATS", copy)
    return copy


def test_a_registered_format_is_asked_in_its_order(
    formats: Registry[Format], tmp_path: Path
) -> None:
    def reads(value: float) -> dict[str, Callable[[Path], Any]]:
        return {
            "recognises": lambda path: path.stat().st_size > 0,
            "open": lambda path: MemorySource({"w": torch.full((2,), value)}, str(path)),
        }

    (tmp_path / "text").write_text("hello")
    save_file({"w": torch.zeros(2)}, tmp_path / "zeros.safetensors")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        open_checkpoint(tmp_path / "text")
    register_format("threes", **reads(3), order=300)
    assert open_checkpoint(tmp_path / "text")["w"].tolist() == [3, 3]
    register_format("twos", **reads(2))
    assert open_checkpoint(tmp_path / "text")["w"].tolist() == [2, 2]
    assert open_checkpoint(tmp_path / "zeros.safetensors")["w"].tolist() == [0, 0]
    register_format("ones", **reads(1), order=5)
    assert open_checkpoint(tmp_path / "zeros.safetensors")["w"].tolist() == [1, 1]
    with pytest.raises(OptionError, match="there is a checkpoint format 'ones' already"):
        register_format("ones", **reads(1))
    first, second = Format(*reads(0).values()), Format(*reads(0).values(), order=20)
    assert first.order == max(first.order, *(form.order for form in FORMATS.values()))
    assert second.order == FORMATS["index"].order
