"""The papers' other experiments, with few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.drawn_folders import SHORT

from weightops import config_for, run_experiment
from weightops.cli.main import run
from weightops.errors import UnknownNameError
from weightops.workflows.experiments import EXPERIMENTS


def test_an_experiment(own: Path, tmp_path: Path) -> None:
    outcome = run_experiment(
        "intermediate",
        tmp_path / "out",
        model=own / "model",
        task=str(own / "swapped"),
        training=config_for(own / "model", **SHORT),
        device="cpu",
    )
    assert outcome.rows[-1][:3] == [8, pytest.approx(1), pytest.approx(1)]
    cosines = [row[1] for row in outcome.rows]
    assert cosines == sorted(cosines)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"table.txt", "results.json", "report.html", "figure.png", "figure.svg"}


def test_on_the_command_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["experiment", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(EXPERIMENTS)
    options = ["--model", str(own / "model"), "--steps", "8", "--dry-run", "--json"]
    assert run(["experiment", "intermediate", *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 8
    assert plan["about"].startswith("Intermediate task vectors")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="no experiment 'x'"):
        run_experiment("x", tmp_path / "y")
