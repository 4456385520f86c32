"""Task arithmetic: forget a task, add several, or make one from three others (arXiv 2212.04089)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch

from weightops.bench import Bench, Vectors, combined
from weightops.errors import NonfiniteError, OptionError, TaskError, UnknownNameError
from weightops.expression import LinearForm
from weightops.methods.method import MethodSource
from weightops.methods.table import METHODS
from weightops.search import Goal, NothingSatisfiesError
from weightops.task_vector import TaskVector
from weightops.tasks.rendered import seed as seed_of
from weightops.tasks.table import RENDERED, as_tasks
from weightops.tasks.task import Task
from weightops.workflow import Found, OnMeasured, Workflow, even, mean_of

Objective = Literal["mean", "normalized", "worst"]
OBJECTIVES: tuple[Objective, ...] = ("normalized", "mean", "worst")
TaskLike = str | Task


def random_like(bench: Bench, vector: TaskVector, seed: int = 0) -> TaskVector:
    """A random vector with the norm of ``vector`` at every tensor: the baseline of arXiv 2212.04089."""
    norms = vector.norm(per_tensor=True)
    tensors = {}
    for name, spec in vector.specs.items():
        generator = torch.Generator().manual_seed(seed_of("random vector", seed, name) % (1 << 63))
        noise = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        tensors[name] = (noise * (norms.get(name, 0.0) / max(float(noise.norm()), 1e-30))).to(spec.dtype)
    return bench.held(tensors, f"a random vector (seed {seed})")


class Negation(Workflow):
    """Forget a task and keep others; see `negate`."""

    verb, word, sign = "negate", "edited", -1.0
    method = (
        "The weights are `base + alpha * (finetuned - base)` with a negative alpha (task arithmetic, arXiv 2212.04089)"
    )

    def __init__(
        self, target: TaskLike, *, control: Iterable[TaskLike] | None = None, control_threshold: float = 0.95, baselines: bool = False, **options: Any
    ) -> None:  # fmt: skip
        [self.target] = as_tasks(target)
        self.control = [t for t in as_tasks(RENDERED if control is None else control) if t is not self.target]
        if not self.control:
            raise TaskError("a negation needs at least one control task, to tell what else is forgotten")
        if not 0 <= control_threshold <= 1:
            raise OptionError(f"the control threshold is a fraction of the base's accuracy, not {control_threshold}")
        self.threshold, self.baselines = control_threshold, baselines
        super().__init__({self.target: "target", **dict.fromkeys(self.control, "control")}, **options)

    @property
    def learned(self) -> list[Task]:
        return [self.target]

    @property
    def goal(self) -> Goal:
        """The least target accuracy that keeps the control's."""
        return Goal(
            even([self.target], -1.0), even(self.control), ratio=self.threshold, drop=0.0,
            what=f"lowest {self.target.name} accuracy", kept="mean control accuracy",
        )  # fmt: skip

    @property
    def view(self) -> Goal:
        return Goal(
            even([self.target]), even(self.control), what=self.target.name, kept=mean_of(self.control, "control")
        )

    def find(self, bench: Bench) -> Found:
        [vector] = self.vectors(bench)
        trial = bench.trial({self.target.name: vector}, self.goal)
        alpha, why = self.choose(trial)
        found = Found(trial.vectors, alpha, why, trial.sweep, {"finetuned": [(vector, self.tasks)]})
        if self.baselines:
            self._compare(bench, vector, found)
        return found

    def _compare(self, bench: Bench, vector: TaskVector, found: Found) -> None:
        """Add the baselines: a random vector under the same rule, and fine-tuning with the gradient's sign turned."""
        noise = random_like(bench, vector, self.config.seed)
        found.more["baselines"] = {"random": {"alpha": 0.0, "why": "no alpha lowers the target within the rule"}}
        try:
            alpha, why = self.choose(bench.trial({"random": noise}, self.goal))
            found.more["baselines"]["random"] = {"alpha": alpha[0], "why": why}
            noise = noise * alpha[0]
        except NothingSatisfiesError:
            noise = noise * 0.0
        found.rivals["random"] = [(noise, self.tasks)]
        try:
            ascent = bench.learn(self.target, name="ascent", config=replace(self.config, ascend=True))
            found.rivals["ascent"] = [(ascent, self.tasks)]
        except NonfiniteError as error:  # going up has no end
            found.more["baselines"]["ascent"] = {"why": f"diverged: {error}"}


def negate(
    target: TaskLike, out: str | Path, *, resume: bool = False, overwrite: bool = False, on_measured: OnMeasured = lambda _: None, **options: Any
) -> dict[str, Any]:  # fmt: skip
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
    return Negation(target, **options).run(Path(out), resume=resume, overwrite=overwrite, on_measured=on_measured)


class Addition(Workflow):
    """Several tasks in one model; see `add`."""

    verb = "add"

    def __init__(
        self, tasks: Iterable[TaskLike], *, method: str = "sum", each: bool = False, objective: Objective = "normalized", pairs: bool = False,
        subsets: bool = False, method_options: Mapping[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.added = as_tasks(tasks)
        if len(self.added) < 2:
            raise TaskError("an addition needs two tasks at least")
        if objective not in OBJECTIVES:
            raise UnknownNameError(f"there is no objective {objective!r}; known: {', '.join(OBJECTIVES)}")
        self.combiner = METHODS["task_arithmetic" if method == "sum" else method]
        self.method_options = self.combiner.check(method_options or {})
        if each and method != "sum":
            raise OptionError(f"{method} makes one vector of all: it has one alpha, not one for each task")
        self.each, self.objective, self.pairs, self.subsets = each, objective, pairs, subsets
        self.method = (
            f"The weights are `base + alpha * {method}(finetuned - base, ...)` (task arithmetic, arXiv 2212.04089)"
        )
        super().__init__(dict.fromkeys(self.added, "added"), **options)

    @property
    def learned(self) -> list[Task]:
        return self.added

    @property
    def view(self) -> Goal:
        return Goal(even(self.added), what=mean_of(self.added, "added"))

    def combine(self, bench: Bench, vectors: Sequence[TaskVector]) -> TaskVector:
        """One vector of several, by the method."""
        source = MethodSource(
            self.combiner, [v.form for v in vectors], seed=self.config.seed, options=self.method_options
        )
        if self.combiner.fixed:
            return TaskVector._of(source.as_form(), vectors[0].base)
        made = LinearForm.of(source)
        vector = TaskVector._of(made, vectors[0].base)
        return bench.held(dict(vector), source.ref)  # computed once, for all alphas

    def goal(self, tasks: Sequence[Task], experts: Mapping[str, float]) -> Goal:
        """What alpha is chosen for, given the fine-tuned models' validation accuracy."""
        if self.objective == "mean":
            return Goal(even(tasks), what="best mean accuracy")
        scale = {task.name: 1 / max(experts[task.name], 1e-9) for task in tasks}
        if self.objective == "worst":
            return Goal(scale, worst=True, what="best normalized accuracy of the worst task")
        return Goal({name: weight / len(tasks) for name, weight in scale.items()}, what="best mean normalized accuracy")

    def find(self, bench: Bench) -> Found:
        singles = dict(zip(self.added, self.vectors(bench), strict=True))
        own = {task: bench.measure(vector, "validation", [task]) for task, vector in singles.items()}
        experts = {task.name: float(m.scores[task.name]["acc1"]) for task, m in own.items()}
        found = self._search(bench, singles, experts)
        found.rivals = {"finetuned": [(vector, [task]) for task, vector in singles.items()]}
        sizes = range(2, len(self.added)) if self.subsets else (2,) if self.pairs else ()
        groups = [group for size in sizes for group in combinations(self.added, size) if len(group) < len(self.added)]
        found.more["subsets"] = [self._group(bench, {t: singles[t] for t in group}, experts) for group in groups]
        found.more["cosines"] = {
            f"{a.name}, {b.name}": singles[a].cosine(singles[b]) for a, b in combinations(self.added, 2)
        }
        return found

    def _search(self, bench: Bench, singles: Mapping[Task, TaskVector], experts: Mapping[str, float]) -> Found:
        vectors: Vectors
        if self.each:
            vectors = {task.name: vector for task, vector in singles.items()}
        else:
            vectors = {"+".join(t.name for t in singles): self.combine(bench, list(singles.values()))}
        trial = bench.trial(vectors, self.goal(list(singles), experts), list(singles))
        alpha, why = self.choose(trial)
        return Found(vectors, alpha, why, trial.sweep)

    def _group(self, bench: Bench, singles: Mapping[Task, TaskVector], experts: Mapping[str, float]) -> dict[str, Any]:
        """What a subset of the tasks comes to on test data, with a coefficient of its own."""
        found = self._search(bench, singles, experts)
        edited = bench.measure(found.edit, "test", singles)
        alone = {t.name: bench.measure(v, "test", [t]).scores[t.name]["acc1"] for t, v in singles.items()}
        accuracy = {name: float(edited.scores[name]["acc1"]) for name in alone}
        shares = [_share(accuracy[name], alone[name]) for name in alone]
        return {
            "tasks": list(alone),
            "alpha": found.named,
            "accuracy": accuracy,
            "normalized": math.fsum(shares) / len(shares),
        }

    def conclude(self, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        shares = {name: _share(task[self.word]["acc1"], task["finetuned"]["acc1"]) for name, task in tasks.items()}
        return {
            "normalized": shares,
            "mean": {
                "accuracy": math.fsum(task[self.word]["acc1"] for task in tasks.values()) / len(tasks),
                "normalized": math.fsum(shares.values()) / len(shares),
            },
        }

    def remarks(self, summary: Mapping[str, Any]) -> list[str]:
        shares = ", ".join(f"{name} {100 * share:.1f}" for name, share in summary["normalized"].items())
        groups = [
            f"{' + '.join(g['tasks'])}: normalized {100 * g['normalized']:.1f} % with alpha {g['alpha']}"
            for g in summary["subsets"]
        ]
        return [
            f"normalized accuracy {100 * summary['mean']['normalized']:.1f} % ({shares})",
            *(["\n".join(groups)] if groups else []),
        ]


def add(
    tasks: Iterable[TaskLike], out: str | Path, *, resume: bool = False, overwrite: bool = False,
    on_measured: OnMeasured = lambda _: None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    r"""Several tasks in one model: :math:`\theta = \theta_0 + \alpha\sum_i\tau_i` (arXiv 2212.04089), or by any merge method.

    Args:
        tasks: what to add, two at least.
        out: the folder for the edited model and the results; it appears whole.
        resume: go on from where a killed run stopped.
        overwrite: replace ``out``.
        on_measured: called with the validation scores of each candidate.
        options: ``method`` ("sum" or a name in `METHODS`, with ``method_options``), ``each`` (one alpha for each task, by coordinate
            search, instead of a shared one), ``objective`` ("normalized": the mean accuracy relative to each task's fine-tuned
            model's; "mean"; "worst": the lowest normalized accuracy), ``pairs`` and ``subsets`` (do it for every pair or every
            subset, too), and those of `Workflow`.

    Returns:
        The content of ``summary.json``; ``normalized`` is accuracy over the fine-tuned model's, on test data.
    """
    return Addition(tasks, **options).run(Path(out), resume=resume, overwrite=overwrite, on_measured=on_measured)


class Analogy(Workflow):
    """A is to B as C is to D: a model for D without training data of it; see `analogy`."""

    verb = "analogy"
    method = "The weights are `base + alpha_C * C + alpha_B * B - alpha_A * A`, vectors each (task analogies, arXiv 2212.04089)"

    def __init__(
        self, a: TaskLike, b: TaskLike, c: TaskLike, target: TaskLike, *, each: bool = True, supervised: bool = False, **options: Any
    ) -> None:  # fmt: skip
        self.a, self.b, self.c, self.d = [as_tasks(name)[0] for name in (a, b, c, target)]
        if len({self.a.name, self.b.name, self.c.name, self.d.name}) < 4:
            raise TaskError("an analogy needs four different tasks: A is to B as C is to the target")
        self.each, self.supervised = each, supervised
        roles = {self.d: "target", **dict.fromkeys([self.a, self.b, self.c], "given")}
        super().__init__(roles, **options)

    @property
    def learned(self) -> list[Task]:
        return [self.a, self.b, self.c]

    @property
    def view(self) -> Goal:
        return Goal(even([self.d]), what=self.d.name)

    def find(self, bench: Bench) -> Found:
        a, b, c = self.vectors(bench)
        names = {f"{self.c.name}": c, f"{self.b.name}": b, f"minus {self.a.name}": -a}
        vectors: Vectors = names if self.each else {"analogy": combined(names, (1.0, 1.0, 1.0))}
        trial = bench.trial(vectors, Goal(even([self.d]), what=f"best {self.d.name} accuracy"), [self.d])
        alpha, why = self.choose(trial)
        found = Found(vectors, alpha, why, trial.sweep, {})
        for name, vector in (("A", a), ("B", b), ("C", c)):
            found.rivals[f"only {name}"] = [(vector, [self.d])]
        if self.supervised:
            found.rivals["finetuned"] = [(bench.learn(self.d, name="supervised"), [self.d])]
        return found


def analogy(
    a: TaskLike, b: TaskLike, c: TaskLike, target: TaskLike, out: str | Path, *, resume: bool = False, overwrite: bool = False,
    on_measured: OnMeasured = lambda _: None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    r"""A model for a task without training data, by analogy: :math:`\tau_D = \tau_C + \tau_B - \tau_A` (arXiv 2212.04089).

    Args:
        a: A, which is to B ...
        b: B ...
        c: as C is ...
        target: to this. Its training images are not used; its validation images choose the coefficients.
        out: the folder for the edited model and the results; it appears whole.
        resume: go on from where a killed run stopped.
        overwrite: replace ``out``.
        on_measured: called with the validation scores of each candidate.
        options: ``each`` (default True: an alpha for each vector, by coordinate search; False: a shared one), ``supervised`` (compare
            with fine-tuning on the target), and those of `Workflow`.

    Returns:
        The content of ``summary.json``.
    """
    workflow = Analogy(a, b, c, target, **options)
    return workflow.run(Path(out), resume=resume, overwrite=overwrite, on_measured=on_measured)


def _share(accuracy: float, reference: float) -> float:
    """An accuracy as a share of another; NaN of one that is 0."""
    return accuracy / reference if reference else math.nan
