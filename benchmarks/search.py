"""Compare `race` with the full grid of 21 alphas: its choice, and the images that it measures.

    pip install '.[demo]' && python benchmarks/search.py

Task vectors are fine-tuned, and all alphas measured on all validation images once. Then `grid`
searches each goal on the recorded hits, and `race` does with the images in 20 orders. The gap is
between the scores of the two choices on all validation images; it is within the noise if it is at
most two standard errors of the paired difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from weightops import open_checkpoint
from weightops.reports.outcome import versions
from weightops.search.goal import Goal
from weightops.search.measurements import Measurements, image_count
from weightops.search.racing import race
from weightops.search.session import EditSession
from weightops.search.strategies import ALPHAS, grid
from weightops.tasks.table import as_tasks
from weightops.training.config import config_for
from weightops.workflows.base import even_weights

RESULTS = Path(__file__).parent / "results"
SUPPORTED = as_tasks(["shapes", "textures", "counting", "letters", "words"])


def goals(task) -> dict[str, tuple[Goal, float]]:
    """Name -> goal and the sign of its alphas."""
    kept = even_weights(SUPPORTED)
    return {
        "patch, <= 1 point": (Goal(even_weights([task]), kept, drop=0.01), 1),
        "patch, <= 3 points": (Goal(even_weights([task]), kept, drop=0.03), 1),
        "patch, mean rule": (
            Goal({**even_weights([task], 0.5), **even_weights(SUPPORTED, 0.5)}),
            1,
        ),
        "patch, each <= 2 points": (Goal(even_weights([task]), kept, drop=0.02, each=True), 1),
        "negate, control >= 95 %": (
            Goal(even_weights([task], -1.0), kept, ratio=0.95, drop=0.0),
            -1,
        ),
    }


def record(session: EditSession, vector, sign: float) -> dict:
    """Return every alpha's hits on all validation images."""
    trial = session.trial({"": vector}, Goal(even_weights(session.tasks)))
    grid(trial.measurements, [(sign * alpha + 0.0,) for alpha in ALPHAS])
    return trial.measurements.hits


def shuffled(hits: dict, seed: int) -> dict:
    orders = {
        t: np.random.default_rng([seed, i]).permutation(len(h))
        for i, (t, h) in enumerate(hits[0.0,].items())
    }
    return {
        alpha: {t: h[torch.from_numpy(orders[t])] for t, h in row.items()}
        for alpha, row in hits.items()
    }


def searched(hits: dict, goal: Goal, search, names) -> tuple[tuple[float], int]:
    """Return the choice of a search on recorded hits, and the number of images that it measures."""
    passes = 0

    def measure(alpha, start, stop):
        nonlocal passes
        images = {
            t: slice(image_count(sizes[t], start), image_count(sizes[t], stop)) for t in names
        }
        asked = {t: hits[alpha][t][images[t]] for t in names}
        passes += sum(map(len, asked.values()))
        return asked

    sizes = {t: len(hits[0.0,][t]) for t in names}
    measurements = Measurements(measure, goal, (0.0,), sizes)
    alpha = search(measurements, sorted(hits, key=lambda a: abs(a[0]))).alpha
    return (alpha,), passes


def compare(name: str, goal: Goal, recorded: dict, orders: int) -> dict:
    """Return a row of the table: grid and race on the images in several orders."""
    names = list({**goal.score, **goal.keep})
    full, cost = searched(recorded, goal, grid, names)
    same, shares, gaps = [], [], []
    for order in range(orders):
        hits = shuffled(recorded, order)
        chosen, passes = searched(hits, goal, race, names)
        gap, error = goal.gain(hits[full], hits[chosen])
        same.append(chosen == full)
        shares.append(passes / cost)
        gaps.append((gap, abs(gap) <= 2 * error + 1e-9))
    return {
        "goal": name,
        "grid alpha": full[0],
        "same alpha": round(statistics.mean(same), 3),
        "within noise": round(statistics.mean(within for _, within in gaps), 3),
        "mean gap, points": round(100 * statistics.mean(gap for gap, _ in gaps), 3),
        "passes, % of the grid's": round(100 * statistics.mean(shares), 1),
        "most": round(100 * max(shares), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120, help="steps of fine-tuning")
    parser.add_argument("--tasks", default="mnist,digits")
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("-o", "--out", type=Path, default=RESULTS / "search.json")
    args = parser.parse_args()
    rows = []
    config = config_for(open_checkpoint("embedded"), steps=args.steps)
    for task in as_tasks(args.tasks.split(",")):
        tested = [task, *SUPPORTED]
        session = EditSession("embedded", tested, config=config, precision="float32")
        vector = session.learn(task)
        recorded = {sign: record(session, vector, sign) for sign in (1.0, -1.0)}
        for name, (goal, sign) in goals(task).items():
            row = compare(name, goal, recorded[sign], args.orders)
            rows.append({"task": task.name, **row})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        mean = {
            key: round(statistics.mean(row[key] for row in rows), 3) for key in list(rows[0])[3:]
        }
        print("mean", mean)
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(
            json.dumps(
                {
                    "mean": mean,
                    "rows": rows,
                    "orders": args.orders,
                    "steps": args.steps,
                    "versions": versions(),
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
