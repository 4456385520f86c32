"""A person's own tasks, model and vectors, small."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.drawn_folders import SHORT, draw

from weightops import SearchOptions, config_for, open_checkpoint
from weightops.search.session import EditSession
from weightops.support.progress import Job
from weightops.tasks.table import find_task


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks in folders, a model directory, and two vectors.

    Two of the tasks are named wrongly, so that there is something to learn.
    """
    root = tmp_path_factory.mktemp("own")
    draw(root / "swapped", {"moon": "arrow", "arrow": "moon"}, 40, 0)
    draw(root / "turned", {"heart": "ring", "ring": "heart"}, 40, 1)
    draw(root / "plain", {"star": "star", "cross": "cross", "square": "square"}, 30, 2)
    model = open_checkpoint("embedded").save(root / "model")
    for name in ("swapped", "turned"):
        task = find_task(str(root / name))
        session = EditSession(model, [task], config=config_for(model, **SHORT))
        session.learn(task).save(root / f"{name}.safetensors")
    return root


@pytest.fixture
def options(own: Path) -> dict[str, object]:
    """Arguments of a workflow on the own model, with two alphas."""
    return {"model": own / "model", "device": "cpu", "search": SearchOptions((0.5, 1.0))}


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """What the bars of whole jobs have counted: the work done, and the work planned at first."""
    monkeypatch.setenv("TQDM_DISABLE", "0")
    ended: list[tuple[float, float]] = []
    plans: list[float] = []
    plan, close = Job._plan, Job.close

    def planned(job: Job, total: float) -> None:
        plans.append(total)
        plan(job, total)

    def closed(job: Job) -> None:
        ended.append((job._bar.n, plans.pop(0)))
        plans.clear()
        close(job)

    monkeypatch.setattr(Job, "_plan", planned)
    monkeypatch.setattr(Job, "close", closed)
    return ended
