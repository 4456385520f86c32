"""Test the main claims of task arithmetic and PAINT on the embedded model, with several seeds.

    pip install '.[demo]' && python benchmarks/papers.py

Each seed fine-tunes all models. Coefficients are chosen on validation data; the numbers are of the
test splits, in percent or points. A claim holds if its criterion does for the mean over the seeds.
results/papers.json is written after each seed, with every choice, the command and the commit.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from weightops import open_checkpoint
from weightops.errors import NothingSatisfiesError
from weightops.reports.outcome import versions
from weightops.search.goal import difference
from weightops.search.session import EditSession, Measured
from weightops.search.strategies import SearchOptions
from weightops.tasks.analogy_example import ANALOGY
from weightops.tasks.derived import (
    first_half,
    neutral_beside,
    second_half,
    typographic_beside,
    with_classes,
)
from weightops.tasks.striped import STRIPED_COUNTING, STRIPED_LETTERS
from weightops.tasks.table import find_task
from weightops.tasks.task import Task
from weightops.training.config import config_for
from weightops.workflows import experiment
from weightops.workflows.add import Addition
from weightops.workflows.analogy import Analogy
from weightops.workflows.base import Workflow, even_weights
from weightops.workflows.negate import Negation
from weightops.workflows.patch import Patch
from weightops.workflows.result import EditResult, confirm

RESULTS = Path(__file__).parent / "results"
MNIST, SHAPES = find_task("mnist"), find_task("shapes")
SUPPORTED = ("shapes", "textures", "counting", "words")
RACE = SearchOptions(strategy="race")
TENTHS = SearchOptions(tuple(0.1 * i for i in range(11)), "race")  # for several coefficients


class Claim(NamedTuple):
    """A claim of a paper: the criterion stands here before anything is measured."""

    criterion: str
    holds: Callable[[Mapping[str, float]], bool]
    paper: str  # what the authors measured, with their models


CLAIMS = {
    "patching gains much and harms little": Claim(
        "gain >= 25 points, mean of the supported tasks at most 1 point lower",
        lambda r: r["patch gain"] >= 25 and r["patch supported loss"] <= 1,
        "15 to 60 points, at most 1 on ImageNet (2208.05592)",
    ),
    "negation forgets more than a random vector does": Claim(
        "target at least 5 points below the random vector's",
        lambda r: r["negated target"] < r["random target"] - 5,
        "ViT-B/32: 24.0 against 45.7 (2212.04089)",
    ),
    "negation keeps the control accuracy": Claim(
        ">= 95 % of the base's",
        lambda r: r["negated control share"] >= 95,
        "ViT-B/32: 60.9 of 63.4 (2212.04089)",
    ),
    "gradient ascent destroys the control tasks": Claim(
        "at least 10 points of the share less than negation leaves",
        lambda r: r["ascent control share"] < r["negated control share"] - 10,
        "ViT-B/32: 0.3 of 63.4 left (2212.04089)",
    ),
    "pairs keep their normalized accuracy": Claim(
        "mean over the pairs >= 95 %", lambda r: r["pairs normalized"] >= 95, "98.9 % (2212.04089)"
    ),
    "an analogy beats zero-shot": Claim(
        "target accuracy higher",
        lambda r: r["analogy"] > r["analogy zero-shot"],
        "T5, sentiment: 93.0 against 92.3 of the auxiliary task (2212.04089)",
    ),
    "an analogy beats the style alone and the classes alone": Claim(
        "target accuracy higher than B's and than C's, each with its own searched alpha",
        lambda r: r["analogy"] > max(r["analogy only B"], r["analogy only C"]),
        "-",
    ),
    "an analogy beats the sum of the two": Claim(
        "target accuracy higher than C + B's, with two searched alphas",
        lambda r: r["analogy"] > r["analogy C + B"],
        "-",
    ),
    "joint patching is at least as good as sequential, with as many steps in all": Claim(
        "difference >= -2 standard errors",
        lambda r: r["joint - sequential"] >= -2 * r["strategy noise"],
        "better (2208.05592)",
    ),
    "joint patching is at least as good as sequential, with half of the steps": Claim(
        "difference >= -2 standard errors",
        lambda r: r["joint of half the steps - sequential"] >= -2 * r["strategy noise"],
        "-",
    ),
    "sequential patching is at least as good as parallel": Claim(
        "difference >= -2 standard errors",
        lambda r: r["sequential - parallel"] >= -2 * r["strategy noise"],
        "better (2208.05592)",
    ),
    "a typographic patch heals": Claim(
        "at least 20 points",
        lambda r: r["attack gain"] >= 20,
        "41 points on real photographs (2208.05592)",
    ),
    "a typographic patch heals more than neutral words do": Claim(
        "gain under attack above the gain under neutral words",
        lambda r: r["attack gain"] > r["neutral gain"],
        "-",
    ),
    "a patch on half of the classes helps the other half": Claim(
        "gain on the unseen striped letters >= 1 point",
        lambda r: r["unseen half gain"] >= 1,
        "MNIST 19.4 points (2208.05592)",
    ),
    "a patch on some numbers of things helps the others": Claim(
        "gain on the unseen numbers of striped things >= 1 point",
        lambda r: r["unseen counts gain"] >= 1,
        "numbers that the patch never saw get better, too (2208.05592)",
    ),
    "vectors of unlike tasks are nearly orthogonal": Claim(
        "mean cosine < 0.1", lambda r: r["cosine unlike"] < 0.1, "near 0 (2212.04089)"
    ),
    "vectors of kin are not": Claim(
        "cosine of mnist and digits at least twice the unlike",
        lambda r: r["cosine kin"] > 2 * r["cosine unlike"],
        "higher for MNIST, SVHN, GTSRB (2212.04089)",
    ),
}


class Remembering(EditSession):
    """A session that fine-tunes the base on each task only once."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.learned = {}
        self.choices = []

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
    session.choices.append(
        {
            "verb": workflow.verb,
            "tasks": {task.name: role for task, role in workflow.roles.items()},
            "options": dict(workflow.options),
            "search": asdict(workflow.search),
            "alpha": result.named_alpha,
            "why": result.why,
            "rivals": result.more.get("rivals", {}),
        }
    )
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
    """Measure joint patching with as many steps in all as the others, and with half of them."""
    tasks, steps = [MNIST, STRIPED_LETTERS], session.config.steps
    results = {}
    for name, strategy, share in (
        ("joint of half the steps", "joint", 1),
        ("joint", "joint", 2),
        ("sequential", "sequential", 1),
        ("parallel", "parallel", 1),
    ):
        workflow = Patch.from_call(tasks, supported=SUPPORTED, strategy=strategy, search=TENTHS)
        if strategy == "joint":
            (both,) = workflow.learned
            session.learned.pop(both.name, None)
            session.learn(both, config=replace(session.config, steps=share * steps))
        results[name] = run(session, workflow)[1]
    hits = {strategy: test["patched"].hits for strategy, test in results.items()}
    gaps = {
        f"{a} - {b}": difference(hits[a], hits[b], even_weights(tasks))
        for a, b in (
            ("joint", "sequential"),
            ("joint of half the steps", "sequential"),
            ("sequential", "parallel"),
        )
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


def transfer(session: EditSession) -> dict[str, float]:
    """Patch half of the striped letters and measure the other half."""
    seen, unseen = first_half(STRIPED_LETTERS), second_half(STRIPED_LETTERS)
    return on_others(session, {"seen half": seen, "unseen half": unseen})


def counting(session: EditSession) -> dict[str, float]:
    """Patch some numbers of striped things and measure the numbers between them."""
    counts = STRIPED_COUNTING.classes
    seen, unseen = (
        with_classes(STRIPED_COUNTING, classes, f"{STRIPED_COUNTING.name}: {classes[0]}, ...")
        for classes in (counts[::2], counts[1::2])
    )
    return on_others(session, {"seen counts": seen, "unseen counts": unseen})


def on_others(session: EditSession, tasks: dict[str, Task]) -> dict[str, float]:
    """Patch the first of two tasks and measure both; each goes by a word."""
    seen, unseen = tasks.values()
    workflow = Patch.from_call(seen, supported=experiment.SUPPORTED, search=RACE)
    workflow.may_be_base = True  # shows that nothing improved, too
    _, test = run(session, workflow, (unseen,))
    return before_and_after(test, tasks)


def attack(session: EditSession) -> dict[str, float]:
    """Patch on shapes with wrong names beside them, and measure other words and tasks."""
    attacked, harmless = typographic_beside(SHAPES), neutral_beside(SHAPES)
    workflow = Patch.from_call(attacked, supported=experiment.SUPPORTED, search=RACE)
    workflow.may_be_base = True  # shows that nothing improved, too
    result, test = run(session, workflow, (harmless,))
    tasks = {"attack": attacked, "neutral": harmless, "no words": SHAPES}
    row = {"attack alpha": result.alpha[0]}
    row["attack fine-tuned"] = mean(test["finetuned"], [attacked])
    row["attack supported loss"] = mean(test["base"], workflow.supported) - mean(
        test["patched"], workflow.supported
    )
    return row | before_and_after(test, tasks)


def before_and_after(test: dict[str, Measured], tasks: dict[str, Task]) -> dict[str, float]:
    row = {}
    for word, task in tasks.items():
        before, after = mean(test["base"], [task]), mean(test["patched"], [task])
        row |= {f"{word} before": before, f"{word} after": after, f"{word} gain": after - before}
    return row


PARTS = {
    part.__name__: part
    for part in (patching, negation, addition, analogies, attack, transfer, counting, strategies)
}


def summarize(rows: list[dict[str, float]], config: dict, made: dict) -> dict:
    about = ("seed", "choices", "minutes")
    names = dict.fromkeys(name for row in rows for name in row if name not in about)
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
    for name, claim in CLAIMS.items():
        held = []
        for row in rows:
            with suppress(KeyError):  # a seed may lack a measurement
                held.append(bool(claim.holds(row)))
        if held:
            claims[name] = {
                "criterion": claim.criterion,
                "paper": claim.paper,
                "holds": bool(claim.holds(means)),
                "seeds in which it does": sum(held),
                "of": len(held),
            }
    return {
        "seeds": len(rows),
        "minutes of one core": round(sum(sum(row.get("minutes", {}).values()) for row in rows)),
        "claims": claims,
        "spread": spread,
        "rows": rows,
        "training": config,
        "versions": versions(),
        "made": made,
    }


def commit() -> str:
    """Return the commit that runs, marked if files have changed since."""
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def measure(seed: int, steps: int, threads: int | None, parts: list[str]) -> dict[str, float]:
    """Return the numbers of experiments with one seed."""
    if threads:
        torch.set_num_threads(threads)
    session = Remembering(
        "embedded", [], config=config_for(open_checkpoint("embedded"), seed=seed, steps=steps)
    )
    row, choices, minutes = {"seed": seed}, {}, {}
    for part in (PARTS[name] for name in parts):
        began, session.choices = time.process_time(), []
        try:
            row |= part(session)
        except NothingSatisfiesError as error:
            print(f"{part.__name__}, seed {seed}: {error}", flush=True)
        choices[part.__name__] = session.choices
        minutes[part.__name__] = round((time.process_time() - began) / 60, 2)
        print(
            f"seed {seed}, {part.__name__}: {minutes[part.__name__]} minutes of one core",
            json.dumps(row),
            flush=True,
        )
    return {**row, "choices": choices, "minutes": minutes}


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
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, help="experiments to run; the file's others are kept"
    )
    parser.add_argument("-o", "--out", type=Path, default=RESULTS / "papers.json")
    args = parser.parse_args()
    config = asdict(config_for(open_checkpoint("embedded"), steps=args.steps))
    parts = args.only or list(PARTS)
    before = json.loads(args.out.read_text()) if args.only and args.out.exists() else {"rows": []}
    rows = {row["seed"]: row for row in before["rows"]}
    command = shlex.join(["python", "benchmarks/papers.py", *sys.argv[1:]])
    now = {"command": command, "commit": commit()}
    made = before.get("made", {}) | {part: now for part in parts}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        threads = 1 if args.jobs > 1 else None
        for done in as_completed(
            [pool.submit(measure, seed, args.steps, threads, parts) for seed in range(args.seeds)]
        ):
            row = done.result()
            old = rows.get(row["seed"], {})
            for about in ("choices", "minutes"):
                row[about] = old.get(about, {}) | row[about]
            rows[row["seed"]] = old | row
            result = summarize([rows[seed] for seed in sorted(rows)], config, made)
            args.out.parent.mkdir(exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result["spread"].items():
        print(f"{name:32} {value['mean']:8.2f}   ({value['min']:.2f} to {value['max']:.2f})")
    for claim, verdict in result["claims"].items():
        held = f"{verdict['seeds in which it does']} of {verdict['of']} seeds"
        answer = "holds" if verdict["holds"] else "does not hold"
        print(f"{answer}, in {held}: {claim} ({verdict['criterion']}; paper: {verdict['paper']})")


if __name__ == "__main__":
    main()
