"""lo-fi in one process, one node after another."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import split

import pytest
from helpers.lofi_jobs import RECIPE, equal, opened

from weightops import TrainingConfig, open_checkpoint
from weightops.cli.main import run
from weightops.errors import OptionError, OutputError
from weightops.training import lofi
from weightops.training.config import config_for
from weightops.training.nodes import Node


@pytest.mark.usefixtures("one_thread")
def test_one_process_trains_node_after_node(separate: Path, tmp_path: Path) -> None:
    names, out = ("node0", "node1", "node2"), tmp_path / "run"
    config = config_for("embedded", steps=8, batch_size=16, seed=5)
    average = lofi.run("digits", out, training=config, nodes=3, device="cpu")
    assert average is not None
    for node, reference in zip(opened(out, *names), opened(separate, *names), strict=True):
        assert equal(node, reference)
    assert equal(average.model, lofi.average([separate / name for name in names]))
    mean = open_checkpoint(average.model.state_dict())
    with pytest.raises(OutputError, match="merged exists"):
        lofi.run("digits", out, training=config, nodes=3, device="cpu")
    for done in ("node1/finetuned.safetensors", "merged/lofi.json"):
        (out / done).unlink()
    again = lofi.run("digits", out, training=config, nodes=3, device="cpu", resume=True)
    assert again is not None
    assert again.record() == average.record()
    assert equal(open_checkpoint(out / "merged"), mean)


def test_the_number_of_nodes(tmp_path: Path) -> None:
    config = TrainingConfig(steps=1)
    with pytest.raises(OptionError, match="start the nodes with torchrun"):
        lofi.run("digits", tmp_path / "run", training=config)
    with pytest.raises(OptionError, match="nodes is 0, and must be at least 1"):
        lofi.run("digits", tmp_path / "run", training=config, nodes=0)
    with pytest.raises(OptionError, match="must run at once"):
        lofi.run("digits", tmp_path / "run", training=config, nodes=2, like=Node(every=1))


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["lofi", *RECIPE, *split("--steps 8 --nodes 3 --dry-run -o"), str(tmp_path / "out")]
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == {"node0": 40, "node1": 40, "node2": 48}
    assert run(command) == 0
    assert "samples           node0 40, node1 40, node2 48" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert run(["lofi", "--task", "digits"]) == 2
    assert run(["finetune", "--task", "digits", "--node", "4/4"]) == 2
