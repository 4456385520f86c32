"""The log of a fine-tuning, where else it goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.lofi_jobs import RECIPE

from weightops import TrainingConfig, finetune
from weightops.cli.main import run
from weightops.errors import MissingExtraError, OptionError

CONFIG = TrainingConfig(steps=12, batch_size=8, lr=1e-3, warmup=2)


def lines_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_has_the_lines_of_the_log_and_changes_nothing(tmp_path: Path) -> None:
    log = tmp_path / "all.jsonl"
    tuned = finetune("embedded", "mnist", CONFIG, out=tmp_path / "a", log_to=f"jsonl:{log}")
    plain = finetune("embedded", "mnist", CONFIG, out=tmp_path / "b")
    assert tuned.fingerprint == plain.fingerprint
    own = lines_of(tmp_path / "a" / "log.jsonl")
    assert lines_of(log) == [{"run": "a", **line} for line in own]
    assert [line["step"] for line in own] == [1, 11, 12]


def test_nodes_share_a_file(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    options = [*RECIPE, "--steps", "2", "--nodes", "2", "--log-to", f"jsonl:{log}"]
    assert run(["lofi", *options, "-o", str(out)]) == 0
    steps = [(line["run"], line["step"]) for line in lines_of(log)]
    assert steps == [(f"out/node{i}", step) for i in range(2) for step in (1, 2)]


@pytest.mark.parametrize("name", ["tensorbord", "jsonl", "jsonl:", "csv:x"])
def test_what_isnt_known_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"(?s)can't go to .*tensorboard, wandb or jsonl:PATH"):
        finetune("embedded", "mnist", CONFIG, out=tmp_path / "a", log_to=name)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'weightops\[{name}\]'"):
        finetune("embedded", "mnist", CONFIG, out=tmp_path / "a", log_to=name)
    assert not (tmp_path / "a").exists()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = tmp_path / "runs"
    finetune("embedded", "mnist", CONFIG, out=tmp_path / "a", log_to=f"tensorboard:{runs}")
    events = EventAccumulator(str(runs / "a")).Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss")]
    own = lines_of(tmp_path / "a" / "log.jsonl")
    assert written == [(line["step"], pytest.approx(line["loss"])) for line in own]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    finetune("embedded", "mnist", CONFIG, out=tmp_path / "a", log_to="wandb")
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    assert b"weightops" in content
    assert content.count(b"loss") >= 3
