"""The page of an edit: its numbers, its words, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import browser, needs_chromium
from helpers.drawn_folders import SHORT

from weightops import SearchOptions, TaskVector, add, config_for, negate, patch, soup

ALPHAS = SearchOptions((0.25, 0.5, 0.75, 1.0), strategy="grid")


@pytest.fixture(scope="module")
def patched(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "patched"
    patch(
        str(own / "swapped"),
        out,
        model=own / "model",
        supported=[str(own / "plain"), str(own / "turned")],
        max_supported_drop=1.0,
        finetuned=own / "swapped.safetensors",
        search=ALPHAS,
        device="cpu",
    )
    return out


@pytest.fixture(scope="module")
def negated(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "negated"
    negate(
        str(own / "plain"),
        out,
        model=own / "model",
        control=[str(own / "swapped")],
        control_threshold=0.0,
        baselines=True,
        finetuned=own / "turned.safetensors",
        training=config_for(own / "model", **{**SHORT, "steps": 2}),
        search=ALPHAS,
        device="cpu",
    )
    return out


class Parsed(HTMLParser):
    """The elements of a page: tables by caption, headings, alts, and text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self.alts: list[str] = []
        self.texts: list[str] = []
        self.cells_without_scope = 0
        self._rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td"):
            self._rows[-1].append("")
            self.cells_without_scope += tag == "th" and given.get("scope") not in ("col", "row")
        if tag == "img":
            self.alts.append(given["alt"] or "")
        if tag not in ("img", "meta", "br", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in ("script", "style"):
            return
        self.texts.append(data)
        if inside == "caption":
            self.tables[data] = self._rows
        if inside in ("th", "td"):
            self._rows[-1][-1] += data
        if inside in ("h1", "h2", "h3"):
            self.headings.append(data)


def summary_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return content


def test_one_file_with_a_link_to_all_pictures(patched: Path) -> None:
    text = (patched / "report.html").read_text()
    links = set(re.findall(r"(?:src|href)=\"(?!data:)([^\"#]*)", text))
    assert links <= {"changed.html"}
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert text.count('src="data:image/webp;base64,') >= 1


@pytest.mark.parametrize("which", ["patched", "negated"])
def test_counts_agree_with_the_scores_and_the_pictures(
    which: str, request: pytest.FixtureRequest
) -> None:
    out: Path = request.getfixturevalue(which)
    summary, page, everything = summary_of(out), Parsed(out / "report.html"), out / "changed.html"
    word = "patched" if which == "patched" else "edited"
    counted: dict[str, list[int]] = {}
    for caption, (_, *rows) in page.tables.items():
        if "change from " in caption:
            counted |= {row[0]: list(map(int, row[-2:])) for row in rows}
    assert counted.keys() == summary["tasks"].keys()
    for name, (asked, opposite) in counted.items():
        task = summary["tasks"][name]
        gained = (task[word]["acc1"] - task["base"]["acc1"]) * task[word]["n"]
        sign = -1 if task["role"] == "target" else 1
        assert asked - opposite == round(sign * gained)
    pictures = Parsed(everything)
    assert len(pictures.alts) == sum(map(sum, counted.values()))
    words = ("forgotten", "remembered", "fixed", "broken")
    total = {h.split(": ")[0] + h.split()[-1]: h.split()[-2] for h in pictures.headings[1:]}
    for name, pair in counted.items():
        forgets = summary["tasks"][name]["role"] == "target"
        for kind, count in zip(words[:2] if forgets else words[2:], pair, strict=True):
            assert int(total.get(name + kind, 0)) == count
            assert f"{count} {kind}" in " ".join(page.texts)
    assert max(map(len, page.alts)) < 60
    assert all(re.fullmatch(r"\w+, taken for \w+( before)?", alt) for alt in page.alts)


def test_what_is_forgotten_is_the_success(negated: Path) -> None:
    page = Parsed(negated / "report.html")
    assert any(re.fullmatch(r"plain: \d+ forgotten", heading) for heading in page.headings)
    assert not any("plain" in h and ("broken" in h or "fixed" in h) for h in page.headings)
    header = page.tables["Target tasks: test accuracy, %"][0]
    assert header[:5] == ["task", "base", "fine-tuned", "random vector", "gradient ascent"]
    assert "random vector" in [row[0] for row in page.tables[
        "Baselines: their own alphas, by the same rule"
    ]]  # fmt: skip


def test_words(patched: Path, negated: Path) -> None:
    for out in (patched, negated):
        page = Parsed(out / "report.html")
        text = " ".join(page.texts)
        assert not re.search(r"(?<!\d)-0\.0(?!\d)|\b1 (points|images|alphas)\b|those 1 were", text)
        assert page.cells_without_scope == 0
        assert all(page.tables)


def test_rows_have_the_names_of_models_and_vectors(own: Path, tmp_path: Path) -> None:
    model, tasks = own / "model", [str(own / "swapped"), str(own / "turned")]
    for name in ("swapped", "turned"):
        vector = TaskVector.load(own / f"{name}.safetensors")
        vector.apply(model).save(tmp_path / f"{name}-model")
    models = [tmp_path / "swapped-model", tmp_path / "turned-model"]
    soup(models, tmp_path / "soup", tasks=tasks, base=model, device="cpu")
    vectors = [own / "swapped.safetensors", own / "turned.safetensors"]
    how = {"model": model, "search": ALPHAS, "device": "cpu"}
    add(tasks, tmp_path / "sum", each=True, finetuned=vectors, **how)  # type: ignore[arg-type]
    for out, names in (("soup", ["swapped-model", "turned-model"]), ("sum", ["swapped", "turned"])):
        page = Parsed(tmp_path / out / "report.html")
        points = page.tables["All points, accuracies in %"]
        assert points[0][1:3] == names
        for row in points[1:]:
            shares = dict(zip(names, row[1:3], strict=True))
            told = row[0].removesuffix(" (chosen)")
            assert told == ", ".join(f"{name} {share}" for name, share in shares.items())
    steps = Parsed(tmp_path / "soup" / "report.html").tables
    models_of = steps["Models, the best first: mean validation accuracy, %"]
    assert {row[0] for row in models_of[1:]} == {"swapped-model", "turned-model"}


@needs_chromium
def test_in_a_browser(patched: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (patched / "results.jsonl").read_text().splitlines()]
    swept = [row for row in rows if row["weights"] == "sweep"]
    summary = summary_of(patched)
    with browser(tmp_path) as tab:
        tab.open(patched / "report.html")
        chosen = f"{summary['alpha']:g}"
        assert tab.run("document.getElementById('alpha').textContent") == f"{chosen} (chosen)"
        tab.run("document.getElementById('slider').focus()")
        tab.press("Home")
        seen = []
        for _ in range(int(tab.run("slider.max")) + 1):
            seen.append(tab.run("document.getElementById('alpha').textContent").split()[0])
            for row in (row for row in swept if f"{row['alpha']:g}" == seen[-1]):
                said = tab.run("slider.getAttribute('aria-valuetext')")
                assert f"{row['dataset']} {100 * row['metrics']['acc1']:.1f} %" in said
                bars = tab.run("bars.innerText")
                assert f"{row['dataset']}\n{100 * row['metrics']['acc1']:.1f}" in bars
            tab.press("ArrowRight")
        assert seen == [f"{a:g}" for a in sorted({row["alpha"] for row in swept})]
        place = tab.run(  # a click on the first point
            "(() => { const b = svg.querySelector('circle').getBoundingClientRect();"
            "scrollTo(0, b.y + scrollY - 200); const c = svg.querySelector('circle')"
            ".getBoundingClientRect(); return [c.x + c.width / 2, c.y + c.height / 2] })()"
        )
        tab.click(*place)
        assert tab.run("slider.value") == "0"
        labels = tab.run("[...document.querySelectorAll('#curve .label')].map(e => e.textContent)")
        assert f"zero-shot (alpha 0) {100 * base_score(swept):.1f} %" in labels
        assert any(label.startswith(f"patched (alpha {chosen})") for label in labels)
        assert tab.run("document.querySelectorAll('#curve circle title').length") == len(seen)
        tab.call("Page.printToPDF")
        assert tab.run("[...document.querySelectorAll('details')].every(e => e.open)")
        assert tab.run("document.querySelectorAll('.scroll[tabindex]').length") == 0
        for width, dark in ((390, True), (640, False), (1280, True)):
            tab.open(patched / "report.html", width, dark=dark)
            assert tab.overflow <= 0
            ground = tab.run("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(22, 24, 28)" if dark else "rgb(255, 255, 255)")
            parts = "[...document.querySelectorAll('.scroll')]"
            wide = tab.run(f"{parts}.map(e => e.scrollWidth > e.clientWidth)")
            assert tab.run(f"{parts}.map(e => e.hasAttribute('tabindex'))") == wide
            assert any(wide) or width > 390
        tab.open(patched / "changed.html", 390)
        assert tab.overflow <= 0
        assert tab.run("[...document.images].every(i => i.alt && i.src.startsWith('data:'))")
        assert tab.problems == []


def base_score(swept: list[dict[str, Any]]) -> float:
    """Return the base's validation accuracy on the patching task."""
    (score,) = (
        r["metrics"]["acc1"] for r in swept if r["alpha"] == 0 and r["dataset"] == "swapped"
    )
    return float(score)
