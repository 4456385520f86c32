"""Task arithmetic: forget a task, add several, or make one from three others (arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from weightops.errors import NonfiniteError, NothingSatisfiesError, OptionError, TaskError
from weightops.search.goal import Goal
from weightops.search.session import EditSession
from weightops.task_vector import TaskVector
from weightops.tasks.seeds import seed as seed_of
from weightops.tasks.table import SUPPORTED, as_tasks
from weightops.tasks.task import Task
from weightops.workflows.base import EditResult, OnMeasured, Workflow, even, mean_of

TaskLike = str | Task


def random_like(bench: EditSession, vector: TaskVector, seed: int = 0) -> TaskVector:
    """A random vector with the norm of ``vector`` at every tensor: the baseline of arXiv 2212.04089."""
    norms = vector.norm(per_tensor=True)
    tensors = {}
    for name, spec in vector.specs.items():
        generator = torch.Generator().manual_seed(seed_of("random vector", seed, name) % (1 << 63))
        noise = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        tensors[name] = (noise * (norms.get(name, 0.0) / max(float(noise.norm()), 1e-30))).to(
            spec.dtype
        )
    return bench.held(tensors, f"a random vector (seed {seed})")


class Negation(Workflow):
    """Forget a task and keep others; see `negate`."""

    verb, word, sign = "negate", "edited", -1.0
    method = "The weights are `base + alpha * (finetuned - base)` with a negative alpha (task arithmetic, arXiv 2212.04089)"

    def __init__(
        self,
        target: TaskLike,
        *,
        control: Iterable[TaskLike] | None = None,
        control_threshold: float = 0.95,
        baselines: bool = False,
        **options: Any,
    ) -> None:
        [self.target] = as_tasks(target)
        self.control = [
            t for t in as_tasks(SUPPORTED if control is None else control) if t is not self.target
        ]
        if not self.control:
            raise TaskError(
                "a negation needs at least one control task, to tell what else is forgotten"
            )
        if not 0 <= control_threshold <= 1:
            raise OptionError(
                f"the control threshold is a fraction of the base's accuracy, not {control_threshold}"
            )
        self.threshold, self.baselines = control_threshold, baselines
        super().__init__(
            {self.target: "target", **dict.fromkeys(self.control, "control")}, **options
        )

    @property
    def learned(self) -> list[Task]:
        return [self.target]

    @property
    def goal(self) -> Goal:
        """The least target accuracy that keeps the control's."""
        return Goal(
            even([self.target], -1.0),
            even(self.control),
            ratio=self.threshold,
            drop=0.0,
            what=f"lowest {self.target.name} accuracy",
            kept="mean control accuracy",
        )

    @property
    def view(self) -> Goal:
        return Goal(
            even([self.target]),
            even(self.control),
            what=self.target.name,
            kept=mean_of(self.control, "control"),
        )

    def find(self, bench: EditSession) -> EditResult:
        [vector] = self.vectors(bench)
        trial = bench.trial({self.target.name: vector}, self.goal)
        alpha, why = self.choose(trial)
        found = EditResult(
            trial.vectors, alpha, why, trial.sweep, {"finetuned": [(vector, self.tasks)]}
        )
        if self.baselines:
            self._compare(bench, vector, found)
        return found

    def _compare(self, bench: EditSession, vector: TaskVector, found: EditResult) -> None:
        """Add the baselines: a random vector under the same rule, and fine-tuning with the gradient's sign turned."""
        noise = random_like(bench, vector, self.config.seed)
        found.more["baselines"] = {
            "random": {"alpha": 0.0, "why": "no alpha lowers the target within the rule"}
        }
        try:
            alpha, why = self.choose(bench.trial({"random": noise}, self.goal))
            found.more["baselines"]["random"] = {"alpha": alpha[0], "why": why}
            noise = noise * alpha[0]
        except NothingSatisfiesError:
            noise = noise * 0.0
        found.rivals["random"] = [(noise, self.tasks)]
        try:
            ascent = bench.learn(
                self.target, name="ascent", config=replace(self.config, ascend=True)
            )
            found.rivals["ascent"] = [(ascent, self.tasks)]
        except NonfiniteError as error:  # going up has no end
            found.more["baselines"]["ascent"] = {"why": f"diverged: {error}"}


def negate(
    target: TaskLike,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_measured: OnMeasured = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    r"""Make a model forget a task: :math:`\theta = \theta_0 - \alpha\tau` (arXiv 2212.04089).

    Alpha has the least validation accuracy on the target among those whose mean control accuracy is, with 95 % confidence, at least
    ``control_threshold`` of the base's; ties go to the smaller alpha. The test splits are used once, after that.

    Args:
        target: what to forget.
        out: the folder for the edited model and the results; it appears whole.
        resume: go on from where a killed run stopped.
        overwrite: replace ``out``.
        on_measured: called with the validation scores at each alpha.
        options: ``control`` tasks (default all rendered ones), ``control_threshold`` (default 0.95), ``baselines`` (a random vector of
            the same norm at every tensor, and gradient ascent), and those of `Workflow`.

    Returns:
        The content of ``summary.json``.

    Raises:
        NothingSatisfiesError: if no alpha satisfies the constraint; then nothing is written.
    """
    return Negation(target, **options).run(
        Path(out), resume=resume, overwrite=overwrite, on_measured=on_measured
    )
