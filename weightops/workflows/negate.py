"""Negation: make a model forget a task and keep others (arXiv 2212.04089)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from weightops.algebra.precision import Precision
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import NonfiniteError, NothingSatisfiesError, OptionError
from weightops.evaluation.batchnorm import BatchNorm
from weightops.evaluation.units import SCORE
from weightops.search.goal import Goal
from weightops.search.session import EditSession
from weightops.search.strategies import SearchOptions
from weightops.support.arguments import check_arguments
from weightops.support.calls import repeatable
from weightops.support.docstrings import describe_arguments_as
from weightops.support.lazy import torch
from weightops.support.ranges import Range
from weightops.task_vector import TaskVector
from weightops.tasks.seeds import seed as seed_of
from weightops.tasks.table import SUPPORTED, TaskLike, TaskList, as_task, as_tasks
from weightops.tasks.task import Task
from weightops.tasks.texts import TextTask
from weightops.training.config import TrainingConfig
from weightops.workflows.base import Finetuned, OnMeasured, Workflow, even_weights, mean_name
from weightops.workflows.result import EditResult
from weightops.workflows.run import run

THRESHOLD, TEXT_THRESHOLD = 0.95, 0.98
"""The share of the control score to keep by default: of accuracy, and of perplexity."""


class Negation(Workflow):
    """The workflow of `negate`."""

    remedy = "a lower control_threshold=, or finer alphas= near 0"
    verb, sign = "negate", -1.0
    method = (
        "The weights are `base + alpha * (finetuned - base)` with a negative alpha "
        "(task arithmetic, arXiv 2212.04089)"
    )

    def __init__(
        self,
        target: TaskLike,
        *,
        control: TaskList | None,
        control_threshold: float | None,
        baselines: bool,
        **shared: Any,
    ) -> None:
        check_arguments(negate, control_threshold=control_threshold)
        self.target = as_task(target)
        others = as_tasks(SUPPORTED if control is None else control)
        self.control = [task for task in others if task is not self.target]
        if not self.control:
            raise OptionError("a negation needs at least one control task, to see what it harms")
        self.baselines = baselines
        is_text = isinstance(self.target, TextTask)
        default = TEXT_THRESHOLD if is_text else THRESHOLD
        self.threshold = default if control_threshold is None else control_threshold
        self.options = {"control_threshold": self.threshold}
        super().__init__(
            {self.target: "target", **dict.fromkeys(self.control, "control")}, **shared
        )

    @property
    def learned(self) -> list[Task]:
        return [self.target]

    @property
    def to_train(self) -> list[Task]:
        ascends = self.baselines and self.unit is not SCORE
        return [*super().to_train, *([self.target] if ascends else [])]

    @property
    def candidates(self) -> int:
        return super().candidates * (1 + self.baselines)  # a random vector has an alpha, too

    @property
    def goal(self) -> Goal:
        """The goal: the worst target score that keeps the control score."""
        ratio, drop = self.unit.kept_share(self.threshold)
        return Goal(
            even_weights([self.target], -1.0),
            even_weights(self.control),
            ratio=ratio,
            drop=drop,
            what=f"{self.unit.least} {self.target.name} {self.unit.name}",
            kept=f"mean control {self.unit.name}",
            unit=self.unit,
        )

    @property
    def view(self) -> Goal:
        return Goal(
            even_weights([self.target]),
            even_weights(self.control),
            what=self.target.name,
            kept=mean_name(self.control, "control"),
            unit=self.unit,
        )

    def find(self, session: EditSession) -> EditResult:
        vector = self.vectors(session)[0]
        trial = session.trial({self.target.name: vector}, self.goal)
        alpha, why = self.choose(trial)
        rivals = {"finetuned": [(vector, self.tasks)]}
        result = EditResult(trial.vectors, alpha, why, trial.sweep, rivals)
        if self.baselines:
            result.more["baselines"] = {
                "random": self._add_random_vector(session, vector, result),
                **self._add_gradient_ascent(session, result),
            }
        return result

    def _add_random_vector(
        self, session: EditSession, vector: TaskVector, result: EditResult
    ) -> dict[str, Any]:
        """Add a random vector as a rival, with an alpha by the same rule; return that choice."""
        noise = random_like(session, vector, self.config.seed)
        try:
            alpha, why = self.choose(session.trial({"random": noise}, self.goal))
        except NothingSatisfiesError:
            alpha, why = (0.0,), "no alpha lowers the target within the rule"
        result.rivals["random"] = [(noise * alpha[0], self.tasks)]
        return {"alpha": alpha[0], "why": why}

    def _add_gradient_ascent(self, session: EditSession, result: EditResult) -> dict[str, Any]:
        """Add fine-tuning that raises the loss as a rival; return why not, if it diverged."""
        if self.unit is SCORE:
            return {"ascent": {"why": "the score of a program has no gradient"}}
        raised = replace(self.config, ascend=True)
        try:
            ascent = session.learn(self.target, name="ascent", config=raised)
        except NonfiniteError as error:  # a loss that is raised has no bound
            return {"ascent": {"why": f"diverged: {error.fact}"}}
        result.rivals["ascent"] = [(ascent, self.tasks)]
        return {}


def random_like(session: EditSession, vector: TaskVector, seed: int = 0) -> TaskVector:
    """Return a random vector with the norm of ``vector`` at every tensor.

    This is a baseline of arXiv 2212.04089.
    """
    norms = vector.norm(per_tensor=True)
    tensors = {}
    for name, spec in vector.specs.items():
        drawn_from = seed_of("random vector", seed, name) % (1 << 63)
        generator = torch.Generator().manual_seed(drawn_from)
        noise = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        scale = norms.get(name, 0.0) / max(float(noise.norm()), 1e-30)
        tensors[name] = (noise * scale).to(spec.dtype)
    return session.in_memory(tensors, f"a random vector (seed {seed})")


@repeatable("negate")
@describe_arguments_as(Workflow)
def negate(
    target: TaskLike,
    out: str | Path,
    *,
    model: CheckpointLike = "embedded",
    control: TaskList | None = None,
    control_threshold: Annotated[float, Range(0, 1)] | None = None,
    baselines: bool = False,
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
    """Make a model forget a task and keep others (task arithmetic, arXiv 2212.04089).

    Fine-tunes on the task, subtracts alpha times the task vector,
    ``theta = theta_0 - alpha * tau``, for one alpha after another, and takes the alpha with the
    lowest target accuracy on validation data that keeps, with 95 % confidence, the mean control
    accuracy; of equal ones the smaller. The test splits are used once, after that.

    Of texts, a language model gets the highest perplexity on the target that leaves the control's
    (the geometric mean of several) nearly as it is.

    Args:
        target: the task, or the text of a language model, to forget.
        control: what must be kept. Default: all tasks that weightops draws; a text needs others.
        control_threshold: the share of the base's mean control accuracy to keep; 0.98 lets a
            perplexity rise by 2 %. Default: 0.95 for accuracy, 0.98 for perplexity.
        baselines: compare with a random vector of equal norms and with gradient ascent.

    Returns:
        The content of ``summary.json``.

    Raises:
        NothingSatisfiesError: if no alpha satisfies the constraint; then nothing is written.
    """
    workflow = Negation(
        target,
        control=control,
        control_threshold=control_threshold,
        baselines=baselines,
        model=model,
        finetuned=finetuned,
        search=search,
        training=training,
        batchnorm=batchnorm,
        device=device,
        precision=precision,
    )
    return run(workflow, out, resume=resume, overwrite=overwrite, on_measured=on_measured)
