"""The README: its code runs, its numbers are those of the benchmarks' results."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "README.md", "exec"), {})
        for expected in re.findall(r"print\(.*?#\s*(.*)", block):
            assert expected in printed.getvalue()
    assert "edited" in os.listdir()


def test_files_that_it_names_are_there() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).is_file(), link


def test_numbers_are_those_of_the_results() -> None:
    patch = json.loads((ROOT / "benchmarks" / "results" / "patch.json").read_text())
    spread = patch["spread"]
    for row in (
        "zero_shot",
        "finetuned",
        "patched",
        "supported_base",
        "supported_finetuned",
        "supported_patched",
    ):
        value = spread[row]
        assert f"{value['mean']:.1f} ({value['min']:.1f} to {value['max']:.1f})" in README, row
    algebra = json.loads((ROOT / "benchmarks" / "results" / "algebra.json").read_text())
    for dtype, result in algebra.items():
        assert (
            f"| {dtype} | {result['over_floor']} | {result['loop_over_weightops']} | {result['in_place_over_floor']} |"
            in README
        ), dtype
    lofi = json.loads((ROOT / "benchmarks" / "results" / "lofi.json").read_text())
    for task in lofi["tasks"].values():
        for method, row in task["spread"].items():
            cells = [
                f"{v['mean']:.1f} ({v['min']:.1f} to {v['max']:.1f})"
                for v in (row["in_distribution"], row["under_shift"])
            ]
            assert f"| {cells[0]} | {cells[1]} |" in README, method


def test_why_a_claim_does_not_hold() -> None:
    spread = json.loads((ROOT / "benchmarks" / "results" / "papers.json").read_text())["spread"]
    words = " ".join(README.split())
    tuned, before, letters, alpha = (
        spread[name]["mean"]
        for name in (
            "attack fine-tuned",
            "attack before",
            "letters fine-tuned under attack",
            "attack alpha",
        )
    )
    assert (
        f"right on {tuned:.0f} % of the attacked digits ({before:.1f} % before), but on {letters:.0f} % of the letters"
        in words
    )
    assert f"alpha stops at {alpha:.2f}" in words


def test_the_share_of_passes_is_the_measured_one() -> None:
    search = json.loads((ROOT / "benchmarks" / "results" / "search.json").read_text())
    share, noise = search["mean"]["passes, % of the grid's"], 100 * search["mean"]["within noise"]
    words = " ".join(README.split())
    assert f"takes {share:.0f} % of the grid's image passes" in words
    assert f"in {noise:.0f} % of {20 * len(search['rows'])} trials" in words


def test_merges_are_as_fast_as_measured() -> None:
    engine = json.loads((ROOT / "benchmarks" / "results" / "engine.json").read_text())
    for method, row in engine["methods"].items():
        ours, theirs = row["weightops"], row["mergekit"]
        cells = [
            method,
            ours["seconds"],
            theirs["seconds"],
            row["ratio"],
            ours["gigabytes"],
            theirs["gigabytes"],
        ]
        assert f"| {' | '.join(map(str, cells))} |" in README, method


def test_the_papers_claims_are_as_measured() -> None:
    papers = json.loads((ROOT / "benchmarks" / "results" / "papers.json").read_text())
    for claim, verdict in papers["claims"].items():
        held, of = verdict["seeds in which it does"], verdict["of"]
        assert (
            f"| {claim} | {'yes' if verdict['holds'] else 'no'}, in {held} of {of} seeds |"
            in README
        ), claim
    for name in (
        "patch gain",
        "negated control share",
        "pairs normalized",
        "analogy",
        "attack gain",
    ):
        value = papers["spread"][name]
        assert f"{value['mean']:.1f} ({value['min']:.1f} to {value['max']:.1f})" in README, name
