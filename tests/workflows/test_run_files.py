"""Every run writes the options that repeat it, and its command reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.closeness import bits_equal

from weightops import SearchOptions, config_for, open_checkpoint
from weightops.cli.main import run
from weightops.tasks.table import find_task
from weightops.workflows.patch import Patch
from weightops.workflows.run_file import run_file

TRAINING = "--steps 4 --batch-size 16 --lr 0.003 --seed 1"
RUNS = {
    "patch": f"--task swapped --supported plain,turned --rule mean {TRAINING}",
    "negate": f"--target shapes --control plain --control-threshold 0 {TRAINING} "
    "--finetuned swapped.safetensors --baselines",
    "add": "--tasks swapped,turned --finetuned swapped.safetensors --finetuned "
    "turned.safetensors --method ties --option density=0.3 --objective mean",
    "analogy": "--a plain --b shapes --c swapped --target turned --shared "
    "--finetuned swapped.safetensors --finetuned turned.safetensors "
    "--finetuned swapped.safetensors",
}


@pytest.mark.parametrize("verb", RUNS)
def test_a_run_is_repeated_from_its_file(
    own: Path, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own)
    out, again = tmp_path / "out", tmp_path / "again"
    options = [*RUNS[verb].split(), "--alphas", "0.5,1", "--device", "cpu", "-q"]
    assert run([verb, "--model", "model", *options, "-o", str(out)]) == 0
    said = yaml.safe_load((out / "run.yaml").read_text())
    assert said["verb"] == verb
    assert said["model"] == "model"
    assert said["alphas"] == [0.0, 0.5, 1.0]
    assert ("steps" in said) == ("--steps" in options)
    config = ["--config", str(out / "run.yaml"), "--device", "cpu", "-q"]
    assert run([verb, *config, "-o", str(again)]) == 0
    name = "open_clip_model.safetensors"
    assert (out / name).read_bytes() == (again / name).read_bytes()
    assert (out / "run.yaml").read_text() == (again / "run.yaml").read_text()


def test_soups_too(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for alpha in ("0.1", "0.4"):
        vector = str(own / "swapped.safetensors")
        assert (
            run(["apply", vector, "--base", str(own / "model"), "--alpha", alpha, "-o", alpha]) == 0
        )
    options = ["--tasks", "shapes", "--recipe", "uniform", "--device", "cpu", "-q"]
    assert run(["soup", "0.1", "0.4", *options, "-o", "out"]) == 0
    assert run(["soup", "--config", "out/run.yaml", "-q", "-o", "again"]) == 0
    assert Path("out/run.yaml").read_text() == Path("again/run.yaml").read_text()
    assert "models: ['0.1', '0.4']" in Path("out/run.yaml").read_text()


def test_the_command_line_precedes_the_file(
    own: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"task: {own / 'swapped'}\nsteps: 7\nalphas: '0:1:0.5'\nmax-supported-drop: 0.5\n"
    )
    plan = [
        "patch",
        "--config",
        str(file),
        "--supported",
        str(own / "plain"),
        "--dry-run",
        "--json",
    ]
    assert run(plan) == 0
    said = yaml.safe_load(capsys.readouterr().out)
    assert said["alphas"] == [0.0, 0.5, 1.0]
    assert said["config"]["steps"] == 7
    assert run([*plan, "--steps", "3", "--alphas", "0.25"]) == 0
    said = yaml.safe_load(capsys.readouterr().out)
    assert (said["config"]["steps"], said["alphas"]) == (3, [0.0, 0.25])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("stps: 8", "run.yaml: there is no option of patch 'stps'\nhint: did you mean steps"),
        ("verb: negate", "it is a run of negate, not of patch\nhint: weightops negate --config"),
        ("task: mnist\nsteps: soon", "'--steps': 'soon' is not a valid integer"),
        ("rule: [mean, patching]", "rule is one value, not ['mean', 'patching']"),
        ("- task", "it must be one mapping of options to values"),
        ("steps: 8\nsteps: 9", "repeats the key 'steps' in line 2"),
        ("resume: true", "there is no option of patch 'resume'"),
        ("task: [", "is not valid YAML"),
    ],
)
def test_refused_files(
    content: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert run(["patch", "--config", str(tmp_path / "run.yaml")]) in (1, 2)
    assert sentence in capsys.readouterr().err


def test_what_only_python_can_say_is_a_comment(own: Path) -> None:
    task = replace(find_task(str(own / "swapped")), name="mine")
    workflow = Patch(
        task,
        supported=["shapes"],
        rule="mean",
        max_supported_drop=0.01,
        strategy="joint",
        model=str(own / "model"),
        finetuned=None,
        search=SearchOptions((0.5,)),
        training=config_for("embedded", steps=3),
        device="cpu",
        precision="auto",
    )
    text = run_file(workflow)
    assert "# task was given in Python: Task('mine', 2 classes" in text
    assert "task" not in yaml.safe_load(text)
    assert yaml.safe_load(text)["steps"] == 3


def test_other_runs_too(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    few = ["--steps", "2", "--batch-size", "8", "-q"]
    runs = {
        "finetune": ["--task", "swapped", "--node", "1/3", "--model", "model", *few],
        "rank": ["swapped.safetensors", "--target", "swapped", "--steps", "2", "-q"],
        "experiment": ["intermediate", *few],
        "lofi": ["--task", "swapped", "--nodes", "2", *few],
    }
    for verb, options in runs.items():
        out, again = tmp_path / verb, tmp_path / f"{verb} again"
        assert run([verb, *options, "--device", "cpu", "-o", str(out)]) == 0
        config = ["--config", str(out / "run.yaml"), "--device", "cpu", "-q"]
        assert run([verb, *config, "-o", str(again)]) == 0
        assert (out / "run.yaml").read_text() == (again / "run.yaml").read_text()
        for path in out.glob("*.safetensors"):
            assert bits_equal(dict(open_checkpoint(path)), dict(open_checkpoint(again / path.name)))
