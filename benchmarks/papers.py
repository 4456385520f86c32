"""Test the main claims of task arithmetic and PAINT on the embedded model, with several seeds.

    pip install '.[demo]' && python benchmarks/papers.py

Each seed fine-tunes all models. Coefficients are chosen on validation data; the numbers are of the
test splits, in percent or points. A claim holds if it holds for the mean over the seeds.
results/papers.json is written after each seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from weightops import open_checkpoint
from weightops.errors import NothingSatisfiesError
from weightops.reports.outcome import versions
from weightops.search.goal import difference
from weightops.search.session import EditSession, Measured
from weightops.search.strategies import SearchOptions
from weightops.tasks.analogy_example import ANALOGY, STRIPED
from weightops.tasks.derived import neutral, typographic
from weightops.tasks.table import find_task
from weightops.training.config import config_for
from weightops.workflows.add import Addition
from weightops.workflows.analogy import Analogy
from weightops.workflows.base import Workflow, even_weights
from weightops.workflows.negate import Negation
from weightops.workflows.patch import Patch
from weightops.workflows.result import EditResult, confirm

RESULTS = Path(__file__).parent / "results"
MNIST = find_task("mnist")
SUPPORTED = ("shapes", "textures", "counting", "words")
RACE = SearchOptions(strategy="race")
TENTHS = SearchOptions(tuple(0.1 * i for i in range(11)), "race")  # for several coefficients

CLAIMS = {
    "patching gains >= 25 points at <= 1 point of supported loss": lambda r: (
        r["patch gain"] >= 25 and r["patch supported loss"] <= 1
    ),
    "negation forgets more than a random vector does": lambda r: (
        r["negated target"] < r["random target"] - 5
    ),
    "negation keeps >= 95 % of the control accuracy": lambda r: r["negated control share"] >= 95,
    "gradient ascent destroys the control tasks": lambda r: (
        r["ascent control share"] < r["negated control share"] - 10
    ),
    "pairs keep >= 95 % normalized accuracy": lambda r: r["pairs normalized"] >= 95,
    "an analogy beats zero-shot": lambda r: r["analogy"] > r["analogy zero-shot"],
    "an analogy beats the style alone and the classes alone": lambda r: (
        r["analogy"] > max(r["analogy only B"], r["analogy only C"])
    ),
    "joint patching >= sequential, within noise": lambda r: (
        r["joint - sequential"] >= -2 * r["strategy noise"]
    ),
    "sequential patching >= parallel, within noise": lambda r: (
        r["sequential - parallel"] >= -2 * r["strategy noise"]
    ),
    "a typographic patch heals >= 20 points": lambda r: r["attack gain"] >= 20,
    "more than it heals under neutral words": lambda r: r["attack gain"] > r["neutral gain"],
    "vectors of unlike tasks are nearly orthogonal (cosine < 0.1)": lambda r: (
        r["cosine unlike"] < 0.1
    ),
    "vectors of kin are not (mnist, digits: twice the unlike)": lambda r: (
        r["cosine kin"] > 2 * r["cosine unlike"]
    ),
}


class Remembering(EditSession):
    """A session that fine-tunes the base on each task only once."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.learned = {}

    def learn(self, task, *, name=None, start=None, **options):
        key = name or task.name
        if start is not None:
            return super().learn(task, name=name, start=start, **options)
        if key not in self.learned:
            self.learned[key] = super().learn(task, name=name, **options)
        return self.learned[key]


def run(
    session: EditSession, workflow: Workflow, also: tuple = ()
) -> tuple[EditResult, dict[str, Measured]]:
    session.tasks = list(workflow.tasks)
    result = workflow.find(session)
    session.tasks += also
    return result, confirm(session, result, workflow.word)


def mean(measured: Measured, tasks) -> float:
    return 100 * statistics.mean(measured.scores[t.name]["acc1"] for t in tasks)


def patching(session: EditSession) -> dict[str, float]:
    workflow = Patch.from_call(MNIST, search=RACE)
    result, test = run(session, workflow)
    return {
        "patch zero-shot": mean(test["base"], [MNIST]),
        "patch fine-tuned": mean(test["finetuned"], [MNIST]),
        "patched": mean(test["patched"], [MNIST]),
        "patch alpha": result.alpha[0],
        "patch gain": mean(test["patched"], [MNIST]) - mean(test["base"], [MNIST]),
        "patch supported loss": mean(test["base"], workflow.supported)
        - mean(test["patched"], workflow.supported),
    }


def negation(session: EditSession) -> dict[str, float]:
    workflow = Negation.from_call(MNIST, baselines=True, training=session.config, search=RACE)
    result, test = run(session, workflow)
    control = mean(test["base"], workflow.control)
    row = {"negated zero-shot": mean(test["base"], [MNIST]), "negation alpha": result.alpha[0]}
    for which, word in (("edited", "negated"), ("random", "random"), ("ascent", "ascent")):
        if which in test:  # gradient ascent may have diverged
            row[f"{word} target"] = mean(test[which], [MNIST])
            row[f"{word} control share"] = 100 * mean(test[which], workflow.control) / control
    return row


def addition(session: EditSession) -> dict[str, float]:
    workflow = Addition.from_call(["mnist", "digits", "letters"], pairs=True, search=RACE)
    result, test = run(session, workflow)
    cosines, subsets = result.more["cosines"], result.more["subsets"]
    shares = [
        100 * test["edited"].scores[t]["acc1"] / test["finetuned"].scores[t]["acc1"]
        for t in test["edited"].scores
    ]
    return {
        **{f"pair {' + '.join(g['tasks'])}": 100 * g["normalized"] for g in subsets},
        "pairs normalized": statistics.mean(100 * g["normalized"] for g in subsets),
        "all three normalized": statistics.mean(shares),
        "cosine kin": cosines["mnist, digits"],
        "cosine unlike": statistics.mean([cosines["mnist, letters"], cosines["digits, letters"]]),
    }


def analogies(session: EditSession) -> dict[str, float]:
    workflow = Analogy.from_call(*ANALOGY, supervised=True, search=TENTHS)
    _, test = run(session, workflow)
    names = {"base": "analogy zero-shot", "edited": "analogy", "finetuned": "analogy supervised"}
    return {
        names.get(which, f"analogy {which}"): mean(m, [workflow.target])
        for which, m in test.items()
    }


def strategies(session: EditSession) -> dict[str, float]:
    tasks = [MNIST, STRIPED]
    results = {}
    for strategy in ("joint", "sequential", "parallel"):
        workflow = Patch.from_call(tasks, supported=SUPPORTED, strategy=strategy, search=TENTHS)
        if strategy == "joint":  # each task gets as many steps as in the other strategies
            joint = workflow.learned[0]
            session.learn(joint, config=replace(session.config, steps=2 * session.config.steps))
        results[strategy] = run(session, workflow)[1]
    hits = {strategy: test["patched"].hits for strategy, test in results.items()}
    gaps = {
        f"{a} - {b}": difference(hits[a], hits[b], even_weights(tasks))
        for a, b in (("joint", "sequential"), ("sequential", "parallel"))
    }
    supported = [find_task(t) for t in SUPPORTED]
    return {
        "strategies zero-shot": mean(results["joint"]["base"], tasks),
        **{strategy: mean(test["patched"], tasks) for strategy, test in results.items()},
        **{
            f"{strategy} supported loss": mean(test["base"], supported)
            - mean(test["patched"], supported)
            for strategy, test in results.items()
        },
        **{name: 100 * gap for name, (gap, _) in gaps.items()},
        "strategy noise": 100 * max(error for _, error in gaps.values()),
    }


def attack(session: EditSession) -> dict[str, float]:
    attacked, harmless = typographic(MNIST), neutral(MNIST)
    supported = ["shapes", "textures", "letters", "words"]
    workflow = Patch.from_call(attacked, supported=supported, search=RACE)
    result, test = run(session, workflow, (harmless, MNIST))
    finetuned = test["finetuned"]
    row = {"attack alpha": result.alpha[0], "attack fine-tuned": mean(finetuned, [attacked])}
    row |= {
        f"{name} fine-tuned under attack": 100 * finetuned.scores[name]["acc1"]
        for name in ("letters", "words")
    }
    for word, task in (("attack", attacked), ("neutral", harmless), ("no words", MNIST)):
        before, after = mean(test["base"], [task]), mean(test["patched"], [task])
        row |= {f"{word} before": before, f"{word} after": after, f"{word} gain": after - before}
    return row


def summarize(rows: list[dict[str, float]], config: dict) -> dict:
    names = dict.fromkeys(name for row in rows for name in row if name != "seed")
    spread = {}
    for name in names:
        values = [row[name] for row in rows if name in row]
        spread[name] = {
            "mean": round(statistics.mean(values), 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
            "seeds": len(values),
        }
    means = {name: value["mean"] for name, value in spread.items()}
    claims = {}
    for claim, holds in CLAIMS.items():
        held = []
        for row in rows:
            with suppress(KeyError):  # a seed may lack a measurement
                held.append(bool(holds(row)))
        if held:
            claims[claim] = {
                "holds": bool(holds(means)),
                "seeds in which it does": sum(held),
                "of": len(held),
            }
    return {
        "seeds": len(rows),
        "claims": claims,
        "spread": spread,
        "rows": rows,
        "training": config,
        "versions": versions(),
    }


def measure(seed: int, steps: int, threads: int | None) -> dict[str, float]:
    """Return the numbers of all experiments with one seed."""
    if threads:
        torch.set_num_threads(threads)
    session = Remembering(
        "embedded", [], config=config_for(open_checkpoint("embedded"), seed=seed, steps=steps)
    )
    row: dict[str, float] = {"seed": seed}
    for part in (patching, negation, addition, analogies, attack, strategies):
        began = time.monotonic()
        try:
            row |= part(session)
        except NothingSatisfiesError as error:
            print(f"{part.__name__}, seed {seed}: {error}", flush=True)
        print(
            f"seed {seed}, {part.__name__}: {time.monotonic() - began:.0f} s",
            json.dumps(row),
            flush=True,
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=120, help="steps of each fine-tuning; more change little"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds at a time; if several, each uses one core"
    )
    parser.add_argument("-o", "--out", type=Path, default=RESULTS / "papers.json")
    args = parser.parse_args()
    config = asdict(config_for(open_checkpoint("embedded"), steps=args.steps))
    rows = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        threads = 1 if args.jobs > 1 else None
        for done in as_completed(
            [pool.submit(measure, seed, args.steps, threads) for seed in range(args.seeds)]
        ):
            rows.append(done.result())
            rows.sort(key=lambda row: row["seed"])
            result = summarize(rows, config)
            args.out.parent.mkdir(exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result["spread"].items():
        print(f"{name:32} {value['mean']:8.2f}   ({value['min']:.2f} to {value['max']:.2f})")
    for claim, verdict in result["claims"].items():
        print(f"{'holds' if verdict['holds'] else 'does not hold':14} {claim} {verdict}")


if __name__ == "__main__":
    main()
