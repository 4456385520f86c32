"""Named experiments of the papers, on the embedded tasks or one's own: each writes a table and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import getdoc
from pathlib import Path
from typing import Any

from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.reports.frontier import COLORS, INK
from weightops.reports.outcome import Outcome
from weightops.search.goal import Goal
from weightops.search.session import EditSession, Measured
from weightops.search.strategies import race
from weightops.support.atomic import check_free
from weightops.support.registry import Registry
from weightops.task_vector import TaskVector
from weightops.tasks import drawing
from weightops.tasks.derived import neutral, part_of, typographic
from weightops.tasks.rendered import any_face, rendered
from weightops.tasks.table import find_task
from weightops.tasks.task import Task
from weightops.training.config import TrainingConfig, config_for
from weightops.workflows.base import EditResult, Workflow, confirm, even
from weightops.workflows.patch import Patch

SUPPORTED = ("shapes", "textures", "letters", "words")
"""What patches must not harm here: the tasks that fine-tuning harms most, and easy ones."""


@dataclass(frozen=True)
class ExperimentSettings:
    """What an experiment runs on.

    Attributes:
        model: what is edited.
        task: what it is about; None for the experiment's own.
        config: how it is fine-tuned.
        device: "auto", "cpu", "cuda", ...
    """

    model: Checkpoint
    task: str | None
    config: TrainingConfig
    device: str = "auto"

    @classmethod
    def of(
        cls,
        model: CheckpointLike = "embedded",
        task: str | None = None,
        device: str = "auto",
        **training: Any,
    ) -> ExperimentSettings:
        """A setting from options and fields of `TrainingConfig`."""
        checkpoint = open_checkpoint(model)
        return cls(checkpoint, task, config_for(checkpoint, **training), device)

    def bench(self, tasks: Iterable[Task]) -> EditSession:
        """A bench with the model."""
        return EditSession(self.model, tasks, config=self.config, device=self.device)

    def edit(
        self, workflow: Workflow, also: Sequence[Task] = ()
    ) -> tuple[EditResult, dict[str, Measured]]:
        """Run a workflow, writing nothing: what it found, and the test scores of its tasks and of others."""
        bench = self.bench(workflow.tasks)
        workflow.search = "race"
        found = workflow.find(bench)
        bench.tasks += also
        return found, confirm(bench, found, workflow.word)

    def patch(
        self, task: Task, also: Sequence[Task] = ()
    ) -> tuple[EditResult, dict[str, Measured]]:
        """Patch a task, and look at others that had no part in it."""
        return self.edit(
            Patch(task, supported=SUPPORTED, model=self.model, device=self.device), also
        )


def _before_after(
    title: str,
    tasks: Sequence[tuple[Task, str]],
    found: EditResult,
    test: Mapping[str, Measured],
    word: str = "patched",
) -> Outcome:
    """The outcome of a patch: tasks with what they are, before and after."""
    rows: list[list[Any]] = [
        [task.name, what, *(acc(test[which], task) for which in ("base", word))]
        for task, what in tasks
    ]
    rows = [[*row, row[3] - row[2]] for row in rows]

    def draw(axes: Any) -> None:
        for i, (label, which) in enumerate((("before", 2), ("after", 3))):
            places = [j + (i - 0.5) * 0.38 for j in range(len(rows))]
            bars = axes.bar(
                places,
                [100 * row[which] for row in rows],
                width=0.36,
                color=(COLORS[0], COLORS[-1])[i],
                label=label,
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=8, color=INK)
        axes.set_xticks(range(len(rows)), [f"{row[0]}\n{row[1]}" for row in rows], fontsize=8)
        axes.set_ylabel("test accuracy (%)")
        axes.set_ylim(0, 108)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)

    return Outcome(
        title,
        ["task", "what it is", "before", "after", "change"],
        rows,
        draw,
        {"alpha": found.named, "why": found.why},
    )


def acc(measured: Measured, task: Task) -> float:
    """Its accuracy."""
    return float(measured.scores[task.name]["acc1"])


def attack(setting: ExperimentSettings) -> Outcome:
    """Typographic attacks: patch on pictures with wrong class names written over them (arXiv 2208.05592)."""
    clean = find_task(setting.task or "mnist")
    attacked, harmless = typographic(clean), neutral(clean)
    found, test = setting.patch(attacked, [clean, harmless])
    gains = [100 * (acc(test["patched"], t) - acc(test["base"], t)) for t in (attacked, harmless)]
    title = f"A patch on attacked {clean.name}: {gains[0]:+.1f} points under attack, {gains[1]:+.1f} under neutral words"
    kinds = [(attacked, "wrong class names"), (harmless, "neutral words"), (clean, "no words")]
    return _before_after(
        title,
        [*kinds, *((find_task(t), "supported") for t in SUPPORTED if t != clean.name)],
        found,
        test,
    )


def broad_transfer(setting: ExperimentSettings) -> Outcome:
    """Broad transfer: patch on half of the classes, test on the other half (arXiv 2208.05592)."""
    whole_task = setting.task or "mnist"
    seen, unseen = find_task(f"first-half:{whole_task}"), find_task(f"second-half:{whole_task}")
    found, test = setting.patch(seen, [unseen])
    gain = 100 * (acc(test["patched"], unseen) - acc(test["base"], unseen))
    title = f"A patch on half of {whole_task}'s classes: {gain:+.1f} points on the other half"
    return _before_after(title, [(seen, "patched on"), (unseen, "never seen")], found, test)


def counting(setting: ExperimentSettings) -> Outcome:
    """Counting: patch on some numbers of things, test on others (arXiv 2208.05592)."""
    task = find_task(setting.task or "counting")
    seen, unseen = (
        part_of(task, task.classes[::2], f"{task.name}: odd places"),
        part_of(task, task.classes[1::2], f"{task.name}: even places"),
    )
    found, test = setting.patch(seen, [unseen])
    gain = 100 * (acc(test["patched"], unseen) - acc(test["base"], unseen))
    title = (
        f"A patch on {', '.join(seen.classes)}: {gain:+.1f} points on {', '.join(unseen.classes)}"
    )
    return _before_after(
        title, [(seen, ", ".join(seen.classes)), (unseen, ", ".join(unseen.classes))], found, test
    )


def intermediate(setting: ExperimentSettings) -> Outcome:
    """Intermediate task vectors: how early the direction and the accuracy settle (arXiv 2212.04089)."""
    task = find_task(setting.task or "mnist")
    bench = setting.bench([task])
    steps = setting.config.steps
    marks = sorted(
        {max(1, round(steps * share)) for share in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)}
    )
    states: dict[int, dict[str, Any]] = {}

    def keep(step: int) -> None:
        if step in marks:
            states[step] = {
                n: t.detach().cpu().clone() for n, t in bench.clip.module.state_dict().items()
            }

    bench.learn(task, on_step=keep)
    vectors = {
        step: TaskVector(bench.base, Checkpoint(open_checkpoint(state).form))
        for step, state in states.items()
    }
    last = vectors[marks[-1]]
    base = acc(bench.measure(last * 0.0, "test"), task)
    rows = [
        [
            step,
            vectors[step].cosine(last),
            vectors[step].norm() / last.norm(),
            acc(bench.measure(vectors[step], "test"), task),
        ]
        for step in marks
    ]

    def draw(axes: Any) -> None:
        for column, label, color in (
            (1, "cosine with the last", COLORS[1]),
            (2, "norm over the last's", COLORS[0]),
            (3, "test accuracy", COLORS[-1]),
        ):
            axes.plot(
                [row[0] for row in rows],
                [100 * float(row[column]) for row in rows],
                marker="o",
                color=color,
                label=label,
            )
        axes.axhline(100 * base, color=INK, linewidth=1, linestyle=":", label="zero-shot accuracy")
        axes.set_xlabel("step")
        axes.set_ylabel("%")
        axes.legend(frameon=False, fontsize=9)

    early = next(row for row in rows if row[0] >= 0.2 * steps)
    title = f"{task.name}: after {100 * early[0] / steps:.0f} % of the steps, cosine {early[1]:.2f} with the last, accuracy {100 * early[3]:.1f} %"
    return Outcome(
        title, ["step", "cosine %", "norm %", "accuracy"], rows, draw, {"zero_shot": base}
    )


def learning_rate(setting: ExperimentSettings) -> Outcome:
    """Learning rates: larger ones hurt the sum of two vectors more than the fine-tuned models (arXiv 2212.04089)."""
    tasks = [
        find_task(n) for n in (setting.task.split(",") if setting.task else ("mnist", "letters"))
    ]
    bench = setting.bench(tasks)
    rows: list[list[Any]] = []
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        config = replace(setting.config, lr=factor * setting.config.lr)
        vectors = {t.name: bench.learn(t, config=config) for t in tasks}
        trial = bench.trial(
            {"sum": sum(list(vectors.values())[1:], vectors[tasks[0].name])},
            Goal(even(tasks), what="best mean accuracy"),
        )
        alpha = race(trial.sheet, [(0.05 * i,) for i in range(21)]).alpha
        own = [acc(bench.measure(vectors[t.name], "test", [t]), t) for t in tasks]
        both = bench.measure(trial.vector((alpha,) if isinstance(alpha, float) else alpha), "test")
        shares = [acc(both, t) / single for t, single in zip(tasks, own, strict=True)]
        rows.append(
            [
                f"{config.lr:g}",
                sum(own) / len(own),
                sum(acc(both, t) for t in tasks) / len(tasks),
                sum(shares) / len(shares),
                f"{alpha:g}",
            ]
        )

    def draw(axes: Any) -> None:
        for column, label, color in (
            (1, "fine-tuned models", COLORS[1]),
            (2, "their sum", COLORS[-1]),
        ):
            axes.plot(
                [float(str(row[0])) for row in rows],
                [100 * float(row[column]) for row in rows],
                marker="o",
                color=color,
                label=label,
            )
        axes.set_xscale("log")
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel("mean test accuracy (%)")
        axes.legend(frameon=False)

    title = f"{' + '.join(t.name for t in tasks)}: normalized {100 * rows[0][3]:.1f} % at the lowest rate, {100 * rows[-1][3]:.1f} % at the highest"
    return Outcome(title, ["learning rate", "fine-tuned", "sum", "normalized", "alpha"], rows, draw)


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


def run_experiment(
    name: str, out: str | Path, *, overwrite: bool = False, **options: Any
) -> Outcome:
    """Run a named experiment, and write ``table.txt``, ``results.json`` and its picture.

    Args:
        name: of `EXPERIMENTS`.
        out: the folder; it appears whole.
        overwrite: replace ``out``.
        options: ``model``, ``task`` (instead of the experiment's own), ``device``, and fields of `TrainingConfig`.

    Raises:
        UnknownNameError: if there is no such experiment.
    """
    out = Path(out)
    check_free(out, overwrite=overwrite)
    experiment = EXPERIMENTS[name]
    setting = ExperimentSettings.of(**options)
    outcome = experiment(setting)
    outcome.write(
        out,
        {"experiment": name, "model": setting.model.ref, "training": asdict(setting.config)},
        overwrite=overwrite,
    )
    return outcome


def plan_experiment(name: str, out: str | Path, **options: Any) -> dict[str, Any]:
    """What `run_experiment` would do with the same arguments, for ``--dry-run``."""
    about = (getdoc(EXPERIMENTS[name]) or "").partition("\n")[0]
    setting = ExperimentSettings.of(**options)
    return {
        "experiment": name,
        "about": about,
        "model": setting.model.ref,
        "task": setting.task or "the experiment's own",
        **asdict(setting.config),
        "output": str(out),
    }


# -------------------------------------------------- the built-in analogy: a style by a half of the classes


def _striped(rng: Any, label: str, split: str) -> drawing.Picture:
    """A letter on stripes."""
    mask = drawing.text_mask(
        rng, label if rng.random() < 0.5 else label.upper(), any_face(rng, split)
    )
    ink, ground = drawing.contrasting_colors(rng)
    light = drawing.color(rng, ground)
    dark = light + (90 if light.mean() < 128 else -90)
    stripes = drawing.TEXTURES["diagonal stripes"](rng)[..., None]
    return drawing.expose(
        rng, drawing.compose(mask, drawing.color(rng, ink), light + stripes * (dark - light))
    )


PLAIN = find_task("letters")
STRIPED = rendered("striped letters", PLAIN.classes, PLAIN.templates, _striped)
ANALOGY = tuple(
    part_of(style, half, f"{style.name} {half[0]}-{half[-1]}")
    for half in (PLAIN.classes[:13], PLAIN.classes[13:])
    for style in (PLAIN, STRIPED)
)
"""Plain letters a-m are to striped letters a-m as plain letters n-z are to striped letters n-z."""
