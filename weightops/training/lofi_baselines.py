"""What lo-fi is compared with: communication in every step, single nodes, a moving average, an ensemble (arXiv 2210.11948)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.shift import effective_robustness, shift
from weightops.evaluation.zero_shot import logits
from weightops.support.atomic import atomic_output
from weightops.support.json_files import write_json
from weightops.tasks.table import as_tasks
from weightops.tasks.task import Task
from weightops.training import lofi
from weightops.training.config import TrainingConfig, config_for
from weightops.training.finetune import finetune
from weightops.training.learners import ImageLearner
from weightops.training.nodes import Node, OneProcess
from weightops.training.run_folder import EMA, LOG, RECORD

EMA_DECAY = 0.99
"""Of the moving average of a node, where the recipe names none."""
ALONE, ENSEMBLE = " alone", "ensemble"


def compare_with_baselines(
    task: str | Task,
    out: str | Path,
    *,
    model: CheckpointLike = "embedded",
    config: TrainingConfig | None = None,
    strategy: OneProcess | None = None,
    nodes: int | None = None,
    like: Node | None = None,
    device: str = "auto",
    **options: Any,
) -> dict[str, Any] | None:
    """Fine-tune with communication in every step and without, on equally many samples, and score all that comes of it.

    Args:
        task: what to learn.
        out: a folder for ``baseline``, the nodes and ``merged`` (see `weightops.lofi.run`), and ``comparison.json``.
        model: what to start from.
        config: how; by default `config_for` the model.
        strategy: this process's part in a job that torchrun started; by default this process alone.
        nodes: how many, without torchrun.
        like: how the nodes work together.
        device: "auto", "cpu", "cuda", ...
        options: ``checkpoint_every``, ``resume`` and ``overwrite`` of `weightops.lofi.run`.

    Returns:
        In the process that wrote the average: ``models``, name -> accuracy on the test split, under shift, and effective
        robustness against the line through base, baseline and single nodes; and ``cost``, the seconds that
        training took, and those of them in communication. None in other processes.
    """
    out, strategy, [task] = Path(out), strategy or OneProcess(), as_tasks(task)
    clip = ImageModel.open(model, device, learning=task)
    config = config or config_for(clip.base)
    config = replace(config, ema=config.ema or EMA_DECAY)
    everyone = strategy.everyone()
    finetune(clip, task, config, out=out / "baseline", strategy=everyone, **options)
    average = lofi.run(
        ImageLearner(clip, task),
        out,
        config=config,
        strategy=strategy,
        nodes=nodes,
        like=like,
        **options,
    )
    if average is None:
        return None
    folders = {name: out / Path(name).name for name in average.weights}
    first = next(iter(folders))
    models = {"base": clip.base, "baseline": open_checkpoint(out / "baseline")}
    models |= {f"{name}{ALONE}": open_checkpoint(folder) for name, folder in folders.items()}
    models |= {"average": average.model, f"EMA of {first}": open_checkpoint(folders[first] / EMA)}
    scores = _scorer(clip, models)
    rows = {name: shift(partial(scores, name), task) for name in [*models, ENSEMBLE]}
    known = [
        (r["in_distribution"], r["under_shift"])
        for n, r in rows.items()
        if n.startswith("base") or n.endswith(ALONE)
    ]
    for row in rows.values():
        row["effective_robustness"] = effective_robustness(
            (row["in_distribution"], row["under_shift"]), known
        )
    cost = {"baseline": _cost(out / "baseline"), "lo-fi": _cost(folders[first], strategy.seconds)}
    result = {
        "task": task.name,
        "config": asdict(config),
        "average": average.record(),
        "models": rows,
        "cost": cost,
    }
    with atomic_output(out / "comparison.json", overwrite=True) as part:
        write_json(part, result)
    return result


def _scorer(
    clip: ImageModel, models: Mapping[str, Checkpoint]
) -> Callable[[str, Task, str], float]:
    """The accuracy of a model, by name, on a task; all of them at once, in one resident module that keeps the images."""

    @cache
    def accuracies(task: Task, split: str) -> dict[str, float]:
        found = {}
        ensemble = torch.zeros(())
        labels = clip.pixels(task, split).labels
        for name, checkpoint in models.items():
            checkpoint.load_into(clip.module)
            scores = torch.cat([batch.cpu() for batch in logits(clip, task, split)])
            found[name] = (scores.argmax(1) == labels).double().mean().item()
            if name.endswith(ALONE):
                ensemble = ensemble + scores
        return {**found, ENSEMBLE: (ensemble.argmax(1) == labels).double().mean().item()}

    return lambda name, task, split: accuracies(task, split)[name]


def _cost(run: Path, communication: float | None = None) -> dict[str, float]:
    """Seconds that a run took, and those in communication."""
    record = json.loads((run / RECORD).read_text(encoding="utf-8"))
    lines = (run / LOG).read_text(encoding="utf-8").splitlines()
    seconds = json.loads(lines[-1])["seconds"] if lines else math.nan
    return {
        "seconds": seconds,
        "communication_seconds": record["communication_seconds"]
        if communication is None
        else communication,
    }
