"""Patches on a person's own folders: several tasks, the page, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.drawn_folders import SHORT

from weightops import SearchOptions, config_for, patch
from weightops.cli.main import run
from weightops.errors import TaskError


@pytest.fixture
def given(own: Path, options: dict[str, object]) -> dict[str, object]:
    """Arguments of a patch with given weights, under a constraint that all satisfy."""
    return {
        "supported": [str(own / "plain")],
        "max_supported_drop": 1.0,
        "finetuned": own / "swapped.safetensors",
        **options,
    }


@pytest.mark.parametrize("strategy", ["joint", "sequential", "parallel"])
def test_several_tasks(own: Path, tmp_path: Path, strategy: str) -> None:
    result = patch(
        [str(own / "swapped"), str(own / "turned")],
        tmp_path / "out",
        strategy=strategy,
        supported=[str(own / "plain")],
        max_supported_drop=1.0,
        model=own / "model",
        search=SearchOptions((0.5, 1.0)),
        training=config_for(own / "model", **SHORT),
        device="cpu",
    )
    assert result["strategy"] == strategy
    roles = [task["role"] for task in result["tasks"].values()]
    assert roles == ["patching", "patching", "supported"]
    patching = [task for task in result["tasks"].values() if task["role"] == "patching"]
    gains = [task["patched"]["acc1"] - task["base"]["acc1"] for task in patching]
    assert sum(gains) > 0.3
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    weights = {json.loads(line)["weights"] for line in lines}
    assert weights == {"sweep", "base", "finetuned", "patched"}


def test_two_tasks_of_one_name_are_refused(own: Path) -> None:
    with pytest.raises(TaskError, match="two different tasks are called plain"):
        patch(str(own / "plain"), own / "x", supported=[f"{own}/./plain"])


def test_misuse(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = f"{own / 'swapped'},{own / 'turned'}"
    vectors = ["--vector", own / "swapped.safetensors", "--vector", own / "turned.safetensors"]
    model = ["--model", own / "model", "-q"]
    for arguments, code, message in (
        (["add", "--tasks", tasks, "--method", "tise", *vectors], 2, "did you mean ties"),
        (
            ["add", "--tasks", tasks, "--method", "ties", "--option", "densty=1"],
            2,
            "did you mean density",
        ),
        (["add", "--tasks", tasks, *vectors[:2], *model], 2, "learns 2 tasks"),
        (["add", "--tasks", tasks, *vectors[:2], *model], 2, "give one --finetuned for each"),
        (["analogy", "--a", "mnist", "-q"], 2, "name all of --a"),
        (["negate", "--target", "mnist", "--control", "mnist"], 2, "at least one control"),
        (["add", "--tasks", "mnist"], 2, "two tasks at least"),
        (["soup", own / "model"], 2, "two models at least"),
        (["experiment", "intermediat"], 2, "did you mean intermediate"),
    ):
        assert run([*map(str, arguments), "-o", str(tmp_path / "x")]) == code, arguments
        assert message in capsys.readouterr().err


def test_a_run_draws_nothing_over_and_over_in_a_file(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vector = ["--vector", own / "swapped.safetensors", "--max-supported-drop", "1"]
    tasks = ["--task", own / "swapped", "--supported", own / "plain"]
    how = ["--model", own / "model", "--device", "cpu", "-o", tmp_path / "out"]
    assert run(["patch", *map(str, [*tasks, *vector, *how])]) == 0
    written = capsys.readouterr().err
    assert "\r" not in written
    assert len(written) < 1000
