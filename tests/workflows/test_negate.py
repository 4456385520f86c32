"""Negation: what it writes, its rule, and its baselines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from weightops import TaskVector, config_for, evaluate, negate, open_checkpoint
from weightops.cli.main import run
from weightops.errors import NothingSatisfiesError, OptionError
from weightops.search.goal import Goal, Point
from weightops.search.session import EditSession
from weightops.support.json_files import jsonable
from weightops.support.text import portable
from weightops.tasks.table import find_task
from weightops.workflows.negate import random_like


def test_it_keeps_the_control_and_writes_everything(
    own: Path, options: dict[str, object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = negate(
        str(own / "plain"),
        out,
        control=[str(own / "swapped")],
        control_threshold=0.0,
        baselines=True,
        finetuned=own / "turned.safetensors",
        training=config_for(own / "model", steps=2),
        **options,
    )
    written = {**portable(result), "output": out.name}
    assert json.loads(json.dumps(jsonable(written))) == json.loads(
        (out / "summary.json").read_text()
    )
    assert result["alpha"] < 0
    tasks = result["tasks"]
    roles = {name: task["role"] for name, task in tasks.items()}
    assert roles == {"plain": "target", "swapped": "control"}
    assert {"base", "finetuned", "edited", "random", "ascent"} <= tasks["plain"].keys()
    edited = tasks["plain"]["edited"]["acc1"]
    assert edited < tasks["plain"]["base"]["acc1"]
    vector = TaskVector.load(own / "turned.safetensors")
    expected = vector.apply(own / "model", result["alpha"]).to(torch.float32).state_dict()
    written = open_checkpoint(out).to(torch.float32).state_dict()
    assert all(torch.allclose(t, expected[name], atol=1e-6) for name, t in written.items())
    assert evaluate(out, str(own / "plain"), device="cpu")["plain"]["acc1"] == edited
    assert {path.name for path in out.iterdir()} >= {
        "frontier.png",
        "frontier.svg",
        "report.html",
        "results.jsonl",
        "README.md",
        "task_vector.safetensors",
    }


def test_the_rule() -> None:
    goal = Goal({"t": -1.0}, {"c": 1.0}, ratio=0.95, drop=0.0, errors=0.0, what="lowest t accuracy")
    points = [
        Point(0.0, -0.7, 0.8),
        Point(-0.1, -0.5, 0.79),
        Point(-0.2, -0.3, 0.77),
        Point(-0.3, -0.3, 0.765),
        Point(-0.4, -0.1, 0.7),
    ]
    # The lowest target accuracy above 0.76; of two equal ones, the one nearer to 0.
    assert goal.choose(points).alpha == -0.2
    with pytest.raises(NothingSatisfiesError, match=r"nearest is alpha -0\.4"):
        goal.choose(points[-1:], base=points[0])


def test_a_random_vector_has_the_norms(own: Path) -> None:
    session = EditSession(own / "model", [])
    vector = session.vector(own / "turned.safetensors")
    noise = random_like(session, vector, seed=1)
    expected = vector.norm(per_tensor=True)
    assert noise.norm(per_tensor=True) == pytest.approx(expected, rel=1e-4)
    assert abs(noise.cosine(vector)) < 0.02
    assert noise.cosine(random_like(session, vector, seed=1)) == pytest.approx(1)
    assert abs(noise.cosine(random_like(session, vector, seed=2))) < 0.02


def test_gradient_ascent_goes_up(own: Path) -> None:
    task = find_task(str(own / "plain"))
    config = config_for(own / "model", steps=3, batch_size=16, lr=1e-3, ascend=True)
    session = EditSession(own / "model", [task], config=config)

    def accuracy(vector: TaskVector) -> float:
        return session.measure(vector, "validation").scores["plain"]["acc1"]

    before = accuracy(session.vector(own / "turned.safetensors") * 0.0)
    assert accuracy(session.learn(task)) < before


def test_where_nothing_satisfies_nothing_is_written(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["negate", "--target", own / "plain", "--control", own / "swapped"]
    arguments += ["--vector", own / "model", "--model", own / "model", "--alphas", "0.5,1"]
    assert run([*map(str, arguments), "-o", str(tmp_path / "out"), "-q"]) == 1
    assert "no alpha improves plain" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_refusals(own: Path) -> None:
    with pytest.raises(
        OptionError, match="control_threshold is 2, and must be a number at least 0"
    ):
        negate("mnist", own / "x", control_threshold=2)
