"""Averages of nodes: the weights of each, parts of the tensors, and nodes that are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.lofi_jobs import equal, opened, recorded_node

from weightops import open_checkpoint
from weightops.cli.main import run
from weightops.errors import MismatchError, NonfiniteError
from weightops.training import lofi

NODES = ("node0", "node1", "node2")


def test_averages_by_samples(separate: Path) -> None:
    mean = lofi.average([separate / node for node in NODES])
    states = [node.state_dict() for node in opened(separate, *NODES)]
    for name, tensor in mean.state_dict().items():
        exact = sum(n * s[name].double() for n, s in zip((40, 40, 48), states, strict=True)) / 128
        assert torch.allclose(tensor.double(), exact, rtol=0, atol=1e-6)


def test_averages_on_the_command_line(
    separate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes, out = [str(separate / node) for node in NODES], tmp_path / "merged"
    capsys.readouterr()
    assert run(["lofi", "merge", *nodes, "-o", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["nodes"][nodes[2]] == {"weight": 48.0, "coefficient": 0.375}
    cards = {out: "* node2: 0.375", separate / "node0": "# embedded fine-tuned on digits"}
    for folder, text in cards.items():
        assert text in (folder / "README.md").read_text()
        assert run(["push", str(folder), "org/name", "--license", "mit", "--dry-run"]) == 0
    mean = lofi.average(nodes)
    assert equal(open_checkpoint(out), mean)
    by_hand = mean.save(tmp_path / "by_hand")
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".md"}
    assert files == {name: (by_hand / name).read_bytes() for name in files}
    assert f"weightops lofi merge {' '.join(NODES)} -o merged" in (out / "README.md").read_text()
    assert open_checkpoint(out).architecture is not None
    plain = tmp_path / "plain"
    assert run(["merge", *nodes, "-o", str(plain), "--weights", "40,40,48"]) == 0
    merged = open_checkpoint(plain)
    assert all(torch.allclose(merged[name], mean[name], atol=1e-6) for name in mean)


def test_averages_only_a_part(separate: Path) -> None:
    nodes = opened(separate, *NODES)
    partial = lofi.average(nodes, only="visual.transformer.*").state_dict()
    full = lofi.average(nodes).state_dict()
    for name, tensor in partial.items():
        selected = name.startswith("visual.transformer.")
        assert torch.equal(tensor, full[name] if selected else nodes[0][name]), name


def test_nan_and_unfinished_nodes_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unfinished = tmp_path / "node3"
    unfinished.mkdir()
    (unfinished / "training.4.pt").write_bytes(b"")
    ones = {"w": torch.ones(2)}
    diverged = recorded_node({"w": torch.tensor([1.0, torch.nan])}, node={"index": 1})
    other = recorded_node(ones, config={"seed": 1})
    average = lofi.survey([recorded_node(ones), diverged, other, unfinished])
    assert torch.equal(average.model["w"], torch.ones(2))
    assert average.record()["left_out"] == {
        "number 1": "NaN or Inf in 1 tensors: w",
        str(unfinished): "it isn't finished; resuming its run finishes it",
    }
    assert "left out of the average: number 1: NaN" in caplog.text
    saved = average.save(tmp_path / "merged")
    assert json.loads((saved / "lofi.json").read_text()) == average.record()
    with pytest.raises(NonfiniteError, match="no node to average"):
        lofi.average([diverged])


def test_a_node_that_is_given_twice(separate: Path) -> None:
    with pytest.raises(MismatchError, match="node0 is given twice"):
        lofi.average([separate / "node0", str(separate / "node0")])
