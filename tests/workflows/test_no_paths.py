"""What is written names no folder of the machine that it was made on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.drawn_folders import draw

from weightops.cli.main import run


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_no_output_names_a_folder_of_the_author(
    own: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    author = tmp_path / "home_of_the_author"
    models = [author / "models" / name for name in ("pre", "ft")]
    for model in models:
        shutil.copytree(own / "model", model)
    photos = author / "photos"
    draw(photos, {"moon": "arrow", "arrow": "moon"}, 10, seed=0)
    here = tmp_path_factory.mktemp("here") if kind == "absolute" else author / "work"
    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    there = author if kind == "absolute" else Path("..")
    pre, ft, photos = (there / name for name in ("models/pre", "models/ft", "photos"))
    for line in (
        f"merge {pre} {ft} --method ties --base {pre} -o merged",
        f"vector {pre} {ft} -o v.safetensors",
        f"apply {here / 'v.safetensors'} --base {pre} --alpha 0.4 -o edited",
        f"pack {pre} {ft} --base {pre} -o packed.safetensors",
        f"statistics {ft} --task {photos} --images 4 -o grams.safetensors",
        f"evaluate {pre} {ft} --tasks {photos} -o scores",
        f"finetune --model {pre} --task {photos} --steps 1 -o tuned",
        f"soup {pre} {ft} --tasks {photos} --base {pre} -o soup",
        f"patch --model {pre} --task {photos} --supported {own / 'plain'} --rule mean "
        f"--alphas 0.5,1 --vector {own / 'swapped.safetensors'} -o patched",
        f"lofi --model {pre} --task {photos} --steps 1 --nodes 2 -o lofi",
    ):
        assert run(line.split()) == 0
    written = [path for path in here.rglob("*") if path.is_file()]
    assert len(written) > 40
    for path in written:
        content = path.read_bytes()
        for name in (b"home_of_the_author", str(tmp_path).encode(), b"../models"):
            assert name not in content, (path, name)
