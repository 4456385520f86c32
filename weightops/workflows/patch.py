"""PAINT: patch a model on tasks without harming others (arXiv 2208.05592)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from weightops.errors import NothingSatisfiesError, TaskError, UnknownNameError
from weightops.search.goal import RULES, Coefficients, Goal, Rule
from weightops.search.session import EditSession, combined
from weightops.search.strategies import grid
from weightops.task_vector import TaskVector
from weightops.tasks.derived import union
from weightops.tasks.table import SUPPORTED, as_tasks
from weightops.tasks.task import Task
from weightops.workflows.base import EditResult, OnMeasured, Workflow, even, mean_of

Strategy = Literal["joint", "sequential", "parallel"]
STRATEGIES: tuple[Strategy, ...] = ("joint", "sequential", "parallel")


class Patch(Workflow):
    """One patching run: fine-tune, sweep alpha on validation data, choose, confirm on test data once, write; see `patch`."""

    verb, word = "patch", "patched"
    method = "The weights are `(1 - alpha) * base + alpha * finetuned` (PAINT, arXiv 2208.05592)"

    def __init__(
        self,
        task: str | Task | Iterable[str | Task],
        *,
        supported: Iterable[str | Task] | None = None,
        rule: Rule = "patching",
        max_supported_drop: float = 0.01,
        strategy: Strategy = "joint",
        **options: Any,
    ) -> None:
        self.patching = as_tasks(task)
        self.supported = [
            t
            for t in as_tasks(SUPPORTED if supported is None else supported)
            if t not in self.patching
        ]
        if not self.supported:
            raise TaskError("a patch needs at least one supported task, to tell what it harms")
        for kind, value, known in (("rule", rule, RULES), ("strategy", strategy, STRATEGIES)):
            if value not in known:
                raise UnknownNameError(f"there is no {kind} {value!r}; known: {', '.join(known)}")
        self.rule, self.max_supported_drop = rule, max_supported_drop
        self.strategy: Strategy = strategy if len(self.patching) > 1 else "joint"
        self._joint = union(self.patching)
        super().__init__(
            {
                **dict.fromkeys(self.patching, "patching"),
                **dict.fromkeys(self.supported, "supported"),
            },
            **options,
        )

    @property
    def learned(self) -> list[Task]:
        return [self._joint] if self.strategy == "joint" else self.patching

    def goal(self, patching: list[Task], drop: float) -> Goal:
        """What alpha is chosen for, where ``patching`` are the tasks patched so far."""
        kept = "supported mean"
        if self.rule == "mean":
            score = {**even(patching, 0.5), **even(self.supported, 0.5)}
            return Goal(score, what="best mean of patching and supported accuracy", kept=kept)
        return Goal(
            even(patching),
            even(self.supported),
            drop=drop,
            what="best patching accuracy",
            kept=kept,
        )

    @property
    def view(self) -> Goal:
        kept = mean_of(self.supported, "supported")
        return Goal(
            even(self.patching),
            even(self.supported),
            what=mean_of(self.patching, "patching"),
            kept=kept,
        )

    def find(self, bench: EditSession) -> EditResult:
        if self.strategy == "sequential":
            return self._one_after_another(bench)
        vectors = dict(zip([t.name for t in self.learned], self.vectors(bench), strict=True))
        trial = bench.trial(vectors, self.goal(self.patching, self.max_supported_drop))
        alpha, why = self.choose(trial)
        if self.strategy == "joint":
            rivals = [(vector, self.tasks) for vector in vectors.values()]
        else:
            rivals = [
                (vector, [task])
                for task, vector in zip(self.patching, vectors.values(), strict=True)
            ]
        return EditResult(
            vectors, alpha, why, trial.sweep, {"finetuned": rivals}, {"strategy": self.strategy}
        )

    def _one_after_another(self, bench: EditSession) -> EditResult:
        """Patch the patched model, task after task."""
        vectors: dict[str, TaskVector] = {}
        alphas: Coefficients = ()
        reasons, rivals, sweep = [], [], []
        for i, task in enumerate(self.patching):
            sofar = combined(vectors, alphas) if vectors else None
            vectors[task.name] = (
                bench.vector(self.finetuned[i])
                if self.finetuned
                else bench.learn(task, start=sofar)
            )
            done = i + 1
            # Each step may cost its share of what all may, against the model that it all began with.
            goal = self.goal(
                self.patching[:done], self.max_supported_drop * done / len(self.patching)
            )
            trial = bench.trial(vectors, goal)
            choice = grid(trial.sheet, [(*alphas, alpha) for alpha in self.alphas])
            alphas = choice.alpha if isinstance(choice.alpha, tuple) else (choice.alpha,)
            reasons.append(f"{task.name} {alphas[-1]:g}: {choice.why}")
            rivals.append((combined(vectors, (*alphas[:-1], 1.0)), [task]))
            sweep = trial.sweep
        if not any(alphas):
            raise NothingSatisfiesError(
                f"no alpha improves {', '.join(vectors)} within the rule, so there is no patch"
            )
        return EditResult(
            vectors,
            alphas,
            "; then ".join(reasons),
            sweep,
            {"finetuned": rivals},
            {"strategy": self.strategy},
        )


def patch(
    task: str | Task | Iterable[str | Task],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_sweep: OnMeasured = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    r"""Patch a model on one task, or several, without harming others (PAINT, arXiv 2208.05592).

    Fine-tune under the frozen zero-shot head, then :math:`\theta = (1 - \alpha)\theta_0 + \alpha\theta_{ft}` with alpha chosen on
    validation data of the patching and the supported tasks; the test splits are used once, after that. A task that is its own
    support under another distribution makes this WiSE-FT (arXiv 2109.01903): name the shifted sets as supported tasks.

    Args:
        task: what to patch: names, folders of images, or `Task`s.
        out: the folder for the patched model, ``results.jsonl``, ``summary.json``, ``report.html`` and pictures; it appears whole.
        resume: go on from where a killed run stopped.
        overwrite: replace ``out``.
        on_sweep: called with the validation scores at each alpha.
        options: ``strategy`` for several tasks: "joint" (one fine-tuning on all of them), "sequential" (patch the patched model again, in the
            order given) or "parallel" (fine-tune on each, search one alpha for each); ``supported`` tasks (default all rendered
            ones), ``rule`` ("patching" or "mean", see `choose`), ``max_supported_drop``, and those of `Workflow`: ``model``
            (default the embedded one), ``finetuned``, ``alphas``, ``search``, ``device``, and any field of `TrainingConfig`,
            such as ``steps`` or ``seed``.

    Returns:
        The content of ``summary.json``.

    Raises:
        OutputError: if ``out`` exists or the disk is full.
        NothingSatisfiesError: if no alpha satisfies the constraint; then nothing is written.
    """
    return Patch(task, **options).run(
        Path(out), resume=resume, overwrite=overwrite, on_measured=on_sweep
    )
