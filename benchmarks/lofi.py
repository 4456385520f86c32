"""Compare lo-fi with communication in every step and with a single node; time communication.

    pip install '.[demo]' && python benchmarks/lofi.py

Each seed and task is a whole `weightops lofi --compare` under torchrun, four nodes of one process
each on this machine, on equally many samples; accuracies are of the test split, as it is and under
five corruptions at five severities. Results go to results/lofi.json after every run, and the
picture to results/lofi.png. With --links (Linux, root) the same steps are also timed in a network
namespace whose loopback is throttled; all four nodes share it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
NODES = 4
COLUMNS = ("in_distribution", "under_shift", "effective_robustness")
METHODS = {
    "base": "#9aa1ab",
    "baseline": "#22252b",
    "single node": "#2f6db3",
    "average": "#d1495b",
    "EMA": "#c08a2e",
    "ensemble": "#5b8a57",
}
LABELS = {"base": "zero-shot", "baseline": "communicating baseline", "average": "lo-fi"}


def run(arguments: list[str], prefix: list[str] | None = None, node_size: int = 1) -> dict:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(NODES)]
    command = [
        *(prefix or []),
        *torchrun,
        "-m",
        "weightops",
        "lofi",
        "--node-size",
        str(node_size),
        "--json",
        *arguments,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(out.stdout)


def by_method(models: dict) -> dict[str, dict[str, float]]:
    """Accuracies in points; the nodes' as their mean."""
    alone = [row for name, row in models.items() if name.endswith(" alone")]
    mean = {c: statistics.mean(row[c] for row in alone) for c in COLUMNS}
    ema = next(row for name, row in models.items() if name.startswith("EMA"))
    rows = {
        "single node": mean,
        "EMA": ema,
        **{name: models[name] for name in ("base", "baseline", "average", "ensemble")},
    }
    return {name: {c: 100 * rows[name][c] for c in COLUMNS} for name in METHODS}


def spread(runs: list[dict]) -> dict:
    """Mean, least and most over seeds."""
    return {
        name: {
            c: {
                how: round(function(r["methods"][name][c] for r in runs), 2)
                for how, function in (("mean", statistics.mean), ("min", min), ("max", max))
            }
            for c in COLUMNS
        }
        for name in METHODS
    }


def claims(runs: list[dict]) -> dict:
    """Differences of lo-fi, in points, mean over seeds and range."""
    found = {}
    for other in ("baseline", "single node"):
        for c in COLUMNS[:2]:
            values = [r["methods"]["average"][c] - r["methods"][other][c] for r in runs]
            found[f"lo-fi minus {other}, {c}"] = {
                "mean": round(statistics.mean(values), 2),
                "min": round(min(values), 2),
                "max": round(max(values), 2),
            }
    return found


def cost(runs: list[dict]) -> dict:
    """Return seconds a step, and those in communication; lo-fi's one exchange is spread out."""
    result = {}
    for name in ("baseline", "lo-fi"):
        steps = [r["steps"] for r in runs]
        for what in ("seconds", "communication_seconds"):
            values = [r["cost"][name][what] / s for r, s in zip(runs, steps, strict=True)]
            result[f"{name}, {what} a step"] = round(statistics.mean(values), 4)
    return result


def calculation(steps: int = 1000) -> list[dict]:
    """Calculate, not measure: a ring all-reduce sends 2 (N - 1) / N times the size, in float32.

    Nothing overlaps.
    """
    rows = []
    for parameters in (150e6, 7e9):
        for bits in (10e9, 1e9, 100e6):
            once = 2 * (NODES - 1) / NODES * 4 * parameters * 8 / bits
            rows.append(
                {
                    "parameters": parameters,
                    "bits_per_second": bits,
                    "nodes": NODES,
                    "steps": steps,
                    "baseline_seconds": round(once * steps, 2),
                    "lofi_seconds": round(once, 2),
                }
            )
    return rows


def throttled(steps: int = 10) -> list[dict]:
    """Return seconds in communication over a loopback of a given rate, in its own namespace."""
    rows = []
    for rate in ("10gbit", "1gbit", "100mbit"):
        limit = f"tc qdisc add dev lo root tbf rate {rate} burst 1mb latency 400ms"
        shape = f'ip link set lo up && {limit} && exec "$@"'
        row = {"loopback": rate, "steps": steps}
        for name, size in (("baseline", NODES), ("lo-fi", 1)):
            with tempfile.TemporaryDirectory() as folder:
                options = [
                    "--task",
                    "digits",
                    "--steps",
                    str(steps),
                    "--out",
                    str(Path(folder, "out")),
                ]
                found = run(options, ["unshare", "-n", "sh", "-c", shape, "sh"], size)
            row[f"{name}_communication_seconds"] = round(found["communication_seconds"], 3)
        rows.append(row)
        print(row, flush=True)
    return rows


def draw(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    tasks = list(results["tasks"])
    figure = Figure(figsize=(5.2 * len(tasks), 4.2), dpi=200, layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for name, color in METHODS.items():
            points = [r["methods"][name] for r in results["tasks"][task]["runs"]]
            if name == "base":
                continue
            xs, ys = ([p[c] for p in points] for c in COLUMNS[:2])
            axes.scatter(xs, ys, s=22, color=color, alpha=0.45, linewidths=0)
            axes.scatter(
                statistics.mean(xs),
                statistics.mean(ys),
                s=90,
                color=color,
                label=LABELS.get(name, name),
                edgecolors="white",
            )
        axes.set_title(task, loc="left", fontsize=11)
        axes.set_xlabel("accuracy in distribution (%)")
        axes.set_ylabel("mean accuracy under shift (%)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5, loc="best")
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default="digits,mnist")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the runs that results/lofi.json lacks"
    )
    parser.add_argument("--links", action="store_true")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    results: dict = {"nodes": NODES, "tasks": {}, "calculation": calculation()}
    if args.resume:
        results |= json.loads((RESULTS / "lofi.json").read_text())
    for task in args.tasks.split(","):
        for seed in range(args.seeds):
            if any(r["seed"] == seed for r in results["tasks"].get(task, {"runs": []})["runs"]):
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = run(
                    [
                        "--compare",
                        "--task",
                        task,
                        "--seed",
                        str(seed),
                        "--out",
                        str(Path(folder, "out")),
                    ]
                )
            part = results["tasks"].setdefault(task, {"runs": []})
            part["runs"].append(
                {
                    "seed": seed,
                    "steps": found["config"]["steps"],
                    "batch_size": found["config"]["batch_size"],
                    "methods": by_method(found["models"]),
                    "cost": found["cost"],
                    "left_out": found["average"]["left_out"],
                }
            )
            runs = part["runs"]
            part |= {"spread": spread(runs), "claims": claims(runs), "cost": cost(runs)}
            print(task, seed, json.dumps(part["claims"]), flush=True)
            (RESULTS / "lofi.json").write_text(json.dumps(results, indent=2) + "\n")
            draw(results, RESULTS / "lofi.png")
    if args.links:
        results["throttled_loopback"] = throttled()
        (RESULTS / "lofi.json").write_text(json.dumps(results, indent=2) + "\n")
    for task, part in results["tasks"].items():
        print(f"{task:24} " + " ".join(f"{c:>30}" for c in COLUMNS))
        for name, row in part["spread"].items():
            print(
                f"{name:24} "
                + " ".join(
                    "{mean:14.2f} ({min:.2f} to {max:.2f})".format(**row[c]) for c in COLUMNS
                )
            )
        print(json.dumps(part["cost"], indent=2))


if __name__ == "__main__":
    main()
