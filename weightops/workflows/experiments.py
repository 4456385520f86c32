"""The papers' other experiments, on the embedded tasks or one's own: each a table and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import getdoc
from pathlib import Path
from typing import Any

from weightops.algebra.devices import pick_device
from weightops.algebra.precision import Precision, pick_precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.reports.frontier import COLORS, INK
from weightops.reports.outcome import Outcome
from weightops.search.goal import Goal
from weightops.search.racing import race
from weightops.search.session import EditSession, Measured
from weightops.support.atomic import reserved
from weightops.support.progress import job
from weightops.support.registry import Registry
from weightops.task_vector import TaskVector
from weightops.tasks.derived import neutral, typographic, with_classes
from weightops.tasks.table import find_task
from weightops.tasks.task import Task
from weightops.training.config import TrainingConfig, config_for
from weightops.workflows.base import even_weights
from weightops.workflows.patch import Patch
from weightops.workflows.result import EditResult, confirm

SUPPORTED = ("shapes", "textures", "letters", "words")
"""The tasks that a patch must not harm here: those that it harms most, and easy ones."""

_LINE = tuple((0.05 * i,) for i in range(21))
"""The coefficients that a sum of vectors is tried with."""


@dataclass(frozen=True)
class ExperimentSettings:
    """The model, task and recipe that an experiment runs on.

    Attributes:
        model: the model to edit.
        task: the name of its task; None for the experiment's own.
        config: the recipe of fine-tuning.
        where: ``device`` and ``precision`` of the session.
    """

    model: Checkpoint
    task: str | None
    config: TrainingConfig
    where: Mapping[str, Any]

    def session(self, tasks: Iterable[Task]) -> EditSession:
        """Return a session with the model."""
        return EditSession(self.model, tasks, config=self.config, **self.where)

    def patch(
        self, task: Task, also: Sequence[Task] = ()
    ) -> tuple[EditResult, dict[str, Measured]]:
        """Patch a task without writing anything.

        Args:
            task: the task to patch.
            also: further tasks to measure on test data, which have no part in the patch.

        Returns:
            The chosen edit, and model -> test scores.
        """
        workflow = Patch.from_call(task, supported=SUPPORTED, model=self.model, **self.where)
        workflow.may_be_base = True  # an experiment shows that nothing improved, too
        session = self.session(workflow.tasks)
        result = workflow.find(session)
        session.tasks += also
        return result, confirm(session, result, workflow.word)


def accuracy(measured: Measured, task: Task) -> float:
    """Return the accuracy on a task."""
    return float(measured.scores[task.name]["acc1"])


# ------------------------------------------------------------------------ PAINT


def attack(settings: ExperimentSettings) -> Outcome:
    """Typographic attacks: patch on pictures with wrong class names on them (arXiv 2208.05592)."""
    clean = find_task(settings.task or "mnist")
    attacked, harmless = typographic(clean), neutral(clean)
    result, test = settings.patch(attacked, [clean, harmless])
    gains = [
        100 * (accuracy(test["patched"], task) - accuracy(test["base"], task))
        for task in (attacked, harmless)
    ]
    title = (
        f"A patch on attacked {clean.name}: {gains[0]:+.1f} points under attack, "
        f"{gains[1]:+.1f} under neutral words"
    )
    kinds = [(attacked, "wrong class names"), (harmless, "neutral words"), (clean, "no words")]
    supported = [(find_task(name), "supported") for name in SUPPORTED if name != clean.name]
    return _before_and_after(title, [*kinds, *supported], result, test)


def broad_transfer(settings: ExperimentSettings) -> Outcome:
    """Broad transfer: patch on half of the classes, test on the others (arXiv 2208.05592)."""
    name = settings.task or "mnist"
    seen, unseen = find_task(f"first-half:{name}"), find_task(f"second-half:{name}")
    result, test = settings.patch(seen, [unseen])
    gain = 100 * (accuracy(test["patched"], unseen) - accuracy(test["base"], unseen))
    title = f"A patch on half of {name}'s classes: {gain:+.1f} points on the other half"
    return _before_and_after(title, [(seen, "patched on"), (unseen, "never seen")], result, test)


def counting(settings: ExperimentSettings) -> Outcome:
    """Counting: patch on some numbers of things, test on others (arXiv 2208.05592)."""
    task = find_task(settings.task or "counting")
    seen = with_classes(task, task.classes[::2], f"{task.name}: odd places")
    unseen = with_classes(task, task.classes[1::2], f"{task.name}: even places")
    result, test = settings.patch(seen, [unseen])
    gain = 100 * (accuracy(test["patched"], unseen) - accuracy(test["base"], unseen))
    seen_names, unseen_names = ", ".join(seen.classes), ", ".join(unseen.classes)
    title = f"A patch on {seen_names}: {gain:+.1f} points on {unseen_names}"
    return _before_and_after(title, [(seen, seen_names), (unseen, unseen_names)], result, test)


def _before_and_after(
    title: str, tasks: Sequence[tuple[Task, str]], result: EditResult, test: Mapping[str, Measured]
) -> Outcome:
    """Return the outcome of a patch: tasks with what they are, before and after."""
    rows: list[list[Any]] = []
    for task, kind in tasks:
        before, after = accuracy(test["base"], task), accuracy(test["patched"], task)
        rows.append([task.name, kind, before, after, after - before])
    header = ["task", "what it is", "before", "after", "change"]
    more = {"alpha": result.named_alpha, "why": result.why}
    return Outcome(title, header, rows, lambda axes: _draw_before_and_after(axes, rows), more)


def _draw_before_and_after(axes: Any, rows: Sequence[Sequence[Any]]) -> None:
    for i, (label, column) in enumerate((("before", 2), ("after", 3))):
        bars = axes.bar(
            [j + (i - 0.5) * 0.38 for j in range(len(rows))],
            [100 * row[column] for row in rows],
            width=0.36,
            color=(COLORS[0], COLORS[-1])[i],
            label=label,
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8, color=INK)
    axes.set_xticks(range(len(rows)), [f"{row[0]}\n{row[1]}" for row in rows], fontsize=8)
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 108)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)


# -------------------------------------------------------------- task arithmetic


def intermediate(settings: ExperimentSettings) -> Outcome:
    """Intermediate task vectors: how early direction and accuracy settle (arXiv 2212.04089)."""
    task = find_task(settings.task or "mnist")
    session, steps = settings.session([task]), settings.config.steps
    vectors = _vectors_on_the_way(session, task, steps)
    last = vectors[steps]
    base = accuracy(session.measure(last * 0.0, "test"), task)
    rows = [
        [
            step,
            vector.cosine(last),
            vector.norm() / last.norm(),
            accuracy(session.measure(vector, "test"), task),
        ]
        for step, vector in vectors.items()
    ]

    def draw(axes: Any) -> None:
        for column, label, color in (
            (1, "cosine with the last", COLORS[1]),
            (2, "norm over the last's", COLORS[0]),
            (3, "test accuracy", COLORS[-1]),
        ):
            _draw_line(axes, [row[0] for row in rows], rows, column, label=label, color=color)
        axes.axhline(100 * base, color=INK, linewidth=1, linestyle=":", label="zero-shot accuracy")
        axes.set_xlabel("step")
        axes.set_ylabel("%")
        axes.legend(frameon=False, fontsize=9)

    early = next(row for row in rows if row[0] >= 0.2 * steps)
    title = (
        f"{task.name}: after {100 * early[0] / steps:.0f} % of the steps, cosine {early[1]:.2f} "
        f"with the last, accuracy {100 * early[3]:.1f} %"
    )
    header = ["step", "cosine %", "norm %", "accuracy"]
    return Outcome(title, header, rows, draw, {"zero_shot": base})


def _vectors_on_the_way(session: EditSession, task: Task, steps: int) -> dict[int, TaskVector]:
    """Fine-tune once; return step -> the vector up to there, at some steps and the last."""
    shares = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
    marks = sorted({max(1, round(steps * share)) for share in shares})
    states: dict[int, dict[str, Any]] = {}

    def keep(step: int) -> None:
        if step in marks:
            state = session.model.module.state_dict()
            states[step] = {name: t.detach().cpu().clone() for name, t in state.items()}

    session.learn(task, on_step=keep)
    return {
        step: TaskVector(session.base, Checkpoint(open_checkpoint(states[step]).form))
        for step in marks
    }


def learning_rate(settings: ExperimentSettings) -> Outcome:
    """Learning rates: large ones hurt the sum of vectors more than each (arXiv 2212.04089)."""
    names = settings.task.split(",") if settings.task else ("mnist", "letters")
    tasks = [find_task(name) for name in names]
    session = settings.session(tasks)
    rows = [
        _sum_at(session, tasks, replace(settings.config, lr=factor * settings.config.lr))
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0)
    ]

    def draw(axes: Any) -> None:
        rates = [float(str(row[0])) for row in rows]
        for column, label, color in (
            (1, "fine-tuned models", COLORS[1]),
            (2, "their sum", COLORS[-1]),
        ):
            _draw_line(axes, rates, rows, column, label=label, color=color)
        axes.set_xscale("log")
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel("mean test accuracy (%)")
        axes.legend(frameon=False)

    title = (
        f"{' + '.join(task.name for task in tasks)}: normalized {100 * rows[0][3]:.1f} % at the "
        f"lowest rate, {100 * rows[-1][3]:.1f} % at the highest"
    )
    header = ["learning rate", "fine-tuned", "sum", "normalized", "alpha"]
    return Outcome(title, header, rows, draw)


def _sum_at(session: EditSession, tasks: Sequence[Task], config: TrainingConfig) -> list[Any]:
    """Fine-tune on each task and add the vectors: one row of the table of `learning_rate`."""
    vectors = [session.learn(task, config=config) for task in tasks]
    goal = Goal(even_weights(tasks), what="best mean accuracy")
    trial = session.trial({"sum": sum(vectors[1:], vectors[0])}, goal)
    alpha = race(trial.measurements, _LINE).alpha
    alone = [
        accuracy(session.measure(vector, "test", [task]), task)
        for vector, task in zip(vectors, tasks, strict=True)
    ]
    both = session.measure(trial.vector((alpha,) if isinstance(alpha, float) else alpha), "test")
    together = [accuracy(both, task) for task in tasks]
    shares = [value / single for value, single in zip(together, alone, strict=True)]
    means = [sum(values) / len(values) for values in (alone, together, shares)]
    return [f"{config.lr:g}", *means, f"{alpha:g}"]


def _draw_line(axes: Any, x: list[Any], rows: list[list[Any]], column: int, **style: Any) -> None:
    axes.plot(x, [100 * float(row[column]) for row in rows], marker="o", **style)


EXPERIMENTS: Registry[Callable[[ExperimentSettings], Outcome]] = Registry(
    "experiment",
    "experiments",
    {
        "typographic": attack,
        "broad-transfer": broad_transfer,
        "counting": counting,
        "intermediate": intermediate,
        "learning-rate": learning_rate,
    },
)


def _settings(
    model: CheckpointLike, task: str | None, training: TrainingConfig | None, **where: Any
) -> ExperimentSettings:
    checkpoint = open_checkpoint(model)
    return ExperimentSettings(checkpoint, task, training or config_for(checkpoint), where)


def run_experiment(
    name: str,
    out: str | Path,
    *,
    model: CheckpointLike = "embedded",
    task: str | None = None,
    training: TrainingConfig | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    overwrite: bool = False,
) -> Outcome:
    """Run an experiment of the papers and write its table and picture.

    Args:
        name: a name in `EXPERIMENTS`.
        out: the folder for ``table.txt``, ``results.json`` and the picture; it appears whole.
        model: the model to edit: a path to a model with its configuration, or a ref.
        task: the task to run it on, instead of the experiment's own.
        training: the recipe of fine-tuning, see `config_for`; the model's own by default.
        device: where to compute: auto, cpu, cuda, cuda:1, ...
        precision: what the model is run in, but for test data: float32, bfloat16, or auto: bfloat16
            where the processor computes in it, else float32.
        overwrite: replace an output that exists; it stays until the new one is complete.

    Raises:
        UnknownNameError: if there is no such experiment.
    """
    with reserved(out, overwrite=overwrite), job(name, None):
        experiment = EXPERIMENTS[name]
        settings = _settings(model, task, training, device=device, precision=precision)
        outcome = experiment(settings)
        about = {
            "experiment": name,
            "model": settings.model.ref,
            "training": asdict(settings.config),
            "precision": pick_precision(precision, pick_device(device)),
        }
        outcome.write(Path(out), about, overwrite=overwrite)
    return outcome


def plan_experiment(
    name: str,
    out: str | Path,
    *,
    model: CheckpointLike = "embedded",
    task: str | None = None,
    training: TrainingConfig | None = None,
    **where: Any,
) -> dict[str, Any]:
    """Return what `run_experiment` would do with the same arguments."""
    settings = _settings(model, task, training, **where)
    return {
        "experiment": name,
        "about": about_experiment(EXPERIMENTS[name]),
        "model": settings.model.ref,
        "task": task or "the experiment's own",
        **asdict(settings.config),
        "output": str(out),
    }


def about_experiment(experiment: Callable[[ExperimentSettings], Outcome]) -> str:
    """Return the first line of an experiment's docstring."""
    return (getdoc(experiment) or "").partition("\n")[0]
