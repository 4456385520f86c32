"""Measure what the README's patch gains and what it costs, with three seeds.

    pip install '.[demo]' && python benchmarks/patch.py

Each seed runs `weightops patch --task mnist` in a process. The accuracies are those of the chosen
alpha on test data; their mean and spread go to results/patch.json, and the first seed's picture to
results/frontier.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from weightops import TASKS, ImageModel, TaskVector, evaluate, open_checkpoint
from weightops.tasks.table import SUPPORTED

RESULTS = Path(__file__).parent / "results"


def run(task: str, seed: int, folder: Path) -> dict:
    command = [
        sys.executable,
        "-m",
        "weightops",
        "patch",
        "--task",
        task,
        "--seed",
        str(seed),
        "-o",
        str(folder),
        "--json",
    ]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def points(summary: dict, which: str) -> tuple[float, float]:
    """Return the accuracy on the patching task and the supported mean, in percent."""
    scores = {
        role: [100 * t[which]["acc1"] for t in summary["tasks"].values() if t["role"] == role]
        for role in ("patching", "supported")
    }
    return scores["patching"][0], statistics.mean(scores["supported"])


def seed_row(seed: int, summary: dict) -> dict:
    """Return the numbers of one seed."""
    (base, before), (full, lost), (patched, after) = (
        points(summary, which) for which in ("base", "finetuned", "patched")
    )
    return {
        "seed": seed,
        "alpha": summary["alpha"],
        "zero_shot": base,
        "finetuned": full,
        "patched": patched,
        "gain": patched - base,
        "supported_base": before,
        "supported_finetuned": lost,
        "supported_patched": after,
        "supported_drop": before - after,
        "seconds": summary["seconds"]["total"],
    }


def cost_of_a_step() -> dict[str, float]:
    """Return the milliseconds that it takes to set alpha, and to evaluate with pixels in memory."""
    image_model, base = ImageModel.open("embedded"), open_checkpoint("embedded").to(torch.float32)
    vector = TaskVector(base, {name: tensor + 1e-3 for name, tensor in base.state_dict().items()})
    tasks = [TASKS[name] for name in ("mnist", *SUPPORTED)]
    edits, passes = [], []
    for repeat in range(6):
        start = time.perf_counter()
        vector.apply_(image_model.module, 0.1 * repeat, base=base)
        edited = time.perf_counter()
        evaluate(image_model, tasks, split="validation")
        if repeat:
            edits.append(edited - start)
            passes.append(time.perf_counter() - edited)
    edit, evaluation = 1000 * statistics.median(edits), 1000 * statistics.median(passes)
    return {
        "edit_ms": round(edit, 1),
        "evaluation_ms": round(evaluation, 1),
        "edit_over_evaluation": round(edit / evaluation, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="mnist")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            summary = run(args.task, seed, Path(folder, "out"))
            if seed == 0:
                RESULTS.mkdir(exist_ok=True)
                shutil.copyfile(Path(folder, "out", "frontier.png"), RESULTS / "frontier.png")
        rows.append(seed_row(seed, summary))
        print("  ".join(f"{name} {value:.2f}" for name, value in rows[-1].items()), flush=True)
    spread = {
        name: {
            "mean": round(statistics.mean(r[name] for r in rows), 2),
            "min": round(min(r[name] for r in rows), 2),
            "max": round(max(r[name] for r in rows), 2),
        }
        for name in rows[0]
        if name != "seed"
    }
    for name, value in spread.items():
        print(f"{name:20} {value['mean']:7.2f}   ({value['min']:.2f} to {value['max']:.2f})")
    cost = cost_of_a_step()
    print("a step of alpha:", cost)
    tasks = {
        name: {
            which: round(100 * t[which]["acc1"], 1) for which in ("base", "finetuned", "patched")
        }
        for name, t in summary["tasks"].items()
    }
    result = {
        "task": args.task,
        "seeds": rows,
        "spread": spread,
        "tasks_of_last_seed": tasks,
        "step": cost,
        "versions": summary["versions"],
    }
    (RESULTS / "patch.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
