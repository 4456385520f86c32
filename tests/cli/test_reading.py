"""The options that say how the data of tasks are read, in every verb that takes tasks."""

import json
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from weightops.cli.main import VERBS, run, weightops
from weightops.cli.types import TaskNames
from weightops.tasks.table import as_read, find_task


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Write a folder whose test split has one picture that can't be read, and train another."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        for name in ("class 2", "class 10"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    for split in ("train", "test"):
        (tmp_path / "photos" / split / "class 2" / "bad.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def verbs_with_tasks() -> list[click.Command]:
    context = click.Context(weightops)
    commands = [weightops.get_command(context, verb) for verb in VERBS]
    groups = [command for command in commands if isinstance(command, click.Group)]
    every = [*commands, *(inner for group in groups for inner in group.commands.values())]
    return [c for c in every if c and any(isinstance(p.type, TaskNames) for p in c.params)]


def test_every_verb_that_takes_tasks_has_the_options() -> None:
    commands = verbs_with_tasks()
    assert len(commands) >= 10
    for command in commands:
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert "--skip-unreadable" in flags, command.name
        has_classes = any(
            isinstance(p.type, TaskNames) and p.name != "batchnorm" for p in command.params
        )
        assert ("--class-order" in flags) == has_classes, command.name


def test_an_edit_without_unreadable_pictures(damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["patch", "--task", str(damaged), "--supported", "digits", "--alphas", "0,1"]
    command += ["--steps", "1", "--rule", "mean", "--max-supported-drop", "1", "-o", str(out)]
    assert run(command) == 1
    own = ["finetune", "--model", "embedded", "--steps", "1", "--task"]
    tuned = tmp_path / "tuned"
    assert run([*own, str(damaged), "-o", str(tuned)]) == 1
    assert run([*own, str(damaged), "--skip-unreadable", "-o", str(tuned)]) == 0
    record = json.loads((tuned / "training.json").read_text())
    assert record["unreadable"] == 1
    assert "without pictures that can't be read" in record["source"]
    code = run([*command, "--skip-unreadable", "--finetuned", str(tuned)][:-2])
    assert code in (0, 1)  # one step may improve nothing
    if code == 0:
        entry = json.loads((out / "summary.json").read_text())["tasks"]["photos"]
        assert entry["unreadable"] == 2


def test_a_soup_counts_what_it_leaves_out(damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "soup"
    command = ["soup", "embedded", "embedded", "--recipe", "uniform", "--tasks", str(damaged)]
    assert run([*command, "-o", str(out)]) == 1
    command += ["--class-order", "natural"]
    assert run([*command, "--skip-unreadable", "-o", str(out)]) == 0
    entry = json.loads((out / "summary.json").read_text())["tasks"]["photos"]
    assert (entry["unreadable"], entry["class_order"]) == (1, "natural")
    assert entry["soup"]["n"] == 6


def test_statistics_and_a_check(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gram.safetensors"
    command = ["statistics", "embedded", "--task", str(damaged), "-o", str(out)]
    assert run(command) == 1
    assert run([*command, "--skip-unreadable"]) == 0
    capsys.readouterr()
    check = ["tasks", "check", str(damaged)]
    assert run(check) == 1
    capsys.readouterr()
    assert run([*check, "--skip-unreadable", "--class-order", "natural", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == ["class 2", "class 10"]
    assert found["counts"]["test"] == [4, 3]
    assert run(["tasks", "--skip-unreadable"]) == 2


def test_names_of_tasks_that_are_read_otherwise(damaged: Path) -> None:
    name = as_read(str(damaged), class_order="natural", skip_unreadable=True)
    task = find_task(name)
    assert task is find_task(name)
    assert (task.name, task.class_order) == ("photos", "natural")
    assert len(task.load("test")) == 6
    assert task.reading("test")["unreadable"] == 1
    words = find_task(f"typographic:readable:{damaged}")
    assert words.reading("test", "train")["unreadable"] == 2


def test_options_without_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "embedded", "--skip-unreadable"]) == 2
    assert "--skip-unreadable is for tasks that are named" in capsys.readouterr().err
