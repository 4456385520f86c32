"""PAINT: patch a model on tasks without harming others (arXiv 2208.05592)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from weightops.algebra.precision import Precision
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import NothingSatisfiesError, OptionError
from weightops.evaluation.batchnorm import BatchNorm
from weightops.search.goal import Coefficients, Goal, Rule
from weightops.search.session import EditSession, weighted_sum
from weightops.search.strategies import SearchOptions
from weightops.support.arguments import check_arguments
from weightops.support.calls import repeatable
from weightops.support.docstrings import describe_arguments_as
from weightops.support.ranges import Range
from weightops.task_vector import TaskVector
from weightops.tasks.derived import union
from weightops.tasks.table import SUPPORTED, TaskList, as_tasks
from weightops.tasks.task import Task
from weightops.training.config import TrainingConfig
from weightops.workflows.base import Finetuned, OnMeasured, Workflow, even_weights, mean_name
from weightops.workflows.result import EditResult
from weightops.workflows.run import run

Strategy = Literal["joint", "sequential", "parallel"]
"""How several tasks are patched."""


class Patch(Workflow):
    """The workflow of `patch`."""

    remedy = "a larger max_supported_drop=, or finer alphas= near 0"
    verb, word = "patch", "patched"
    method = "The weights are `(1 - alpha) * base + alpha * finetuned` (PAINT, arXiv 2208.05592)"

    def __init__(
        self,
        task: TaskList,
        *,
        supported: TaskList | None,
        rule: Rule,
        max_supported_drop: float,
        strategy: Strategy,
        **shared: Any,
    ) -> None:
        check_arguments(patch, rule=rule, max_supported_drop=max_supported_drop, strategy=strategy)
        self.patching = as_tasks(task)
        others = as_tasks(SUPPORTED if supported is None else supported)
        self.supported = [task for task in others if task not in self.patching]
        if not self.supported:
            raise OptionError("a patch needs at least one supported task, to measure what it harms")
        self.rule, self.max_supported_drop = rule, max_supported_drop
        self.strategy: Strategy = strategy if len(self.patching) > 1 else "joint"
        self.options = {
            "rule": rule,
            "max_supported_drop": max_supported_drop,
            "strategy": self.strategy,
        }
        self._joint = union(self.patching)
        roles = dict.fromkeys(self.patching, "patching") | dict.fromkeys(
            self.supported, "supported"
        )
        super().__init__(roles, **shared)

    @property
    def learned(self) -> list[Task]:
        return [self._joint] if self.strategy == "joint" else self.patching

    @property
    def candidates(self) -> int:
        return super().candidates * (len(self.patching) if self.strategy == "sequential" else 1)

    def goal(self, patching: list[Task], drop: float) -> Goal:
        """Return what alpha is chosen for.

        Args:
            patching: the tasks that have been patched so far.
            drop: the supported accuracy that they may cost together.
        """
        kept, best, name = "supported mean", self.unit.best, self.unit.name
        if self.rule == "mean":
            score = even_weights(patching, 0.5) | even_weights(self.supported, 0.5)
            what = f"{best} mean of patching and supported {name}"
            return Goal(score, what=what, kept=kept, unit=self.unit)
        ratio, drop = self.unit.kept_but(drop)
        return Goal(
            even_weights(patching),
            even_weights(self.supported),
            ratio=ratio,
            drop=drop,
            what=f"{best} patching {name}",
            kept=kept,
            unit=self.unit,
        )

    @property
    def view(self) -> Goal:
        return Goal(
            even_weights(self.patching),
            even_weights(self.supported),
            what=mean_name(self.patching, "patching"),
            kept=mean_name(self.supported, "supported"),
            unit=self.unit,
        )

    def find(self, session: EditSession) -> EditResult:
        if self.strategy == "sequential":
            return self._find_in_sequence(session)
        learned = self.vectors(session)
        vectors = dict(zip([task.name for task in self.learned], learned, strict=True))
        trial = session.trial(vectors, self.goal(self.patching, self.max_supported_drop))
        alpha, why = self.choose(trial)
        if self.strategy == "joint":
            finetuned = [(vector, self.tasks) for vector in learned]
        else:
            finetuned = [(v, [task]) for task, v in zip(self.patching, learned, strict=True)]
        return self._result(vectors, alpha, why, trial.sweep, finetuned)

    def _find_in_sequence(self, session: EditSession) -> EditResult:
        """Patch the patched model again, task after task."""
        vectors: dict[str, TaskVector] = {}
        alphas: Coefficients = ()
        reasons, finetuned, sweep = [], [], []
        for i, task in enumerate(self.patching):
            patched = weighted_sum(vectors, alphas) if vectors else None
            vectors[task.name] = (
                session.vector(self.finetuned[i])
                if self.finetuned
                else session.learn(task, start=patched)
            )
            # Each step may cost its share of the drop, against the model that all began with.
            share = self.max_supported_drop * (i + 1) / len(self.patching)
            trial = session.trial(vectors, self.goal(self.patching[: i + 1], share))
            line = [(*alphas, alpha) for alpha in self.search.alphas]
            choice = self.search_line(trial, line)
            alphas = choice.alpha if isinstance(choice.alpha, tuple) else (choice.alpha,)
            reasons.append(f"{task.name} {alphas[-1]:g}: {choice.why}")
            finetuned.append((weighted_sum(vectors, (*alphas[:-1], 1.0)), [task]))
            sweep = trial.sweep
        if not any(alphas):
            raise NothingSatisfiesError(
                f"no alpha improves {', '.join(vectors)} within the rule, so there is no patch"
            )
        return self._result(vectors, alphas, "; then ".join(reasons), sweep, finetuned)

    def _result(
        self, vectors: Any, alpha: Coefficients, why: str, sweep: Any, finetuned: Any
    ) -> EditResult:
        rivals, more = {"finetuned": finetuned}, {"strategy": self.strategy}
        return EditResult(vectors, alpha, why, sweep, rivals, more)


@repeatable("patch")
@describe_arguments_as(Workflow)
def patch(
    task: TaskList,
    out: str | Path,
    *,
    model: CheckpointLike = "embedded",
    supported: TaskList | None = None,
    rule: Rule = "patching",
    max_supported_drop: Annotated[float, Range(0, 1)] = 0.01,
    strategy: Strategy = "joint",
    finetuned: Finetuned = None,
    search: SearchOptions = SearchOptions(),  # noqa: B008  (it is immutable)
    training: TrainingConfig | None = None,
    batchnorm: BatchNorm | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    resume: bool = False,
    overwrite: bool = False,
    on_measured: OnMeasured | None = None,
) -> dict[str, Any]:
    """Make a model better at one task, or several, and no worse at others (arXiv 2208.05592).

    Fine-tunes on the task under the frozen zero-shot head, tries
    ``theta = (1 - alpha) * theta_0 + alpha * theta_ft`` for one alpha after another on validation
    data of the patching and the supported tasks, chooses one, confirms it once on the test splits,
    and writes the patched model with its results. A task that is its own support under another
    distribution makes this WiSE-FT (arXiv 2109.01903): name the shifted sets as supported tasks.

    Args:
        task: what to patch: a task, a folder of images, or several.
        supported: what must not get worse. Default: all tasks that weightops draws.
        rule: how alpha is chosen. patching: the best patching accuracy that keeps the supported
            mean, with 95 % confidence, within max_supported_drop of the base's; mean: the best mean
            of patching accuracy and supported mean.
        max_supported_drop: for the rule "patching", as a fraction: 0.01 is one point.
        strategy: for several tasks. joint: one fine-tuning on all of them; sequential: patch the
            patched model again; parallel: fine-tune on each, one alpha for each.

    Returns:
        The content of ``summary.json``.

    Raises:
        OutputError: if ``out`` exists or the disk is full.
        NothingSatisfiesError: if no alpha satisfies the rule; then nothing is written.
    """
    workflow = Patch(
        task,
        supported=supported,
        rule=rule,
        max_supported_drop=max_supported_drop,
        strategy=strategy,
        model=model,
        finetuned=finetuned,
        search=search,
        training=training,
        batchnorm=batchnorm,
        device=device,
        precision=precision,
    )
    return run(workflow, out, resume=resume, overwrite=overwrite, on_measured=on_measured)
