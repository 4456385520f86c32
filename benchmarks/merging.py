"""Merge eight fine-tuned models of the embedded one by all methods: accuracy, time and bytes.

    pip install '.[demo,plot]' && python benchmarks/merging.py

Each seed fine-tunes a model on each task once. Methods have their own options; the coefficient of a
merged task vector is chosen on validation images, in the same way for all of them. Statistics are
of training images without labels, as is `entropy`; `loss` and learned masks have the labels. The
numbers are of the first ``--test`` images of the test splits. Normalized accuracy is that over the
fine-tuned model's. Seconds are those of the merge and of what it needs, statistics included,
without the choice of alpha. results/merging.json and results/merging.png are written after each
seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from weightops import TaskVector, collect, config_for, localize, merge, open_checkpoint, pack
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.merging.layer_by_layer import collect_layer_by_layer
from weightops.merging.methods.table import METHODS
from weightops.reports.outcome import versions
from weightops.search.descent import Descent
from weightops.search.directions import search_by_gradient
from weightops.search.goal import Goal
from weightops.search.session import EditSession, weighted_sum
from weightops.search.strategies import grid
from weightops.tasks.table import as_tasks
from weightops.tasks.task import ImageSubset, LazySizes, Task
from weightops.workflows.base import even_weights

RESULTS = Path(__file__).parent / "results"
TASKS = ("mnist", "digits", "shapes", "colors", "textures", "counting", "letters", "fonts")
SKIPPED = ("passthrough", "ema", "slerp", "nuslerp_rows", "arcee_fusion", "nearswap")
"""Methods for other things than several tasks of one base."""
IMAGES = {"gram": 256, "fisher": 64, "layers": 64}
"""The images of a statistic; RegMean++ runs once for each layer."""
ALPHAS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0)
"""The coefficients to choose from: for methods that add, and for those that average."""


def first_images(task: Task, most: dict[str, int]) -> Task:
    """Return a task with the first images of its splits."""

    def load(split: str) -> ImageSubset:
        images = task.load(split)
        indices = np.arange(min(most.get(split, len(images)), len(images)))
        return ImageSubset(images, indices, images.labels[indices])

    return replace(task, load=load, sizes=LazySizes(load))


class Bench:
    """The models of one seed, and the scores of what is made of them."""

    def __init__(self, seed: int, given: argparse.Namespace, folder: Path) -> None:
        most = {"validation": given.validation, "test": given.test}
        self.tasks = [first_images(task, most) for task in as_tasks(TASKS)]
        config = config_for("embedded", seed=seed, steps=given.steps, batch_size=given.batch_size)
        self.session = EditSession("embedded", self.tasks, config=config, device="cpu")
        self.vectors = {task.name: self.session.learn(task) for task in self.tasks}
        self.images = {kind: given.images or count for kind, count in IMAGES.items()}
        base = self.session.base
        self.files = [
            vector.apply(base).save(folder / name) for name, vector in self.vectors.items()
        ]
        self.alone = {task.name: self._score(self.vectors[task.name], task) for task in self.tasks}
        self.rows: dict[str, dict[str, float]] = {}

    def _score(self, vector: TaskVector, task, split: str = "test") -> float:
        return float(self.session.measure(vector, split, [task]).scores[task.name]["acc1"])

    def add(self, name: str, vectors, seconds: float, size: float = 1.0) -> None:
        """Record a merge: one vector for all tasks, or one for each, and models' worth of bytes."""
        scores = {
            task.name: self._score(
                vectors[task.name] if isinstance(vectors, dict) else vectors, task
            )
            for task in self.tasks
        }
        shares = [scores[task] / self.alone[task] for task in scores]
        self.rows[name] = {
            "accuracy": 100 * statistics.mean(scores.values()),
            "normalized": 100 * statistics.mean(shares),
            "seconds": seconds,
            "models": size,
        }
        print(f"{name:22}", *(f"{value:8.2f}" for value in self.rows[name].values()), flush=True)

    def choose(self, vector: TaskVector) -> TaskVector:
        """Return a vector times the alpha with the best mean validation accuracy."""
        trial = self.session.trial({"": vector}, Goal(even_weights(self.tasks)), self.tasks)
        return vector * grid(trial.measurements, [(alpha,) for alpha in ALPHAS]).alpha

    def _statistics(self, name: str) -> list[dict[str, Checkpoint]] | None:
        """Make the statistics that a method needs."""
        if name == "regmean_plus_plus":
            made = collect_layer_by_layer(
                self.files, self.tasks, images=self.images["layers"], device="cpu"
            )
            return [{"gram": gram} for gram in made]
        kinds = METHODS[name].statistics
        given = [
            {kind: collect(file, task, kind, images=self.images[kind], device="cpu")}
            for file, task in zip(self.files, self.tasks, strict=True)
            for kind in kinds
        ]
        return given or None

    def merged(self, name: str) -> None:
        """Merge by a method, with its statistics and its alpha."""
        began, base = time.monotonic(), self.session.base
        given = self._statistics(name)
        method = METHODS["regmean" if name == "regmean_plus_plus" else name]
        needed = {"base": base} if method.space == "delta" else {}
        state = merge(self.files, method, statistics=given, **needed).state_dict()
        seconds = time.monotonic() - began
        vector = TaskVector(base, state)
        self.add(name, self.choose(vector) if method.space == "delta" else vector, seconds)

    def descended(self, loss: str, per: str, steps: int) -> None:
        """Find coefficients by gradient."""
        began = time.monotonic()
        options = Descent(loss, per, "train", steps, 0.01, self.session.config.seed)
        vectors, _ = search_by_gradient(self.session, self.vectors, self.tasks, options)
        seconds = time.monotonic() - began
        self.add(f"add, {loss}, per {per}", weighted_sum(vectors, (1.0,) * len(vectors)), seconds)

    def localized(self) -> None:
        """Learn a mask for each task, and stitch what is left of the vectors."""
        began, base = time.monotonic(), self.session.base
        sparse = [
            localize(self.vectors[task.name], task, seed=self.session.config.seed, device="cpu")
            for task in self.tasks
        ]
        models = [vector.apply(base) for vector in sparse]
        state = merge(models, "localize_and_stitch", base=base, density=1.0).state_dict()
        vector, seconds = TaskVector(base, state), time.monotonic() - began
        self.add("learned masks, stitched", self.choose(vector), seconds)

    def packed(self, method: str, folder: Path) -> None:
        """Pack all models into one file, and open each task's."""
        began = time.monotonic()
        models = dict(zip(self.vectors, self.files, strict=True))
        file = pack(models, self.session.base, folder / f"{method}.safetensors", method=method)
        seconds = time.monotonic() - began
        own = {name: self.session.vector(open_checkpoint(f"{file}:{name}")) for name in models}
        one = sum(spec.nbytes for spec in self.session.base.specs.values())
        self.add(f"pack, {method}", own, seconds, file.stat().st_size / one)


def run(seed: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the rows of one seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(seed, arguments, folder)
        nothing = weighted_sum(bench.vectors, (0.0,) * len(bench.vectors))
        bench.add("the base", nothing, 0.0)
        bench.add("fine-tuned, each", dict(bench.vectors), 0.0, len(TASKS))
        for method in (*METHODS, "regmean_plus_plus"):
            if method not in SKIPPED:
                bench.merged(method)
        for loss in ("entropy", "loss"):
            for per in ("task", "tensor", "direction"):
                bench.descended(loss, per, arguments.search_steps)
        bench.localized()
        for method in ("emr", "tall"):
            bench.packed(method, folder)
    return bench.rows


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values)}


def draw(rows: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draw normalized accuracy by method, with the range over seeds."""
    from matplotlib import pyplot

    ordered = sorted(rows, key=lambda name: rows[name]["normalized"]["mean"])
    values = [rows[name]["normalized"] for name in ordered]
    errors = [[v["mean"] - v["min"] for v in values], [v["max"] - v["mean"] for v in values]]
    _, axes = pyplot.subplots(figsize=(7, 0.28 * len(ordered) + 1))
    axes.errorbar([v["mean"] for v in values], ordered, xerr=errors, fmt="o", color="#4878a8")
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("normalized accuracy on eight tasks (%)")
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=120)


def write(seeds: list[dict[str, dict[str, float]]], arguments: argparse.Namespace) -> None:
    """Write what the seeds so far have shown, and how it was made."""
    rows = {
        name: {key: spread([rows[name][key] for rows in seeds]) for key in row}
        for name, row in seeds[0].items()
    }
    asked = {key: value for key, value in vars(arguments).items() if key != "out"}
    record = {"tasks": TASKS, **asked, "seeds": len(seeds), "rows": rows, "versions": versions()}
    (arguments.out / "merging.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, arguments.out / "merging.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80, help="steps of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=64, help="images of such a step")
    parser.add_argument("--search-steps", type=int, default=60, help="steps along a gradient")
    parser.add_argument("--images", type=int, help="images of a statistic")
    parser.add_argument("--validation", type=int, default=96, help="validation images of each task")
    parser.add_argument("--test", type=int, default=200, help="test images of each task")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, dict[str, float]]] = []
    for seed in range(arguments.seeds):
        done.append(run(seed, arguments))
        write(done, arguments)


if __name__ == "__main__":
    main()
