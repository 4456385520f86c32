"""Tasks that a program scores: anything that can be measured of a model in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weightops.errors import TaskError
from weightops.tasks.task import SPLITS, Task

SCORE = "score="
"""What the name of such a task begins with, as in ``score=python judge.py:sums``."""


@dataclass(frozen=True, eq=False)
class ScoredTask(Task):
    """A task of a program's: the higher a score, the better.

    Attributes:
        program: the command line, to which a model's folder is added.
    """

    program: str = ""

    def reading(self, *splits: str) -> dict[str, Any]:
        return {"source": self.source}


def scored_task(name: str) -> ScoredTask:
    """Return the task that ``score=PROGRAM:TASK`` names.

    Raises:
        TaskError: if there is no program or no task in it.
    """
    program, _, task = name.removeprefix(SCORE).rpartition(":")
    if not program.strip() or not task:
        raise TaskError(f"{name} doesn't name a program and its task", hint=f"{SCORE}PROGRAM:TASK")

    def refuse(split: str) -> Any:
        raise TaskError(
            f"{task} is scored by a program, and has no samples to learn from",
            hint="fine-tune by other means, and give finetuned=",
        )

    return ScoredTask(
        name=task,
        classes=(),
        templates=(),
        load=refuse,
        sizes=dict.fromkeys(SPLITS, 0),
        source=f"the program {program}",
        license="unknown",
        program=program,
    )
