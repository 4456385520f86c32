"""The folder of a run: what is resumed, what is refused, and what stays until it is replaced."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from weightops import finetune, open_checkpoint
from weightops.errors import CheckpointError, OutputError
from weightops.training.config import config_for
from weightops.training.run_folder import RunFolder, training_record


def run_folder(path: Path, steps: int) -> RunFolder:
    identity = {
        "config": {"steps": steps, "seed": 0},
        "node": {"index": 0, "count": 1, "data": "shuffle"},
        "base": "b",
        "task": "t",
    }
    return RunFolder(path, identity, None, steps, lambda step: 0)


def test_a_checkpoint_says_how_it_was_made(separate: Path) -> None:
    node = open_checkpoint(separate / "node1")
    record = training_record(node)
    assert record is not None
    assert record == json.loads((separate / "node1" / "training.json").read_text())
    assert record["base"] == open_checkpoint("embedded").fingerprint
    assert (record["config"]["steps"], record["config"]["seed"]) == (8, 5)
    assert record["node"] == {"index": 1, "count": 3, "data": "shuffle", "every": 0, "only": ["*"]}
    records = [training_record(open_checkpoint(separate / f"node{i}")) for i in range(3)]
    assert [record and record["samples"] for record in records] == [40, 40, 48]
    assert node.model().visual is not None
    assert training_record(open_checkpoint("embedded")) is None


def test_an_interrupted_run_is_not_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "training.4.pt").write_bytes(b"state")
    config = config_for("embedded", steps=1, batch_size=8)
    message = r"holds a run that was interrupted\nhint: resume=True continues the run"
    with pytest.raises(OutputError, match=message):
        finetune("embedded", "digits", config, out=tmp_path, device="cpu")
    assert (tmp_path / "training.4.pt").read_bytes() == b"state"


def test_a_run_that_is_being_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run"
    facts: dict[str, Any] = {"model": "m", "source": "s", "samples": 4}
    first = run_folder(path, 4)
    assert first.begin(resume=False, overwrite=False) == [0]
    first.finish({"w": torch.ones(2)}, {}, **facts)
    assert run_folder(path, 4).begin(resume=True, overwrite=False) == [0, 4]
    with pytest.raises(CheckpointError, match="holds another run: steps 4, not 6"):
        run_folder(path, 6).begin(resume=True, overwrite=False)
    assert run_folder(path, 6).begin(resume=False, overwrite=True) == [0]
    assert torch.equal(open_checkpoint(path)["w"], torch.ones(2))  # until there are new weights
    assert run_folder(path, 6).begin(resume=True, overwrite=False) == [0]
    run_folder(path, 6).keep({}, 3)
    for overwrite in (False, True):
        assert run_folder(path, 6).begin(resume=True, overwrite=overwrite) == [0, 3]


def test_a_killed_run_that_was_to_replace_another_is_resumed(tmp_path: Path) -> None:
    """Wherever it was killed: --overwrite --resume continues this run, and replaces any other."""
    path = tmp_path / "run"
    facts: dict[str, Any] = {"model": "m", "source": "s", "samples": 4}
    old = run_folder(path, 4)
    old.begin(resume=False, overwrite=False)
    old.finish({"w": torch.ones(2)}, {}, **facts)
    for new in (run_folder(path, 6), run_folder(path, 6)):
        assert new.begin(resume=True, overwrite=True) == [0]
        assert not new.finished
    (path / "training.2.pt").write_bytes(b"damaged")
    assert run_folder(path, 6).begin(resume=True, overwrite=True) == [0]
    new.finish({"w": torch.zeros(2)}, {}, **facts)
    again = run_folder(path, 6)
    assert again.begin(resume=True, overwrite=True) == [0, 6]
    assert again.finished


def test_weights_without_a_record_are_not_resumed(tmp_path: Path) -> None:
    open_checkpoint({"w": torch.zeros(2)}).save(tmp_path / "finetuned.safetensors")
    message = r"no record of how they were made\nhint: overwrite=True starts the run again"
    with pytest.raises(CheckpointError, match=message):
        run_folder(tmp_path, 6).begin(resume=True, overwrite=False)


def test_which_run_a_state_is_of_is_read_without_its_tensors(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", 6)
    run.begin(resume=False, overwrite=False)
    run.keep({"learning": {"w": torch.zeros(1 << 22)}}, 3)
    tracemalloc.start()
    assert run_folder(tmp_path / "run", 6).begin(resume=True, overwrite=False) == [0, 3]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20  # of 16 MB
