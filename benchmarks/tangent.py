"""Compare linearised fine-tuning with the ordinary one: addition, negation, disentanglement.

    pip install '.[demo,plot]' && python benchmarks/tangent.py

The claim of arXiv 2305.12827 on the embedded model: vectors of the linearised model disturb each
other less. Each seed fine-tunes on each task twice, with one recipe. Coefficients are chosen on
validation images, the numbers are of the first ``--test`` images of the test splits. The
disentanglement error is the mean over both coefficients from -2 to 2, on validation images.
results/tangent.json and results/tangent.png are written after each seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from merging import first_images, spread

from weightops import config_for
from weightops.reports.outcome import versions
from weightops.search.goal import Goal
from weightops.search.session import EditSession, weighted_sum
from weightops.search.strategies import ALPHAS, race
from weightops.tasks.table import as_tasks
from weightops.workflows.base import even_weights
from weightops.workflows.disentanglement import Disentanglement, disentanglement

RESULTS = Path(__file__).parent / "results"
TASKS = ("mnist", "letters", "counting")
"""Negation forgets the first, and keeps the others."""
GRID = (-2.0, -1.0, 0.0, 1.0, 2.0)
KINDS = {"ordinary": False, "linearised": True}


def accuracies(session: EditSession, vector, tasks) -> dict[str, float]:
    scores = session.measure(vector, "test", tasks).scores
    return {task.name: float(scores[task.name]["acc1"]) for task in tasks}


def mean(values) -> float:
    return 100 * statistics.mean(values)


def measure(kind: str, seed: int, given: argparse.Namespace) -> tuple[dict, Disentanglement]:
    """Return the numbers of one kind of fine-tuning, and the map of the first two tasks."""
    most = {"validation": given.validation, "test": given.test}
    tasks = [first_images(task, most) for task in as_tasks(TASKS)]
    config = config_for(
        "embedded",
        seed=seed,
        steps=given.steps,
        batch_size=given.batch_size,
        lr=given.lr if KINDS[kind] else None,
        linearized=KINDS[kind],
    )
    session = EditSession("embedded", tasks, config=config, device="cpu")
    began = time.monotonic()
    vectors = {task.name: session.learn(task) for task in tasks}
    seconds = (time.monotonic() - began) / len(tasks) / given.steps
    alone = {t.name: accuracies(session, vectors[t.name], [t])[t.name] for t in tasks}
    total = weighted_sum(vectors, (1.0,) * len(tasks))
    trial = session.trial({"": total}, Goal(even_weights(tasks)), tasks)
    chosen = race(trial.measurements, [(alpha,) for alpha in ALPHAS])
    added = accuracies(session, total * chosen.alpha, tasks)
    target, control = tasks[0], tasks[1:]
    goal = Goal({target.name: -1.0}, even_weights(control), ratio=0.95, drop=0.0, errors=0.0)
    trial = session.trial({"": -vectors[target.name]}, goal, tasks)
    forgot = race(trial.measurements, [(alpha,) for alpha in ALPHAS])
    negated = accuracies(session, -vectors[target.name] * forgot.alpha, tasks)
    base = accuracies(session, total * 0.0, tasks)
    pair = [vectors[task.name] for task in tasks[:2]]
    images = given.validation
    apart = disentanglement("embedded", pair, tasks[:2], alphas=GRID, images=images, device="cpu")
    numbers = {
        "seconds a step": seconds,
        "single": mean(alone.values()),
        "added": mean(added.values()),
        "added, normalized": mean(added[name] / alone[name] for name in added),
        "alpha": chosen.alpha,
        "negated target": 100 * negated[target.name],
        "control kept": mean(negated[t.name] / base[t.name] for t in control),
        "disentanglement error": apart.mean,
    }
    return numbers, apart


def draw(maps: dict[str, Disentanglement], path: Path) -> None:
    """Draw the disentanglement error of both kinds."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    top = max(float(apart.errors.max()) for apart in maps.values())
    for ax, (kind, apart) in zip(axes, maps.items(), strict=True):
        low, high = apart.alphas[0] - 0.5, apart.alphas[-1] + 0.5
        span = (low, high, low, high)
        image = ax.imshow(
            apart.errors.T, origin="lower", extent=span, cmap="Blues", vmin=0, vmax=top
        )
        ax.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="#d1495b")
        ax.set_title(f"{kind}: mean {apart.mean:.2f}")
        ax.set_xlabel(f"alpha of {apart.tasks[0]}")
        ax.set_ylabel(f"alpha of {apart.tasks[1]}")
    figure.colorbar(image, ax=axes, label="disentanglement error")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="steps of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=48, help="images of such a step")
    parser.add_argument("--lr", type=float, help="of the linearised model; default: the same")
    parser.add_argument("--validation", type=int, default=64, help="validation images of each task")
    parser.add_argument("--test", type=int, default=200, help="test images of each task")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    seen: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    maps: dict[str, Disentanglement] = {}
    for seed in range(given.seeds):
        for kind in KINDS:
            numbers, apart = measure(kind, seed, given)
            seen[kind].append(numbers)
            maps.setdefault(kind, apart)
            print(seed, kind, {key: round(value, 3) for key, value in numbers.items()}, flush=True)
        rows = {
            kind: {key: spread([each[key] for each in runs]) for key in runs[0]}
            for kind, runs in seen.items()
        }
        asked = {key: value for key, value in vars(given).items() if key != "out"}
        record = {"tasks": TASKS, **asked, "seeds": seed + 1, "rows": rows, "versions": versions()}
        (given.out / "tangent.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(maps, given.out / "tangent.png")


if __name__ == "__main__":
    main()
