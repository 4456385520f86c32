"""Measure fine-tuning, evaluation and the patch side by side with what they are compared with.

    pip install '.[demo]' 'numpy<2.4' scikit-learn && pip install --no-deps clip-benchmark
    python benchmarks/images.py fit search evaluate
    python benchmarks/images.py patch --old FOLDER  # a checkout of the version to compare with

fit: steps of fine-tuning, against a plain loop of open_clip in float32 on prepared pictures.
search: steps of a search by gradient for coefficients of eight task vectors, with 16 pictures for
each, against steps of fine-tuning with as many pictures in all; both are ours.
evaluate: against CLIP_benchmark's `zeroshot_classification.evaluate` in float32 on prepared
pictures; both are whole calls. patch: `weightops patch --task mnist` of this and another version.

The two take turns. Seconds are medians over the rounds, of the clock and of the processors, which
others on the machine disturb less; ratios are of these. The model is the embedded one, or with
--model an architecture of open_clip with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from weightops import ImageModel, TaskVector, config_for, evaluate, fit, open_checkpoint
from weightops.evaluation.pixels import prepare_all
from weightops.reports.outcome import versions
from weightops.search.descent import Descent, WeightedSum, follow
from weightops.search.session import EditSession
from weightops.tasks.table import find_task
from weightops.tasks.task import Images, ImageSubset
from weightops.training.learners import ImageLearner

RESULTS = Path(__file__).parent / "results"
BATCH = 128
TASKS = BATCH // 16


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of the clock and of the processors, children included."""

    def now() -> tuple[float, float]:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in usages)

    before = now()
    call()
    return tuple(b - a for a, b in zip(before, now(), strict=True))


def compared(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict:
    """Return the medians of both, which take turns after one turn that isn't counted."""
    seconds = {"ours": [], "theirs": []}
    for round_ in range(rounds + 1):
        for name, call in (("ours", ours), ("theirs", theirs)):
            taken = timed(call)
            if round_:
                seconds[name].append(taken)
    row = {}
    for i, clock in enumerate(("seconds", "processor_seconds")):
        medians = {name: statistics.median(t[i] for t in taken) for name, taken in seconds.items()}
        row[clock] = {name: round(value, 3) for name, value in medians.items()}
        row[clock]["theirs_over_ours"] = round(medians["theirs"] / medians["ours"], 2)
    return row


def first(images: Images, count: int) -> ImageSubset:
    """Return the first images of a split."""
    return ImageSubset(images, np.arange(count), images.labels[:count])


class Pair:
    """The model that is measured, as ours and as open_clip builds it, with prepared pictures."""

    def __init__(self, name: str, task: str, images: int, folder: Path) -> None:
        if name == "embedded":
            source = open_checkpoint(name)
        else:
            torch.manual_seed(0)
            source = open_checkpoint(open_clip.create_model(name))
            config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
            source.save(folder / "made" / "open_clip_model.safetensors")
            (folder / "made" / "open_clip_config.json").write_text(json.dumps(config))
            source = open_checkpoint(folder / "made")
        self.path = source.save(folder / "clip")
        self.ours = ImageModel.open(self.path, "cpu")
        self.theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{self.path}")
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{self.path}")
        whole = find_task(task)
        self.task = replace(
            whole, load=lambda split: first(whole.load(split), images), name=f"{task}, {images}"
        )

    def prepared(self, split: str) -> TensorDataset:
        """Return the pictures as both models see them."""
        pixels = self.ours.pixels(self.task, split)
        return TensorDataset(
            pixels.batch(torch.arange(len(pixels)).numpy()), pixels.labels.to(torch.int64)
        )


def measure_fit(pair: Pair, steps: int, rounds: int) -> dict:
    """Compare steps of fine-tuning with a plain loop."""
    config = config_for(pair.ours.base, steps=steps, batch_size=BATCH, shift=0.0)
    head = pair.ours.zero_shot_head(pair.task)
    data, encoder = pair.prepared("train"), pair.theirs.visual

    def theirs() -> None:
        pair.theirs.train()
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=config.lr, weight_decay=0.1)
        loader = DataLoader(data, BATCH, shuffle=True, drop_last=True)
        done = 0
        while done < steps:
            for images, labels in loader:
                features = F.normalize(encoder(images), dim=-1)
                loss = F.cross_entropy(features @ head.T, labels)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(encoder.parameters(), config.max_grad_norm)
                optimizer.step()
                done += 1
                if done == steps:
                    return

    row = compared(lambda: fit(ImageLearner(pair.ours, pair.task), config), theirs, rounds)
    return {"steps": steps, "batch": BATCH, **row}


def measure_search(pair: Pair, steps: int, rounds: int) -> dict:
    """Compare steps of a search by gradient with steps of fine-tuning."""
    tasks = [replace(pair.task, name=f"{pair.task.name}, {i}") for i in range(TASKS)]
    session = EditSession(pair.path, tasks, device="cpu")
    torch.manual_seed(0)
    encoder = {n: t for n, t in pair.ours.base.items() if n.startswith("visual.")}
    vectors = {}
    for task in tasks:
        moved = {n: t * (1 + 0.1 * torch.randn(t.shape)) for n, t in encoder.items()}
        vectors[task.name] = TaskVector(pair.ours.base, {**pair.ours.base, **moved})
    changes = WeightedSum(session, vectors, "train", "tensor")
    prepare_all([session.model.pixels(task, "train") for task in tasks])
    options = Descent("entropy", "tensor", "train", steps, lr=0.001, seed=0)
    config = config_for(pair.ours.base, steps=steps, batch_size=BATCH, shift=0.0)
    row = compared(
        lambda: follow(session, changes, tasks, options),
        lambda: fit(ImageLearner(pair.ours, pair.task), config),
        rounds,
    )
    return {"steps": steps, "tasks": TASKS, "batch": BATCH, **row}


def measure_evaluation(pair: Pair, rounds: int) -> dict:
    """Compare a whole evaluation with CLIP_benchmark's."""
    from clip_benchmark.metrics import zeroshot_classification

    templates = [template.replace("{}", "{c}") for template in pair.task.templates]
    loader = DataLoader(pair.prepared("test"), 256)
    loader.dataset.classes = pair.task.classes  # which CLIP_benchmark asks for
    found = {}

    def ours() -> None:
        found["ours"] = evaluate(pair.ours, pair.task)[pair.task.name]["acc1"]

    def theirs() -> None:
        classes = list(pair.task.classes)
        found["theirs"] = zeroshot_classification.evaluate(
            pair.theirs.eval(), loader, pair.tokenizer, classes, templates, "cpu", amp=False
        )["acc1"]

    row = compared(ours, theirs, rounds)
    return {"images": len(loader.dataset), "acc1": found, **row}


def measure_patch(old: Path, seeds: int, steps: int | None) -> dict:
    """Compare the patch of this version with another's, seed by seed."""
    seconds, scores = [], []
    roots = {"theirs": old, "ours": Path(__file__).parents[1]}
    for seed in range(seeds):
        taken, score = {}, {}
        for name, root in roots.items():
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "out")
                options = ["--seed", str(seed), "-o", str(out), "--json"]
                options += ["--steps", str(steps)] if steps else []
                command = [sys.executable, "-m", "weightops", "patch", "--task", "mnist", *options]
                environment = {**os.environ, "PYTHONPATH": str(root.absolute())}
                run = lambda: subprocess.run(  # noqa: E731
                    command,  # noqa: B023
                    check=True,
                    stdout=subprocess.DEVNULL,
                    env=environment,  # noqa: B023
                    cwd=folder,
                )
                taken[name] = timed(run)
                tasks = json.loads((out / "summary.json").read_text())["tasks"]
                score[name] = {
                    "mnist": tasks["mnist"]["patched"]["acc1"],
                    "supported": statistics.mean(
                        t["patched"]["acc1"] for t in tasks.values() if t["role"] == "supported"
                    ),
                }
        seconds.append(taken)
        scores.append(score)
        print(f"seed {seed}", taken, score, flush=True)
    row = {
        clock: {
            name: round(statistics.median(taken[name][i] for taken in seconds), 2) for name in roots
        }
        for i, clock in enumerate(("seconds", "processor_seconds"))
    }
    for values in row.values():
        values["ours_over_theirs"] = round(values["ours"] / values["theirs"], 3)
    return {**row, "scores": scores}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=["fit", "search", "evaluate", "patch"])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--task", default="shapes")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, help="steps of fine-tuning")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--old", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=RESULTS / "images.json")
    args = parser.parse_args()
    if "patch" in args.what and args.old is None:
        parser.error("patch needs --old, a checkout of the version to compare with")
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        rows = {}
        if "patch" in args.what:
            rows["patch"] = measure_patch(args.old, args.seeds, args.steps)
        if {"fit", "search", "evaluate"} & {*args.what}:
            pair = Pair(args.model, args.task, args.images, Path(folder))
            about = {"model": args.model, "precision": pair.ours.precision}
            if "fit" in args.what:
                row = measure_fit(pair, args.steps or 4, args.rounds)
                rows[f"fit {args.model}"] = {**about, **row}
                print(row, flush=True)
            if "search" in args.what:
                row = measure_search(pair, args.steps or 4, args.rounds)
                rows[f"search {args.model}"] = {**about, **row}
                print(row, flush=True)
            if "evaluate" in args.what:
                row = measure_evaluation(pair, args.rounds)
                rows[f"evaluate {args.model}"] = {**about, **row}
    print(json.dumps(rows, indent=2))
    args.out.write_text(json.dumps({**found, **rows, "versions": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
