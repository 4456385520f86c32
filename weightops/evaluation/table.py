"""The evaluators that have a name: built-in ones, those registered in a session, plug-ins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Annotated, Any, TypeVar, overload

from weightops.algebra.precision import Precision
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import OptionError
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.linear_probe import linear_probe
from weightops.evaluation.retrieval import retrieval
from weightops.evaluation.shift import under_shift
from weightops.evaluation.zero_shot import zero_shot
from weightops.support.arguments import check_arguments
from weightops.support.progress import job
from weightops.support.ranges import Range
from weightops.support.registry import Registry
from weightops.tasks.check import without_unreadable
from weightops.tasks.class_names import in_order
from weightops.tasks.corrupted import CORRUPTIONS, SEVERITIES
from weightops.tasks.table import TaskList, as_tasks
from weightops.tasks.task import Split, Task
from weightops.tasks.texts import refuse_texts

F = TypeVar("F", bound=Callable[..., dict[str, Any]])


@dataclass(frozen=True)
class Evaluator:
    """A way of scoring a model on a task.

    Attributes:
        function: takes an `ImageModel`, a `Task` and a split's name, and the keyword arguments
            ``batch_size`` and ``details`` if it has such parameters. It returns metrics by name,
            such as ``{"acc1": 0.5, "n": 1000}``, where ``n`` is the number of images.
        kind: CLIP_benchmark's name of such a task, in files of results.
        columns: the metrics that a table shows; by default all that are numbers.
        work: returns how many images of a task it looks at, for a split, which the time left is
            told by.
    """

    function: Callable[..., dict[str, Any]]
    kind: str
    columns: tuple[str, ...] = ()
    work: Callable[[Task, str], int] = lambda task, split: task.sizes[split]

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"Evaluator({name}: {', '.join(self.columns) or 'all its metrics'})"

    def score(
        self,
        model: ImageModel,
        task: Task,
        split: str,
        *,
        batch_size: int = 256,
        details: bool = False,
    ) -> dict[str, Any]:
        """Return the metrics of a model on one task.

        Raises:
            OptionError: if details are requested from a function that gives none, or the function
                doesn't return metrics by name.
        """
        parameters = inspect.signature(self.function).parameters
        if details and "details" not in parameters:
            raise OptionError(f"{self.kind} has no details", hint="leave details=True out")
        options = {"batch_size": batch_size, "details": details}
        accepted = {name: value for name, value in options.items() if name in parameters}
        scores = self.function(model, task, split, **accepted)
        if not isinstance(scores, Mapping):
            raise OptionError(
                f"the evaluator {self.kind} returned {type(scores).__name__}, not metrics by name",
                hint="return a dict such as {'acc1': 0.5}",
            )
        return scores if "n" in scores else {**scores, "n": len(task.load(split))}

    def columns_of(self, scores: Mapping[str, Any]) -> list[str]:
        """Return the names of the metrics that a table shows, given those of a task."""
        numbers = (name for name, value in scores.items() if isinstance(value, (int, float)))
        return list(self.columns) or [name for name in numbers if name != "n"]


EvaluatorLike = str | Evaluator | Callable[..., dict[str, Any]]
"""An evaluator, the name of one, or a function of a model, a task and a split's name."""

_DECORATED: dict[Callable[..., Any], Evaluator] = {}


def as_evaluator(evaluator: EvaluatorLike) -> Evaluator:
    """Return an evaluator.

    Args:
        evaluator: a name in `EVALUATORS`, an `Evaluator`, or a function (see `Evaluator`).

    Raises:
        UnknownNameError: if no evaluator has that name.
    """
    if isinstance(evaluator, Evaluator):
        return evaluator
    if isinstance(evaluator, str):
        return EVALUATORS[evaluator]
    name = getattr(evaluator, "__name__", type(evaluator).__name__)
    return _DECORATED.get(evaluator) or Evaluator(evaluator, name)


def _plugin_evaluator(name: str, thing: Any) -> Evaluator:
    """Return the evaluator that an entry point names."""
    if isinstance(thing, str) or not (isinstance(thing, Evaluator) or callable(thing)):
        raise TypeError(f"an Evaluator or a function is needed, not {type(thing).__name__}")
    return as_evaluator(thing)


EVALUATORS: Registry[Evaluator] = Registry(
    "evaluator",
    "evaluators",
    {
        "zero_shot": Evaluator(
            zero_shot, "zeroshot_classification", ("acc1", "acc5", "mean_per_class_recall")
        ),
        "shift": Evaluator(
            under_shift,
            "zeroshot_classification",
            ("acc1", "acc1_under_shift"),
            lambda task, split: (2 + len(CORRUPTIONS) * len(SEVERITIES)) * task.sizes[split],
        ),
        "linear_probe": Evaluator(
            linear_probe,
            "linear_probe",
            ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall"),
            lambda task, split: task.sizes["train"] + task.sizes[split],
        ),
        "retrieval": Evaluator(
            retrieval,
            "zeroshot_retrieval",
            ("image_retrieval_recall@5", "text_retrieval_recall@5", "texts"),
        ),
    },
    adapt=_plugin_evaluator,
)


@overload
def evaluator(function: F) -> F: ...
@overload
def evaluator(*, columns: Sequence[str] = (), kind: str = "") -> Callable[[F], F]: ...
def evaluator(
    function: F | None = None, *, columns: Sequence[str] = (), kind: str = ""
) -> F | Callable[[F], F]:
    """Register a function as an evaluator for this session, under the function's name.

    Use it as ``@evaluator`` or as ``@evaluator(columns=("f1",))``. An installed package provides
    evaluators by entry points in the group ``weightops.evaluators``.

    Args:
        function: takes a model, a task and a split's name, and returns metrics (see `Evaluator`).
        columns: the metrics that a table shows; by default all that are numbers.
        kind: CLIP_benchmark's name of such a task; by default the function's name.

    Returns:
        The function, unchanged.

    Raises:
        OptionError: if another evaluator has the name.
    """

    def register(function: F) -> F:
        name = function.__name__
        evaluator = Evaluator(function, kind or name, tuple(columns))
        _DECORATED[function] = evaluator
        target = f"{function.__module__}:{function.__qualname__}"
        own_points = entry_points(group=EVALUATORS.group, name=name)
        if target not in {point.value for point in own_points}:  # else the registry loads it
            EVALUATORS.register(name, evaluator)
        return function

    return register if function is None else register(function)


def evaluate(
    model: CheckpointLike | ImageModel,
    tasks: TaskList,
    *,
    evaluator: EvaluatorLike = "zero_shot",
    split: Split = "test",
    details: bool = False,
    batch_size: Annotated[int, Range(min=1)] = 256,
    device: str = "auto",
    precision: Precision = "auto",
    class_order: str | None = None,
    skip_unreadable: bool = False,
) -> dict[str, dict[str, Any]]:
    """Score a model on tasks.

    Args:
        model: anything with a known architecture (see `open_checkpoint`), or an `ImageModel`, which
            keeps preprocessed images between calls.
        tasks: a task or several, by name or as `Task`s.
        evaluator: a name in `EVALUATORS`, an `Evaluator`, or a function that scores a model.
        split: "test", "validation" or "train".
        details: add details where the evaluator has some, such as ``per_class_recall`` and
            ``confusion``.
        batch_size: images at a time.
        device: "auto", "cpu", "cuda", ...
        precision: what the model is run in: float32, bfloat16, or auto: bfloat16 where the
            processor computes in it, else float32.
        class_order: the order of a classifier's outputs: task, alphabetical (as torchvision sorts
            folders), natural (as timm does) or a file of names, one a line. Default: by the names
            that the model records, else the task's order.
        skip_unreadable: leave out pictures that can't be read, with a warning; records count them.

    Returns:
        Task -> metrics. Those of ``zero_shot`` are ``acc1``, ``acc5`` (NaN under five classes) and
        ``mean_per_class_recall``, each in [0, 1], and ``n``, the number of images.

    Raises:
        UnknownNameError: if a task or the evaluator is unknown.
        TaskError: if the images of a task aren't available.

    >>> from weightops import evaluate
    >>> scores = evaluate("embedded", "shapes", split="validation")["shapes"]
    >>> scores["acc1"] > 0.9
    True
    """
    check_arguments(evaluate, split=split, batch_size=batch_size)
    chosen = as_evaluator(evaluator)
    listed = as_tasks(tasks)
    refuse_texts(listed, "evaluators score images", "perplexity() scores language models")
    image_model = ImageModel.open(model, device, precision=precision)
    if skip_unreadable:
        listed = [without_unreadable(task) for task in listed]
    if class_order is not None:
        listed = [in_order(task, class_order) for task in listed]
    scores = {}
    with evaluating(chosen, listed, split) as done:
        for task in listed:
            scores[task.name] = chosen.score(
                image_model, task, split, details=details, batch_size=batch_size
            )
            done(task)
    return scores


@contextmanager
def evaluating(
    evaluator: Evaluator, tasks: Sequence[Task], split: str, models: int = 1
) -> Iterator[Callable[[Task], None]]:
    """Show one bar while models are scored; yields what to call after each task of a model."""
    work = {task.name: evaluator.work(task, split) for task in tasks}
    left = models * sum(work.values())

    def done(task: Task) -> None:
        nonlocal left
        left -= work[task.name]
        whole.left(left)

    with job("evaluating", left) as whole:
        yield done
