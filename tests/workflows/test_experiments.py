"""The papers' other experiments, with few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.drawn_folders import SHORT, draw
from PIL import Image

from weightops import config_for, evaluate, run_experiment
from weightops.cli.main import run
from weightops.errors import OptionError, UnknownNameError
from weightops.tasks.derived import first_half, second_half, with_classes
from weightops.tasks.striped import STRIPED_COUNTING, STRIPED_LETTERS
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


@pytest.mark.parametrize("name", EXPERIMENTS.names())
def test_every_experiment_ends_in_a_table_and_a_picture(
    own: Path, tmp_path: Path, name: str
) -> None:
    draw(tmp_path / "four", {n: n for n in ("moon", "arrow", "ring", "heart")}, 20, 4)
    task = str(tmp_path / "four")
    outcome = run_experiment(
        name,
        tmp_path / "out",
        model=own / "model",
        task=f"{task},{own / 'swapped'}" if name == "learning-rate" else task,
        supported=str(own / "plain"),
        training=config_for(own / "model", steps=3, batch_size=16),
        device="cpu",
    )
    assert len(outcome.rows) >= 2
    assert all(len(row) == len(outcome.header) for row in outcome.rows)
    table = (tmp_path / "out" / "table.txt").read_text(encoding="utf-8")
    assert table == f"{outcome.text}\n"
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(record["rows"]) == len(outcome.rows)
    with Image.open(tmp_path / "out" / "figure.png") as picture:
        colors = picture.convert("RGB").getcolors(1 << 24) or []
    assert len(colors) > 50
    assert "</svg>" in (tmp_path / "out" / "figure.svg").read_text()


def test_experiments_have_room_to_show_something() -> None:
    """The base isn't perfect where a patch is to help, and not blind where it must not harm."""
    parts = [(first_half(STRIPED_LETTERS), second_half(STRIPED_LETTERS))]
    odd, even = STRIPED_COUNTING.classes[::2], STRIPED_COUNTING.classes[1::2]
    parts.append(
        (with_classes(STRIPED_COUNTING, odd, "odd"), with_classes(STRIPED_COUNTING, even, "even"))
    )
    for tasks in parts:
        scores = evaluate("embedded", tasks, split="validation", precision="float32")
        assert all(0.3 < score["acc1"] < 0.95 for score in scores.values())


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
    (tmp_path / "code.txt").write_text("some words")
    with pytest.raises(OptionError, match="experiments take tasks of images"):
        run_experiment("intermediate", tmp_path / "y", task=str(tmp_path / "code.txt"))
