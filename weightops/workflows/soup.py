"""Soups: the average of several models, or of those that help (arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import OptionError, UnknownNameError
from weightops.search.goal import Coefficients, Goal, weighted
from weightops.search.session import EditSession, combined
from weightops.tasks.table import SUPPORTED, as_tasks
from weightops.tasks.task import Task
from weightops.workflows.base import EditResult, OnMeasured, Workflow, even, mean_of

Selection = Literal["greedy", "uniform"]
SELECTIONS: tuple[Selection, ...] = ("greedy", "uniform")


class Soup(Workflow):
    """An average of models; see `soup`."""

    verb, word, keeps_vectors = "soup", "soup", False
    method = "The weights are an average of models (model soups, arXiv 2203.05482)"

    def __init__(
        self,
        models: Sequence[CheckpointLike],
        *,
        tasks: Iterable[str | Task] | None = None,
        recipe: Selection = "greedy",
        batchnorm: str | Task | None = None,
        device: str = "auto",
    ) -> None:
        if len(models) < 2:
            raise OptionError("a soup needs two models at least")
        if recipe not in SELECTIONS:
            raise UnknownNameError(f"there is no recipe {recipe!r}; known: {', '.join(SELECTIONS)}")
        self.models = [open_checkpoint(model) for model in models]
        self.recipe = recipe
        super().__init__(
            dict.fromkeys(as_tasks(SUPPORTED if tasks is None else tasks), "target"),
            model=self.models[0],
            device=device,
        )
        self.finetuned = list(self.models)
        if batchnorm is not None:
            [self.batchnorm] = as_tasks(batchnorm)
            self.method = f"{self.method}, with batch statistics of the training images of {self.batchnorm.name}"

    @property
    def learned(self) -> list[Task]:
        return []

    @property
    def candidates(self) -> int:
        return 2 * len(self.models)

    @property
    def view(self) -> Goal:
        return Goal(even(self.tasks), what=f"accuracy, {mean_of(self.tasks, 'target')}")

    def find(self, bench: EditSession) -> EditResult:
        names = names_of([model.ref for model in self.models])
        vectors = dict(zip(names, (bench.vector(model) for model in self.models), strict=True))
        trial = bench.trial(vectors, self.view)
        k = len(names)

        def mixed(members: Sequence[int]) -> Coefficients:
            return tuple(1 / len(members) if i in members else 0.0 for i in range(k))

        def value(members: Sequence[int]) -> float:
            return weighted(trial.sheet.see(mixed(members)), self.view.score)

        alone = [value([i]) for i in range(k)]
        order = sorted(range(k), key=lambda i: -alone[i])
        steps = [
            {
                "model": names[order[0]],
                "accuracy": alone[order[0]],
                "accepted": True,
                "why": "the best on its own",
            }
        ]
        members = [order[0]]
        best = alone[order[0]]
        if self.recipe == "uniform":
            members = list(range(k))
            why = f"all {k} models, whatever they score ({value(members):.2%} on validation data; the best alone {best:.2%})"
        else:
            for i in order[1:]:
                with_it = value([*members, i])
                accepted = with_it > best
                steps.append(
                    {
                        "model": names[i],
                        "accuracy": alone[i],
                        "accepted": accepted,
                        "why": f"the soup {'rises' if accepted else 'does not rise'} with it: {best:.2%} to {with_it:.2%}",
                    }
                )
                if accepted:
                    members, best = [*members, i], with_it
            why = f"of {k} models, best first, those {len(members)} were kept with which mean validation accuracy strictly rose (to {best:.2%})"
        single = vectors[names[order[0]]]
        rivals = {
            "best single": [(single, self.tasks)],
            "uniform": [(combined(vectors, mixed(range(k))), self.tasks)],
        }
        chosen = {"chosen_on": "no data"} if self.recipe == "uniform" else {}
        return EditResult(
            vectors,
            mixed(members),
            why,
            trial.sweep,
            rivals,
            {"recipe": self.recipe, "steps": steps, **chosen},
        )

    def remarks(self, summary: Any) -> list[str]:
        return [
            "\n".join(
                f"{'+' if s['accepted'] else '-'} {s['model']} ({100 * s['accuracy']:.1f}): {s['why']}"
                for s in summary["steps"]
            )
        ]


def names_of(refs: Sequence[str]) -> list[str]:
    """Short names for models, all different."""
    short = [Path(ref).name.removesuffix(".safetensors") or ref for ref in refs]
    return [name if short.count(name) == 1 else f"{name} {i + 1}" for i, name in enumerate(short)]


def soup(
    models: Sequence[CheckpointLike],
    out: str | Path,
    *,
    overwrite: bool = False,
    on_measured: OnMeasured = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    r"""Average models: all of them, or greedily those that help on validation data (arXiv 2203.05482).

    The greedy soup begins with the best model and takes in each next best if the mean validation accuracy strictly rises.

    Args:
        models: what to average, of one architecture; the first must know it.
        out: the folder for the soup and the results; it appears whole.
        overwrite: replace ``out``.
        on_measured: called with the validation scores of each soup.
        options: ``tasks`` to measure on (default all rendered ones), ``recipe`` ("greedy" or "uniform"), ``batchnorm`` (a task on whose
            images each soup's running statistics are made anew) and ``device``.

    Returns:
        The content of ``summary.json``; its ``steps`` say why each model was taken or left.
    """
    return Soup(models, **options).run(Path(out), overwrite=overwrite, on_measured=on_measured)
