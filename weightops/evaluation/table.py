"""The ways of scoring a model on a task that can be named. To add one, write its function and name it here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import OptionError
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.linear_probe import linear_probe
from weightops.evaluation.retrieval import retrieval
from weightops.evaluation.shift import under_shift
from weightops.evaluation.zero_shot import zero_shot
from weightops.support.registry import Registry
from weightops.tasks.table import as_tasks
from weightops.tasks.task import Task


@dataclass(frozen=True)
class Evaluator:
    """One way of scoring a model on a task.

    Attributes:
        function: called with a `ImageModel`, a `Task` and a split's name, and with those of ``batch_size`` and ``details`` that it has parameters
            for, it gives metrics by name, among them ``n``, how many images there were.
        kind: what CLIP_benchmark calls it in its files.
        columns: which of the metrics a table shows.
    """

    function: Callable[..., dict[str, Any]]
    kind: str
    columns: tuple[str, ...]

    def score(
        self,
        clip: ImageModel,
        task: Task,
        split: str,
        *,
        batch_size: int = 256,
        details: bool = False,
    ) -> dict[str, Any]:
        """The metrics of one task.

        Raises:
            OptionError: if there are details asked for, and none to be had.
        """
        taken = inspect.signature(self.function).parameters
        if details and "details" not in taken:
            raise OptionError(f"{self.kind} has no details to tell")
        given = {"batch_size": batch_size, "details": details}
        return self.function(
            clip, task, split, **{name: value for name, value in given.items() if name in taken}
        )


EVALUATORS: Registry[Evaluator] = Registry(
    "evaluator",
    "evaluators",
    {
        "zero_shot": Evaluator(
            zero_shot, "zeroshot_classification", ("acc1", "acc5", "mean_per_class_recall")
        ),
        "shift": Evaluator(under_shift, "zeroshot_classification", ("acc1", "acc1_under_shift")),
        "linear_probe": Evaluator(
            linear_probe, "linear_probe", ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall")
        ),
        "retrieval": Evaluator(
            retrieval,
            "zeroshot_retrieval",
            ("image_retrieval_recall@5", "text_retrieval_recall@5", "texts"),
        ),
    },
)


def evaluate(
    model: CheckpointLike | ImageModel,
    tasks: str | Task | Iterable[str | Task],
    *,
    evaluator: str = "zero_shot",
    split: str = "test",
    details: bool = False,
    batch_size: int = 256,
    device: str = "auto",
) -> dict[str, dict[str, Any]]:
    """Score a model on tasks.

    Args:
        model: anything with a known architecture (see `open_checkpoint`), or a `ImageModel`, which keeps pixels between calls.
        tasks: names or `Task`s.
        evaluator: a name in `EVALUATORS`.
        split: "test", "validation" or "train".
        details: where the evaluator has any, such as ``per_class_recall`` and ``confusion``.
        batch_size: images at a time.
        device: "auto", "cpu", "cuda", ...

    Returns:
        task -> metrics: zero-shot ``acc1``, ``acc5`` (NaN under five classes), ``mean_per_class_recall``, each in [0, 1], and ``n``.

    Raises:
        UnknownNameError: for a task or an evaluator that isn't known.
        TaskError: if the images of a task can't be had.

    >>> from weightops import evaluate
    >>> scores = evaluate("embedded", "shapes", split="validation")["shapes"]
    >>> scores["acc1"] > 0.9
    True
    """
    chosen = EVALUATORS[evaluator]
    clip = ImageModel.open(model, device)
    return {
        task.name: chosen.score(clip, task, split, details=details, batch_size=batch_size)
        for task in as_tasks(tasks)
    }
