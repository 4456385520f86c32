"""The pages: they are short, their links lead somewhere, their numbers are those of the results."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import EXAMPLES, PAGES, ROOT, Provider, blocks, small_tasks
from helpers.threads import one_torch_thread

from weightops import evaluate

OTHERS = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/examples/README.md")
FILES_OF_EXTENDING = ("own_method", "own_task", "own_format", "own_evaluator")


def words(page: str) -> str:
    """Return a page's text on one line."""
    return " ".join(PAGES[page].split())


def result(name: str) -> Any:
    """Return what a benchmark wrote."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def spread(value: dict[str, float], digits: int = 1) -> str:
    """Return a mean and a range as pages show them."""
    mean, low, high = (f"{value[name]:.{digits}f}" for name in ("mean", "min", "max"))
    return f"{mean} ({low} to {high})"


# ------------------------------------------------------------------------------ the text


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].split()) <= 700


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, link


def test_the_readme_links_every_page() -> None:
    missing = [
        page for page in PAGES if page != "README.md" and f"({page})" not in PAGES["README.md"]
    ]
    assert not missing


def test_the_citation_is_of_the_newest_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f"\nversion: {versions[0]}\n" in (ROOT / "CITATION.cff").read_text()


# ------------------------------------------------------------------------- Python blocks

WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and page != "docs/extending.md"]


WITH_SCORES = ("README.md", "docs/evaluation.md")
"""Pages that show scores, and so need all images."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread: on few images, several would mostly wait for each other."""
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Provider:
    return Provider(tmp_path_factory.mktemp("named"))


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: Provider
) -> None:
    monkeypatch.chdir(tmp_path)
    if page not in WITH_SCORES:
        small_tasks(monkeypatch)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        provider.provide(" ".join(re.findall(r'"[\w-]+\.pt"', block)), tmp_path)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, page, "exec"), namespace)
        shown = re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
        lines = printed.getvalue().splitlines()
        assert len(shown) == len(lines)
        for expected, line in zip(shown, lines, strict=True):
            assert line.startswith(expected)


def test_the_recipes_for_extensions_are_the_examples() -> None:
    files = [(EXAMPLES / f"{name}.py").read_text() for name in FILES_OF_EXTENDING]
    assert blocks("docs/extending.md", "python") == files


# ------------------------------------------------------------------------------- numbers


def test_a_patch_gains_what_was_measured() -> None:
    measured = result("patch")["spread"]
    for row in ("zero_shot", "finetuned", "patched"):
        cells = f"| {spread(measured[row])} | {spread(measured[_supported(row)])} |"
        assert cells in PAGES["docs/results.md"], row


def _supported(row: str) -> str:
    return f"supported_{'base' if row == 'zero_shot' else row}"


def test_the_papers_claims_are_as_measured() -> None:
    papers, page = result("papers"), PAGES["docs/results.md"]
    for claim, verdict in papers["claims"].items():
        held, of = verdict["seeds in which it does"], verdict["of"]
        answer = f"{'yes' if verdict['holds'] else 'no'}, in {held} of {of} seeds"
        criterion, paper = verdict["criterion"], verdict["paper"]
        assert f"| {claim} | {answer} | {criterion} | " in page, claim
        assert f" | {paper} |\n" in page, claim
    spreads = papers["spread"]
    for name in (
        *("patch gain", "patch supported loss", "negated target", "negated control share"),
        *("ascent control share", "pairs normalized", "analogy", "analogy zero-shot"),
        *("analogy supervised", "analogy only B", "analogy only C", "analogy C + B"),
        *("analogy one alpha", "joint", "joint of half the steps", "sequential", "parallel"),
        *("attack gain", "neutral gain", "no words gain", "unseen half gain", "seen half gain"),
        *("unseen counts gain", "seen counts gain"),
    ):
        assert spread(spreads[name]) in page, name
    assert f"in {papers['minutes of one core']} minutes of one core" in words("docs/results.md")
    before = [spreads[f"{name} before"]["mean"] for name in ("attack", "unseen half")]
    rest = spreads["unseen counts before"]["mean"]
    right = f"right on {before[0]:.1f}, {before[1]:.1f} and {rest:.1f} %"
    assert right in words("docs/results.md")


def test_the_card_of_the_embedded_model_is_as_measured() -> None:
    card = (ROOT / "weightops/clip/README.md").read_text()
    names, _, cells = re.findall(r"^\|(.+)\|$", card, re.MULTILINE)
    shown = dict(zip(map(str.strip, names.split("|")), map(float, cells.split("|")), strict=True))
    measured = evaluate("embedded", ["mnist", "digits", "fonts"], precision="float32")
    for task, scores in measured.items():
        assert 100 * scores["acc1"] == pytest.approx(shown[task], abs=0.25), task
    before = result("papers")["spread"]
    for name in ("attack", "seen half", "unseen half", "seen counts", "unseen counts"):
        assert f"{before[f'{name} before']['mean']:.1f}" in card, name


def test_merging_is_as_good_as_measured() -> None:
    rows = result("merging")["rows"]
    for name, row in rows.items():
        cells = f"| {spread(row['accuracy'])} | {spread(row['normalized'])} |"
        label = name if " " in name else f"`{name}`"
        assert f"| {label} {cells} {row['seconds']['mean']:.1f} |" in PAGES["docs/results.md"], name
    for name in ("add, entropy, per tensor", "add, loss, per tensor", "task_arithmetic"):
        assert f"{spread(rows[name]['accuracy'])} %" in words("docs/results.md"), name


def test_linearised_models_are_as_good_as_measured() -> None:
    ordinary, linearised = result("tangent")["rows"].values()
    for name in ("single", "added", "negated target", "control kept"):
        cells = f"| {name} | {spread(ordinary[name])} | {spread(linearised[name])} |"
        assert cells in PAGES["docs/results.md"], name


def test_lofi_is_as_good_as_measured() -> None:
    labels = {
        "base": "zero-shot",
        "baseline": "communicating in every step",
        "single node": "one node alone (mean of four)",
        "average": "lo-fi: the four averaged",
        "EMA": "moving average of one node",
        "ensemble": "the four nodes' logits averaged",
    }
    for task in result("lofi")["tasks"].values():
        for method, row in task["spread"].items():
            cells = f"| {spread(row['in_distribution'])} | {spread(row['under_shift'])} |"
            assert f"| {labels[method]} {cells}" in PAGES["docs/results.md"], method


def test_language_models_are_as_measured() -> None:
    measured, page = result("language"), PAGES["docs/results.md"]
    for claim, verdict in measured["claims"].items():
        assert f"| {claim} | in {verdict['held']} of {verdict['of']} seeds |" in page, claim
    rows = measured["spread"]
    for name, label in {
        "analogy, before": "base",
        "rival": "the best of B, C and C + B, with their own alphas",
        "analogy": "C + B - A, one alpha each",
        "analogy, one alpha": "C + B - A, one alpha",
        "analogy, supervised": "trained on loud code",
    }.items():
        assert f"| {label} | {spread(rows[name])} |" in page, name
    for name, label in {
        "before": "base",
        "one node": "one node alone",
        "communicating": "communicating in every step",
        "lo-fi": "lo-fi: the four averaged",
        "EMA": "moving average of one node",
        "ensemble": "the four nodes' logits averaged",
    }.items():
        cells = f"| {spread(rows[name])} | {spread(rows[f'{name}, shifted'])} |"
        assert f"| {label} {cells}" in page, name
    for name, label, digits in (
        ("negated", "negated vector, alpha chosen", 3),
        ("random", "random vector of the same norms", 3),
        ("ascent", "gradient ascent", 0),
    ):
        both = (rows[f"{name} {of}"] for of in ("target", "control"))
        cells = " | ".join(spread(row, digits) for row in both)
        assert f"| {label} | {cells} |" in page, name
    assert f"{round(measured['seconds'] / 60)} minutes" in page


def test_a_race_takes_what_was_measured() -> None:
    search = result("search")
    share, noise = search["mean"]["passes, % of the grid's"], 100 * search["mean"]["within noise"]
    page = words("docs/choosing_coefficients.md")
    assert f"`race` takes {share:.0f} % of the grid's image passes" in page
    assert f"in {noise:.0f} % of {20 * len(search['rows'])} trials" in page


def test_the_algebra_is_as_fast_as_measured() -> None:
    for dtype, row in result("algebra").items():
        cells = [dtype, row["over_floor"], row["loop_over_weightops"], row["in_place_over_floor"]]
        assert f"| {' | '.join(map(str, cells))} |" in PAGES["docs/speed.md"], dtype


def test_merges_are_as_fast_as_measured() -> None:
    engine, page = result("engine"), words("docs/speed.md")
    for method, row in engine["methods"].items():
        ours, theirs, slope = row["weightops"], row["mergekit"], row.get("slope")
        cells = [
            method,
            *(ours["seconds"], theirs["seconds"], row["ratio of seconds"]),
            *(slope[name]["seconds"] if slope else "" for name in ("weightops", "mergekit")),
            *(slope["ratio of seconds"] if slope else "", ours["gigabytes"], theirs["gigabytes"]),
        ]
        assert f"| {' | '.join(map(str, cells))} |" in PAGES["docs/speed.md"], method
    assert f"on {engine['processor']}, {engine['date']}" in page
    assert f"write and sync the output, is {engine['floor']} s" in page
    for method, ratio in engine["loop_over_floor"].items():
        assert f"{ratio} times the floor for {method}" in page
    union, cold = engine["union"], engine["cold"]
    for costs in (union["weightops"], cold["merge"]):
        assert f"takes {costs['seconds']} s and {costs['gigabytes']} GB" in page
    assert f"GB in mergekit: {union['ratio']} times" in page
    assert f"write such an output takes {cold['floor']} s" in page
    assert f"cache before, {cold['kept of another file']} GB still are" in page


def test_models_run_as_fast_as_measured() -> None:
    images, pictures, page = result("images"), result("pictures"), words("docs/speed.md")
    for name, row in images.items():
        what, _, model = name.partition(" ")
        if what in ("fit", "evaluate"):
            took = row["seconds"]
            cells = (model, took["ours"], took["theirs"], took["theirs_over_ours"])
            assert f"| {' | '.join(map(str, cells))} |" in PAGES["docs/speed.md"], name
        if what == "search":
            ours, theirs = row["seconds"]["ours"], row["seconds"]["theirs"]
            cells = (model, ours, theirs, f"{ours / theirs:.2f}")
            assert f"| {' | '.join(map(str, cells))} |" in PAGES["docs/speed.md"], name
    patch = images["patch"]["seconds"]
    assert f"takes {patch['ours']} s, and took {patch['theirs']} s" in page
    assert f"{pictures['21 alphas over one decoding and 21 bare passes']} times" in page
    assert f"{pictures['decoding on one thread over that into the cache']} times" in page


def test_merging_with_data_is_as_fast_as_measured() -> None:
    for size, measured in result("from_data").items():
        assert f", {measured['images']} pictures:" in PAGES["docs/speed.md"], size
        for name, cells in measured["rows"].items():
            assert f"| {name} | {' | '.join(map(str, cells))} |" in PAGES["docs/speed.md"], name


def test_mergekit_is_as_near_as_measured() -> None:
    largest = [
        measured["float32"]["largest"]
        for name, measured in result("parity").items()
        if "largest" in measured["float32"] and "FusionBench" not in name
    ]
    assert 1e-5 < max(largest) < 3e-5
    assert "at most 0.00003 of the largest change" in words("docs/mergekit.md")


# ---------------------------------------------------------------------------- the layers


def test_the_architecture_shows_the_layers_and_files() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    layers = config["importlinter:contract:layers"]["layers"].split()
    page = PAGES["docs/architecture.md"]
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)[: len(layers)] == layers
    for path in re.findall(r"`(weightops/[\w./]+)`", page):
        assert (ROOT / path).exists(), path
