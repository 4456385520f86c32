"""What all workflows share: make vectors, choose coefficients on validation data, confirm once on test data, write it all."""

from __future__ import annotations

import json
import logging
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from weightops.algebra.names import finite
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import (
    MissingExtraError,
    OptionError,
    OutputError,
    TaskError,
    UnknownNameError,
)
from weightops.evaluation.zero_shot import record
from weightops.reports.card import card
from weightops.reports.frontier import draw_bars, draw_frontier
from weightops.reports.outcome import versions
from weightops.reports.page import write_page
from weightops.search.goal import (
    Coefficients,
    Goal,
    NothingSatisfiesError,
    Point,
    difference,
    interval,
    shown,
)
from weightops.search.session import EditSession, Measured, Trial, Vectors, combined, file_name
from weightops.search.strategies import coordinates, evolve, grid, race
from weightops.support.atomic import atomic_output, check_free
from weightops.support.json_files import jsonable, write_json
from weightops.task_vector import TaskVector
from weightops.tasks.task import Task
from weightops.training.config import TrainingConfig, config_for

log = logging.getLogger("weightops")

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
Search = Literal["grid", "race", "cma"]
SEARCHES: tuple[Search, ...] = get_args(Search)
OnMeasured = Callable[[Measured], None]


@dataclass(frozen=True)
class Plan:
    """What a run will do and what it takes, for ``--dry-run``."""

    verb: str
    model: str
    tasks: Mapping[str, str]
    learned: tuple[str, ...]
    alphas: tuple[float, ...]
    search: str
    config: TrainingConfig
    training_images: int
    evaluated_images: int
    output: str
    output_bytes: int
    free_bytes: int


@dataclass
class EditResult:
    """What a workflow has made and chosen.

    Attributes:
        vectors: by name; the edit is their sum, weighted by ``alpha``.
        alpha: their coefficients.
        why: in one sentence.
        sweep: what was measured on validation data on the way.
        rivals: what the edit is compared with on test data: name -> (vector, its tasks) for each.
        more: what else belongs into the summary.
    """

    vectors: Vectors
    alpha: Coefficients
    why: str
    sweep: list[Measured]
    rivals: dict[str, list[tuple[TaskVector, list[Task]]]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def edit(self) -> TaskVector:
        """The chosen edit."""
        return combined(self.vectors, self.alpha)

    @property
    def named(self) -> float | dict[str, float]:
        """The coefficient, or the coefficients by name."""
        return (
            self.alpha[0]
            if len(self.alpha) == 1
            else dict(zip(self.vectors, self.alpha, strict=True))
        )


class Workflow(ABC):
    """One edit of a model, from data to a folder with the edited model.

    Args:
        roles: what each task is for.
        model: what is edited.
        finetuned: weights or vectors to use instead of fine-tuning, one for each task that is learned.
        alphas: values to try for each coefficient, beside 0.
        search: "grid" measures all of them on all validation images; "race" drops the hopeless early; "cma" is for several
            coefficients that depend on each other. Of several, the others look at each in turn.
        device: "auto", "cpu", "cuda", ...
        training: fields of `TrainingConfig`.
    """

    verb: str
    """What it is called on the command line."""
    word = "edited"
    """What its result is called in the summary."""
    method: str
    """How the weights are made, for the model card."""
    sign = 1.0
    """What the values of alpha are multiplied by."""
    batchnorm: Task | None = None
    """On whose images averages of weights get batch statistics of their own."""
    keeps_vectors = True
    """Whether the vectors are among its results."""

    def __init__(
        self,
        roles: Mapping[Task, str],
        *,
        model: CheckpointLike = "embedded",
        finetuned: CheckpointLike | TaskVector | Sequence[Any] | None = None,
        alphas: Iterable[float] = ALPHAS,
        search: Search = "grid",
        device: str = "auto",
        **training: Any,
    ) -> None:
        self.roles = dict(roles)
        names = [task.name for task in self.roles]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise TaskError(
                f"two different tasks are called {twice[0]}: rename a folder, results go by names"
            )
        self.checkpoint = open_checkpoint(model)
        self.finetuned: list[Any] = (
            list(finetuned) if isinstance(finetuned, (list, tuple)) else [finetuned]
        )
        if finetuned is None:
            self.finetuned = []
        self.alphas = tuple(sorted({0.0, *map(finite, alphas)}))
        if search not in SEARCHES:
            raise UnknownNameError(f"there is no search {search!r}; known: {', '.join(SEARCHES)}")
        self.search: Search = search
        self.config = config_for(self.checkpoint, **training)
        self.device = device
        if self.finetuned and len(self.finetuned) != len(self.learned):
            raise OptionError(
                f"{self.verb} learns {len(self.learned)} tasks ({', '.join(task.name for task in self.learned)}), and "
                f"{len(self.finetuned)} weights or vectors were given instead: give one for each, in this order"
            )

    # -------------------------------------------------- what each one says

    @property
    @abstractmethod
    def learned(self) -> list[Task]:
        """The tasks that are fine-tuned on, in the order of ``finetuned``."""

    @abstractmethod
    def find(self, bench: EditSession) -> EditResult:
        """Make the vectors and choose their coefficients, on training and validation data alone."""

    @property
    @abstractmethod
    def view(self) -> Goal:
        """What the picture shows: the score upwards, what is kept to the right."""

    # ------------------------------------------------------- what all share

    @property
    def tasks(self) -> list[Task]:
        """All of its tasks."""
        return list(self.roles)

    @property
    def candidates(self) -> int:
        """About how many edits are measured on validation data."""
        return len(self.alphas)

    def vectors(self, bench: EditSession) -> list[TaskVector]:
        """A vector for each learned task: given, or fine-tuned now."""
        if self.finetuned:
            return [bench.vector(given) for given in self.finetuned]
        return [bench.learn(task) for task in self.learned]

    def choose(
        self, trial: Trial, alphas: Iterable[float] | None = None
    ) -> tuple[Coefficients, str]:
        """Search the coefficients of a trial on validation data.

        Raises:
            NothingSatisfiesError: if nothing satisfies the constraint, or nothing but the base does.
        """
        values = [self.sign * alpha + 0.0 for alpha in (self.alphas if alphas is None else alphas)]
        k = len(trial.vectors)
        shared = [(value,) * k for value in values]
        if k == 1:
            choice = (grid if self.search == "grid" else race)(trial.sheet, shared)
        elif self.search == "cma":
            choice = evolve(trial.sheet, values, shared, seed=self.config.seed)
        else:
            choice = coordinates(trial.sheet, values, shared)
        alpha = choice.alpha if isinstance(choice.alpha, tuple) else (choice.alpha,)
        if not any(alpha):
            best = max(
                (p for p in self.points(trial.sweep) if p.size[0]), key=lambda p: (p.kept, p.score)
            )
            kept = f" at {best.kept:.2%} {self.view.kept}" if self.view.keep else ""
            raise NothingSatisfiesError(
                f"no alpha improves {', '.join(t.name for t in self.learned)} within the rule, so there is nothing to write; the one that "
                f"costs least is alpha {shown(best.alpha)}: {abs(best.score):.2%}{kept}"
            )
        return alpha, choice.why

    def plan(self, out: Path) -> Plan:
        """What `run` would do."""
        validation, test = (
            sum(task.sizes[split] for task in self.tasks) for split in ("validation", "test")
        )
        learned = 0 if self.finetuned else len(self.learned)
        copies = (
            2 + len(self.learned) + 3 * learned
        )  # the model, the vectors; weights and state of the fine-tuning
        parent = next(p for p in out.absolute().parents if p.exists())
        return Plan(
            self.verb,
            self.checkpoint.ref,
            {t.name: role for t, role in self.roles.items()},
            tuple(t.name for t in self.learned),
            tuple(self.sign * a + 0.0 for a in self.alphas),
            self.search,
            self.config,
            learned * self.config.steps * self.config.batch_size,
            self.candidates * validation + 3 * test,
            str(out),
            copies * sum(spec.numel * 4 for spec in self.checkpoint.specs.values()),
            shutil.disk_usage(parent).free,
        )

    def run(
        self,
        out: Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        on_measured: OnMeasured = lambda _: None,
    ) -> dict[str, Any]:
        """Do it all; the content of ``summary.json``. ``out`` appears whole, at the end."""
        check_free(out, overwrite=overwrite)
        plan = self.plan(out)
        if plan.free_bytes < plan.output_bytes:
            need, free = plan.output_bytes / 1e6, plan.free_bytes / 1e6
            raise OutputError(
                f"{out} needs about {need:.0f} MB while it is made, and {free:.0f} MB are free"
            )
        for task in self.tasks:
            for split in ("validation", "test"):
                task.load(split)[
                    0
                ]  # what can't be had is better told now than after the fine-tuning
        work = out.with_name(f".{out.name}.run")
        if not resume and work.exists():
            log.warning(
                "an earlier run that was interrupted is started anew; --resume would have gone on with it"
            )
            shutil.rmtree(work, ignore_errors=True)
        started = time.monotonic()
        try:
            bench = EditSession(
                self.checkpoint,
                self.tasks,
                config=self.config,
                device=self.device,
                batchnorm=self.batchnorm,
                work=work,
                resume=resume,
                on_measured=on_measured,
            )
            found = self.find(bench)
            searched = time.monotonic() - started - bench.seconds
            test = confirm(bench, found, self.word)
            seconds = {
                "finetune": bench.seconds,
                "sweep": searched,
                "total": time.monotonic() - started,
            }
            summary = self._summary(bench, found, test, seconds, out)
            with atomic_output(out, overwrite=overwrite) as part:
                part.mkdir()
                self._write(part, bench, found, test, summary)
        except (NothingSatisfiesError, OptionError):
            shutil.rmtree(work, ignore_errors=True)
            raise  # after all else, an interrupt or a full disk, what was learned is kept, to go on from
        shutil.rmtree(work, ignore_errors=True)
        return summary

    def remarks(self, summary: Mapping[str, Any]) -> list[str]:
        """What else to say of the result, for the terminal."""
        return []

    def conclude(self, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What follows from the test scores, for the summary."""
        return {}

    def _summary(
        self,
        bench: EditSession,
        found: EditResult,
        test: Mapping[str, Measured],
        seconds: Mapping[str, float],
        out: Path,
    ) -> dict[str, Any]:
        edited, base = test[self.word], test["base"]
        tasks, intervals = {}, {}
        for task, role in self.roles.items():
            measured = {which: m for which, m in test.items() if task.name in m.scores}
            scores = {which: dict(m.scores[task.name]) for which, m in measured.items()}
            tasks[task.name] = {"role": role, "source": task.source, **scores}
            change, error = difference(edited.hits, base.hits, {task.name: 1.0})
            intervals[task.name] = {
                **{which: interval(m.hits[task.name]) for which, m in measured.items()},
                "change": (change - 1.96 * error, change + 1.96 * error),
            }
        summary = {
            "alpha": found.named,
            "chosen_on": "the validation splits of " + ", ".join(tasks),
            "why": found.why,
            "tasks": tasks,
            "intervals": intervals,
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "images": bench.passes,
            "model": {"ref": self.checkpoint.ref, "fingerprint": self.checkpoint.fingerprint},
            "finetuned": _given(self.finetuned),
            "training": None if self.finetuned else asdict(self.config),
            "seed": self.config.seed,
            "device": str(bench.clip.device),
            "verb": self.verb,
            "method": self.method,
            "output": str(out.absolute()),
            "versions": versions(),
            **found.more,
        }
        return {**summary, **self.conclude(tasks)}

    def _write(
        self,
        folder: Path,
        bench: EditSession,
        found: EditResult,
        test: Mapping[str, Measured],
        summary: Mapping[str, Any],
    ) -> None:
        edited = bench.edited(found.edit)
        edited.save_into(folder, final=Path(summary["output"]))
        names = list(found.vectors)
        rows = [
            {
                **record(bench.clip, task, split, m.scores[task.name], m.fingerprint),
                "alpha": m.coefficients[0]
                if len(m.coefficients) == 1
                else dict(zip(names, m.coefficients, strict=False)) or None,
                "weights": which,
            }
            for split, rows in (
                ("validation", [("sweep", m) for m in found.sweep]),
                ("test", list(test.items())),
            )
            for which, m in rows
            for task in self.tasks
            if task.name in m.scores
        ]
        (folder / "results.jsonl").write_text(
            "".join(json.dumps(jsonable(row)) + "\n" for row in rows), encoding="utf-8"
        )
        (folder / "README.md").write_text(
            card(summary, self.word, edited.architecture), encoding="utf-8"
        )
        for name, vector in found.vectors.items() if self.keeps_vectors else ():
            vector.save(
                folder
                / (
                    "task_vector.safetensors"
                    if len(names) == 1
                    else f"task_vector.{file_name(name)}.safetensors"
                )
            )
        logs = sorted(bench.work.glob("*/log.jsonl")) if bench.work else []
        for path in logs:
            shutil.copyfile(
                path,
                folder
                / (
                    "finetuning.jsonl" if len(logs) == 1 else f"finetuning.{path.parent.name}.jsonl"
                ),
            )
        points = self.points(found.sweep)
        title = self.title(summary)
        try:
            if self.view.keep and len(found.alpha) == 1:
                [chosen] = [point for point in points if point.alpha == found.alpha[0]]
                draw_frontier(
                    folder / "frontier",
                    points,
                    chosen,
                    title=title,
                    score=self.view.what,
                    kept=self.view.kept,
                    word=self.word,
                )
            else:
                draw_bars(folder / "accuracy", summary["tasks"], title=title)
        except MissingExtraError as error:
            log.warning("the picture is left out: %s", error)
        write_page(
            folder / "report.html",
            summary,
            found.sweep,
            points,
            self.view,
            bench,
            test,
            self.word,
            title,
        )
        write_json(folder / "summary.json", summary)

    def points(self, sweep: Sequence[Measured]) -> list[Point]:
        """What was measured in full, as points of the picture."""
        base = next((m for m in sweep if not any(m.coefficients)), None)
        if base is None:
            return []
        sizes = {name: len(hits) for name, hits in base.hits.items()}
        full = [m for m in sweep if {name: len(hits) for name, hits in m.hits.items()} == sizes]
        return [self.view.point(m.coefficients, m.hits, base.hits) for m in full]

    def title(self, summary: Mapping[str, Any]) -> str:
        """One line above the picture: what the edit did on test data."""
        parts = []
        for words, tasks in ((None, self.view.score), (self.view.kept, self.view.keep)):
            if tasks:
                rows = [summary["tasks"][name] for name in tasks]
                before, after = (
                    100 * sum(r[which]["acc1"] for r in rows) / len(rows)
                    for which in ("base", self.word)
                )
                parts.append(f"{words or ', '.join(tasks)} {before:.1f} → {after:.1f} %")
        return ", ".join(parts) + " (test)"


def confirm(bench: EditSession, found: EditResult, word: str = "edited") -> dict[str, Measured]:
    """The base, its rivals and the edit on the test splits: the one time that these are used."""
    zero = (0.0,) * len(found.alpha)
    results = {"base": bench.measure(combined(found.vectors, zero), "test", coefficients=zero)}
    for name, parts in found.rivals.items():
        measured = [
            bench.measure(vector, "test", tasks, _unit(found, vector)) for vector, tasks in parts
        ]
        fields = ("scores", "hits", "guesses")
        scores, hits, guesses = (
            {k: v for m in measured for k, v in getattr(m, which).items()} for which in fields
        )
        alpha = measured[0].coefficients if len(parts) == 1 else ()
        results[name] = Measured(alpha, scores, hits, guesses, measured[0].fingerprint)
    results[word] = bench.measure(found.edit, "test", coefficients=found.alpha)
    return results


def _unit(found: EditResult, vector: TaskVector) -> Coefficients:
    """The coefficients of a vector as it is, if it is one of those that the edit is made of."""
    own = [other is vector for other in found.vectors.values()]
    return tuple(map(float, own)) if any(own) else ()


def even(tasks: Iterable[Task], total: float = 1.0) -> dict[str, float]:
    """Equal weights that sum to ``total``."""
    names = [task.name for task in tasks]
    return dict.fromkeys(names, total / len(names)) if names else {}


def mean_of(tasks: Sequence[Task], kind: str) -> str:
    """What the mean over some tasks is called."""
    return tasks[0].name if len(tasks) == 1 else f"mean of {len(tasks)} {kind} tasks"


def _given(finetuned: Sequence[Any]) -> Any:
    refs = [
        f"{given!r}" if isinstance(given, TaskVector) else open_ref_name(given)
        for given in finetuned
    ]
    return refs[0] if len(refs) == 1 else refs or None


def open_ref_name(given: Any) -> str:
    """What given weights are called."""
    return str(given) if isinstance(given, (str, Path)) else open_checkpoint(given).ref
