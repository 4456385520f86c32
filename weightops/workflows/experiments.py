"""The papers' other experiments, on the embedded tasks or one's own: each a table and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from inspect import getdoc
from pathlib import Path
from typing import Any

from weightops.algebra.devices import pick_device
from weightops.algebra.precision import Precision, pick_precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.evaluation.units import ACCURACY, require_images
from weightops.reports.frontier import COLORS, INK
from weightops.reports.outcome import Outcome
from weightops.search.goal import Goal
from weightops.search.racing import race
from weightops.search.session import EditSession
from weightops.support.atomic import reserved
from weightops.support.calls import repeatable
from weightops.support.progress import job, left
from weightops.support.registry import Registry
from weightops.task_vector import TaskVector
from weightops.tasks.table import TaskList, as_tasks, find_task
from weightops.tasks.task import Task
from weightops.training.config import TrainingConfig, config_for
from weightops.training.training_loop import step_work
from weightops.workflows.base import even_weights
from weightops.workflows.experiment import SUPPORTED, ExperimentSettings, accuracy
from weightops.workflows.patching_experiments import attack, broad_transfer, counting

_LINE = tuple((0.05 * i,) for i in range(21))
"""The coefficients that a sum of vectors is tried with."""
_SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""The shares of the steps after which `intermediate` looks at the vector."""
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The factors of the learning rate that `learning_rate` compares."""


def intermediate(settings: ExperimentSettings) -> Outcome:
    """Intermediate task vectors: how early direction and accuracy settle (arXiv 2212.04089)."""
    task = find_task(settings.task or "mnist")
    session, steps = settings.session([task]), settings.config.steps
    left(steps * step_work(settings.config) + (len(_SHARES) + 1) * task.sizes["test"])
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
    marks = sorted({max(1, round(steps * share)) for share in _SHARES})
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
    sizes = {split: sum(task.sizes[split] for task in tasks) for split in ("validation", "test")}
    training = len(tasks) * settings.config.steps * step_work(settings.config)
    work = training + len(_LINE) * sizes["validation"] + 2 * sizes["test"]
    rows = []
    for i, factor in enumerate(_FACTORS):
        left((len(_FACTORS) - i) * work)
        config = replace(settings.config, lr=factor * settings.config.lr)
        rows.append(_sum_at(session, tasks, config))

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
    shares = [ACCURACY.share(*pair) for pair in zip(together, alone, strict=True)]
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
    model: CheckpointLike,
    task: str | None,
    training: TrainingConfig | None,
    supported: TaskList | None,
    **where: Any,
) -> ExperimentSettings:
    checkpoint = open_checkpoint(model)
    require_images(
        (find_task(name) for name in (task or "").split(",") if name),
        "experiments take tasks of images",
        "patch, negate, add, analogy and soup take texts",
    )
    kept = as_tasks(SUPPORTED if supported is None else supported)
    return ExperimentSettings(checkpoint, task, training or config_for(checkpoint), where, kept)


@repeatable("run_experiment")
def run_experiment(
    name: str,
    out: str | Path,
    *,
    model: CheckpointLike = "embedded",
    task: str | None = None,
    supported: TaskList | None = None,
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
        supported: what a patch must not harm. Default: shapes, textures, letters and words.
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
        settings = _settings(model, task, training, supported, device=device, precision=precision)
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
    supported: TaskList | None = None,
    training: TrainingConfig | None = None,
    **where: Any,
) -> dict[str, Any]:
    """Return what `run_experiment` would do with the same arguments."""
    settings = _settings(model, task, training, supported, **where)
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
