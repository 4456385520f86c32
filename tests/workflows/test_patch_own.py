"""Patches on a person's own folders: several tasks, the page, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.drawn_folders import SHORT
from PIL import Image

from weightops import SearchOptions, config_for, patch
from weightops.cli.main import run
from weightops.errors import TaskError


@pytest.fixture
def given(own: Path, options: dict[str, object]) -> dict[str, object]:
    """Arguments of a patch with given weights, under a constraint that all satisfy."""
    return {
        "supported": [str(own / "plain")],
        "max_supported_drop": 1.0,
        "finetuned": own / "swapped.safetensors",
        **options,
    }


@pytest.mark.parametrize("strategy", ["joint", "sequential", "parallel"])
def test_several_tasks(own: Path, tmp_path: Path, strategy: str) -> None:
    result = patch(
        [str(own / "swapped"), str(own / "turned")],
        tmp_path / "out",
        strategy=strategy,
        supported=[str(own / "plain")],
        max_supported_drop=1.0,
        model=own / "model",
        search=SearchOptions((0.5, 1.0)),
        training=config_for(own / "model", **SHORT),
        device="cpu",
    )
    assert result["strategy"] == strategy
    roles = [task["role"] for task in result["tasks"].values()]
    assert roles == ["patching", "patching", "supported"]
    patching = [task for task in result["tasks"].values() if task["role"] == "patching"]
    gains = [task["patched"]["acc1"] - task["base"]["acc1"] for task in patching]
    assert sum(gains) > 0.3
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    weights = {json.loads(line)["weights"] for line in lines}
    assert weights == {"sweep", "base", "finetuned", "patched"}


def test_the_page_needs_nothing_from_elsewhere(
    own: Path, given: dict[str, object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = patch(str(own / "swapped"), out, **given)
    page = (out / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    measured = page.split("<h2>Provenance</h2>")[0]
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", measured)
    script = r'<script type="application/json" id="data">(.*?)</script>'
    data = json.loads(re.search(script, page, re.DOTALL)[1])
    assert [point["label"] for point in data["points"]] == ["0", "0.5", "1"]
    assert data["points"][data["chosen"]]["alpha"] == [summary["alpha"]]
    assert page.count('src="data:image/png;base64,') >= 1
    low, high = summary["intervals"]["swapped"]["patched"]
    assert low <= summary["tasks"]["swapped"]["patched"]["acc1"] <= high


def test_two_tasks_of_one_name_are_refused(own: Path) -> None:
    with pytest.raises(TaskError, match="two different tasks are called plain"):
        patch(str(own / "plain"), own / "x", supported=[f"{own}/./plain"])


def test_misuse(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = f"{own / 'swapped'},{own / 'turned'}"
    vectors = ["--vector", own / "swapped.safetensors", "--vector", own / "turned.safetensors"]
    model = ["--model", own / "model", "-q"]
    for arguments, code, message in (
        (["add", "--tasks", tasks, "--method", "tise", *vectors], 2, "did you mean ties"),
        (
            ["add", "--tasks", tasks, "--method", "ties", "--option", "densty=1"],
            2,
            "did you mean density",
        ),
        (["add", "--tasks", tasks, *vectors[:2], *model], 2, "learns 2 tasks"),
        (["add", "--tasks", tasks, *vectors[:2], *model], 2, "give one --finetuned for each"),
        (["analogy", "--a", "mnist", "-q"], 2, "name all of --a"),
        (["negate", "--target", "mnist", "--control", "mnist"], 2, "at least one control"),
        (["add", "--tasks", "mnist"], 2, "two tasks at least"),
        (["soup", own / "model"], 2, "two models at least"),
        (["experiment", "intermediat"], 2, "did you mean intermediate"),
    ):
        assert run([*map(str, arguments), "-o", str(tmp_path / "x")]) == code, arguments
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_page_in_a_browser(own: Path, given: dict[str, object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = patch(str(own / "swapped"), out, **given)
    for width in (1280, 400):
        shot = tmp_path / f"{width}.png"
        browse(tmp_path, f"--window-size={width},1600", f"--screenshot={shot}", out / "report.html")
        pixels = np.asarray(Image.open(shot).convert("L"))
        assert pixels.shape[1] == width
        assert pixels.std() > 5  # something is drawn
    moved = tmp_path / "moved.html"  # the slider, as a hand moves it
    move = "slider.value = 0; slider.dispatchEvent(new Event('input'));"
    text = (out / "report.html").read_text()
    moved.write_text(text.replace("</body>", f"<script>{move}</script></body>"))
    for page, alpha in ((out / "report.html", f"{summary['alpha']:g} (chosen)"), (moved, "0")):
        document = browse(tmp_path, "--dump-dom", page)
        assert document.count('class="bar"') == 2
        assert document.count("<circle") > 2
        assert f'<b id="alpha">{alpha}</b>' in document


def browse(folder: Path, *arguments: object) -> str:
    """Run a browser without a window on a page; return what it prints."""
    *options, page = arguments
    plain = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = ["chromium", *plain, *map(str, options), f"file://{page}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return done.stdout
