"""Merge eight fine-tuned models of the embedded one by all methods: accuracy, time and bytes.

    pip install '.[demo,plot]' && python benchmarks/merging.py

Each seed fine-tunes a model on each task once. Coefficients and options are chosen on validation
images, statistics are of training images without labels but for `fisher` and `loss`; the numbers
are of the test splits. Normalized accuracy is that over the fine-tuned model's. Seconds are those
of the merge and of what it needs, statistics included, without the choice of alpha.
results/merging.json and results/merging.png are written after the last seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from weightops import TaskVector, collect, config_for, merge, open_checkpoint, pack
from weightops.merging.methods.table import METHODS
from weightops.reports.outcome import versions
from weightops.search.descent import Descent, descend, scaled
from weightops.search.goal import Goal
from weightops.search.session import EditSession, weighted_sum
from weightops.search.strategies import ALPHAS, grid
from weightops.tasks.table import as_tasks
from weightops.workflows.base import even_weights

RESULTS = Path(__file__).parent / "results"
TASKS = ("mnist", "digits", "shapes", "colors", "textures", "counting", "letters", "fonts")
SKIPPED = ("passthrough", "ema", "slerp", "nuslerp", "sce")
"""Methods for other things than several tasks of one base."""
IMAGES = {"gram": 256, "fisher": 64}


class Bench:
    """The models of one seed, and the scores of what is made of them."""

    def __init__(self, seed: int, steps: int | None, folder: Path, images: int | None) -> None:
        self.tasks = as_tasks(TASKS)
        config = config_for("embedded", seed=seed, **({"steps": steps} if steps else {}))
        self.session = EditSession("embedded", self.tasks, config=config, device="cpu")
        self.vectors = {task.name: self.session.learn(task) for task in self.tasks}
        self.images = {kind: images or count for kind, count in IMAGES.items()}
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
        choice = grid(trial.measurements, [(alpha,) for alpha in ALPHAS[::2]])
        return vector * choice.alpha

    def merged(self, name: str) -> None:
        """Merge by a method, with its statistics and its alpha."""
        method, base = METHODS[name], self.session.base
        began = time.monotonic()
        given = [
            {
                kind: collect(file, task, kind, images=self.images[kind], device="cpu")
                for kind in method.statistics
            }
            for file, task in zip(self.files, self.tasks, strict=True)
        ]
        needed = {"base": base} if method.space == "delta" else {}
        merged = merge(self.files, name, statistics=given if method.statistics else None, **needed)
        state = merged.state_dict()
        seconds = time.monotonic() - began
        vector = TaskVector(base, state)
        self.add(name, self.choose(vector) if method.space == "delta" else vector, seconds)

    def descended(self, loss: str, per: str, steps: int) -> None:
        """Find coefficients by gradient."""
        began = time.monotonic()
        options = Descent(loss, per, "train", steps, 0.01, self.session.config.seed)
        found = descend(self.session, self.vectors, self.tasks, options)
        vectors = scaled(self.vectors, found)
        seconds = time.monotonic() - began
        self.add(f"add, {loss}, per {per}", weighted_sum(vectors, (1.0,) * len(vectors)), seconds)

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
        bench = Bench(seed, arguments.steps, folder, arguments.images)
        nothing = weighted_sum(bench.vectors, (0.0,) * len(bench.vectors))
        bench.add("the base", nothing, 0.0)
        bench.add("fine-tuned, each", dict(bench.vectors), 0.0, len(TASKS))
        for method in METHODS:
            if method not in SKIPPED:
                bench.merged(method)
        for loss in ("entropy", "loss"):
            for per in ("task", "tensor"):
                bench.descended(loss, per, arguments.search_steps)
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
    axes.barh(ordered, [v["mean"] for v in values], xerr=errors, color="#4878a8")
    axes.set_xlabel("normalized accuracy on eight tasks (%)")
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of fine-tuning; default: the model's own")
    parser.add_argument("--search-steps", type=int, default=200)
    parser.add_argument("--images", type=int, help="images of a statistic")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    seeds = [run(seed, arguments) for seed in range(arguments.seeds)]
    rows = {
        name: {key: spread([rows[name][key] for rows in seeds]) for key in row}
        for name, row in seeds[0].items()
    }
    record = {"tasks": TASKS, "seeds": arguments.seeds, "rows": rows, "versions": versions()}
    (arguments.out / "merging.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, arguments.out / "merging.png")


if __name__ == "__main__":
    main()
