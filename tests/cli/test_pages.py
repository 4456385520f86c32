"""The pages and pictures of comparisons: of task vectors, of lo-fi, and of a ranking."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.browser import browser, needs_chromium
from helpers.drawn_folders import draw

from weightops import open_checkpoint
from weightops.cli.main import run


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and three models, two of which are opposite in one of two layers."""
    folder = tmp_path_factory.mktemp("vectors")
    generator = torch.Generator().manual_seed(0)
    base = {
        f"layers.{i}.weight": torch.randn(72, 80, generator=generator, dtype=torch.float32)
        for i in range(2)
    }
    deltas = [torch.randn(2, 72, 80, generator=generator) for _ in range(2)]
    deltas.append(torch.stack([deltas[0][0], -deltas[0][1]]))
    paths = [str(open_checkpoint(base).save(folder / "base.safetensors"))]
    for i, delta in enumerate(deltas):
        moved = {name: base[name] + delta[k] for k, name in enumerate(base)}
        paths.append(str(open_checkpoint(moved).save(folder / f"v{i}.safetensors")))
    return paths


HEADS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "html": b"<!doctype html>"}


@pytest.mark.parametrize("kind", HEADS)
def test_pictures_by_suffix_are_the_same_each_time(
    vectors: list[str], tmp_path: Path, kind: str
) -> None:
    contents = []
    for i in range(2):
        out = tmp_path / str(i) / f"picture.{kind}"
        assert run(["compare", *vectors, "--spectra", "-o", str(out)]) == 0
        contents.append(out.read_bytes())
    assert contents[0].startswith(HEADS[kind])
    assert contents[0] == contents[1]
    if kind in ("svg", "html"):  # letters are outlines, and each is named
        titles = [b"cosine by layer", b"share of signs in conflict", b"norm by layer"]
        titles.append(b"share of signs in conflict by layer")
        assert all(b"<!-- " + title + b" -->" in contents[0] for title in titles)


def test_another_suffix_is_refused(
    vectors: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", *vectors, "-o", str(tmp_path / "x.jpeg")]) == 2
    assert re.search(r"x\.jpeg is no \.png, \.svg, \.pdf or \.html", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_page_of_a_comparison_has_the_numbers(vectors: list[str], tmp_path: Path) -> None:
    assert run(["compare", *vectors, "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    tables = {
        title: body
        for title, body in re.findall(r"<caption>(.*?)</caption>(.*?)</table>", page, re.DOTALL)
    }

    def column(title: str, index: int) -> list[str]:
        rows = re.findall(
            r'<th scope="row">layers[^<]*</th>\s*((?:<td>[^<]*</td>\s*)+)', tables[title]
        )
        return [re.findall(r"<td>([^<]*)", row)[index] for row in rows]

    # of vectors 0 and 1, 0 and 2, 1 and 2
    assert column("Cosines by layer", 1) == ["1.000", "-1.000"]
    assert column("Shares of signs in conflict by layer", 1) == ["0.000", "1.000"]
    command = re.search(r"<th[^>]*>command</th>\s*<td>([^<]*)", page)[1]  # type: ignore[index]
    names = " ".join(Path(path).name for path in vectors)
    assert command == f"weightops compare {names} -o page.html"
    assert "v0 and v2: cosine" in page
    assert "-0.000" not in page
    assert "Traceback" not in page


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    draw(root / "swapped", {"moon": "arrow", "arrow": "moon"}, 30, 0)
    return root


@pytest.fixture(scope="module")
def compared(drawn: Path) -> Path:
    options = ["--nodes", "2", "--steps", "2", "--batch-size", "4", "--device", "cpu"]
    out = drawn / "compared"
    task = str(drawn / "swapped")
    assert run(["lofi", "--compare", "--task", task, *options, "-o", str(out), "--json"]) == 0
    return out


@pytest.fixture(scope="module")
def ranked(drawn: Path, compared: Path) -> Path:
    nodes = [str(compared / f"node{i}") for i in range(2)]
    out = drawn / "ranked"
    options = ["--target", str(drawn / "swapped"), "--steps", "1", "--device", "cpu"]
    assert run(["select", *nodes, *options, "-o", str(out), "--json"]) == 0
    return out


def test_the_page_of_lofi_has_all_models(compared: Path) -> None:
    page = (compared / "report.html").read_text()
    record = json.loads((compared / "comparison.json").read_text())
    script = r'<script type="application/json" id="data">(.*?)</script>'
    data = json.loads(re.search(script, page, re.DOTALL)[1])  # type: ignore[index]
    points = {point["name"]: point for point in data["points"]}
    assert points.keys() == record["models"].keys()
    for name, row in record["models"].items():
        assert (points[name]["x"], points[name]["y"]) == (
            row["in_distribution"],
            row["under_shift"],
        )
    assert data["points"][data["chosen"]]["name"] == "average"
    assert str(compared.parent) not in page


def test_the_page_of_a_ranking(ranked: Path) -> None:
    page = (ranked / "report.html").read_text()
    order = json.loads((ranked / "results.json").read_text())["order"]
    assert f"<h1>What should help swapped most: {order[0]}" in page
    rows = re.findall(r'<th scope="row">([^<]*)</th>', page)
    assert rows[: len(order)] == order
    assert "<svg" in page


@needs_chromium
def test_pages_in_a_browser(
    vectors: list[str], compared: Path, ranked: Path, tmp_path: Path
) -> None:
    assert run(["compare", *vectors, "-o", str(tmp_path / "page.html")]) == 0
    with browser(tmp_path) as tab:
        for page in (tmp_path / "page.html", compared / "report.html", ranked / "report.html"):
            for width, dark in ((390, True), (1280, False)):
                tab.open(page, width, dark=dark)
                assert tab.overflow <= 0
        tab.open(compared / "report.html")
        tab.run("document.getElementById('slider').focus()")
        tab.press("Home")
        name = tab.run("document.getElementById('alpha').textContent")
        said = tab.run("slider.getAttribute('aria-valuetext')")
        scores = json.loads((compared / "comparison.json").read_text())["models"][name]
        assert f"in distribution {100 * scores['in_distribution']:.1f} %" in said
        assert tab.problems == []
