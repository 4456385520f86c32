"""Names from files are shown with their control characters escaped, wherever they are printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.drawn_folders import draw
from safetensors.torch import save_file

from weightops.cli.main import run

NAME = "a\x1b[31mred\nnext\u202eback<script>x</script>|`"
SHOWN = "a\\x1b[31mred\\nnext\\u202eback<script>x</script>|`"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    record = json.dumps({"recipe": {NAME: NAME}, "ref": NAME})
    for i, file in enumerate(("base", "ft", "second")):
        tensors = {NAME: torch.full((3, 3), float(i)), "w": torch.full((2, 2), float(i))}
        metadata = {"format": "pt", "weightops": record, NAME: NAME}
        save_file(tensors, tmp_path / f"{file}.safetensors", metadata)
    save_file({f"{NAME}2": torch.zeros(1), "w": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "code", "shown"),
    [
        ("inspect base.safetensors", 0, SHOWN),
        ("inspect base.safetensors --json", 0, ""),
        ("vector base.safetensors ft.safetensors --per-tensor", 0, SHOWN),
        ("vector base.safetensors ft.safetensors --json --per-tensor", 0, ""),
        ("vector base.safetensors other.safetensors", 1, SHOWN),
        ("compare ft.safetensors second.safetensors --base base.safetensors --per-tensor", 0, ""),
        ("merge base.safetensors ft.safetensors -o out --dry-run", 0, ""),
        ("merge base.safetensors other.safetensors -o out", 1, SHOWN),
        ("verify damaged.safetensors --recipe recipe.yaml", 1, SHOWN),
    ],
)
def test_names_of_tensors(
    here: Path, capsys: pytest.CaptureFixture[str], line: str, code: int, shown: str
) -> None:
    models = ["base.safetensors", "ft.safetensors"]
    (here / "recipe.yaml").write_text(json.dumps({"method": "linear", "models": models}))
    save_file({NAME: torch.full((3, 3), 7.0), "w": torch.zeros(2, 2)}, "damaged.safetensors")
    exit_code = run(line.split())
    told = capsys.readouterr()
    text = told.out + told.err
    assert exit_code == code, text
    assert shown in text
    assert not set(text) & {"\x1b", "\u202e"}
    if "--json" in line:
        assert json.dumps(NAME)[1:-1] in json.dumps(json.loads(told.out))


def test_names_in_a_merged_folder_and_its_page(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["merge", "base.safetensors", "ft.safetensors", "-o", "out"]) == 0
    vectors = ["ft.safetensors", "second.safetensors", "--base", "base.safetensors"]
    assert run(["compare", *vectors, "-o", "page.html"]) == 0
    assert "<script>x" not in Path("page.html").read_text()
    for file in [*Path("out").glob("*.md"), *Path("out").glob("*.yaml"), Path("page.html")]:
        assert not set(file.read_text()) & {"\x1b", "\u202e"}, file


def test_names_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "photos", {"red\x1b[31m": "circle", "blue\u202e": "square"}, 20, 0)
    assert run(["tasks", "check", str(tmp_path / "photos")]) == 0
    told = capsys.readouterr().out
    assert "red\\x1b[31m" in told
    assert not set(told) & {"\x1b", "\u202e"}
