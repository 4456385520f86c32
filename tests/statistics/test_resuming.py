"""A statistic that is collected in parts, and continued after a kill."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.texts import letter_model
from safetensors.torch import save_file

from weightops import Checkpoint, collect, open_checkpoint
from weightops.checkpoints.libraries.open_clip import OpenClipArchitecture
from weightops.cli.main import run
from weightops.errors import OutputError
from weightops.statistics import resuming
from weightops.statistics.collect import statistic_of
from weightops.statistics.resuming import collect_to
from weightops.statistics.runs import Run
from weightops.statistics.statistic import record_of
from weightops.support.progress import Bar


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_parts_are_the_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resuming, "PART", 3)
    whole = collect("embedded", "mnist", kind, images=8)
    once = collect_to(tmp_path / "a.safetensors", "embedded", "mnist", kind, images=8)
    assert record_of(once)["count"] == 8
    for name in whole:
        off = (whole[name] - once[name]).abs().max()
        assert off <= 1e-5 * whole[name].abs().max()
    if kind == "gram":
        assert record_of(once)["rows"] == record_of(whole)["rows"]
    calls = []

    def killed(part: Run, *others: Any, **options: Any) -> Checkpoint:
        calls.append(part.chosen.start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return statistic_of(part, *others, **options)

    out = tmp_path / "b.safetensors"
    monkeypatch.setattr(resuming, "statistic_of", killed)
    with pytest.raises(KeyboardInterrupt):
        collect_to(out, "embedded", "mnist", kind, images=8)
    assert not out.exists()
    collect_to(out, "embedded", "mnist", kind, images=8, resume=True)
    assert calls == [0, 3, 3, 6]
    assert out.read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(OutputError, match="exists"):
        collect_to(out, "embedded", "mnist", kind, images=8)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that differs from the embedded one."""
    model = dict(open_checkpoint("embedded"))
    model["visual.proj"] = model["visual.proj"] * 2
    folder = open_checkpoint("embedded").save(tmp_path_factory.mktemp("models") / "other")
    save_file(model, folder / "open_clip_model.safetensors")
    return folder


_FISHER = {"task": "mnist", "kind": "fisher", "images": 2}


@pytest.mark.parametrize("place", ["a.safetensors", ".a.partial.safetensors"])
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"task": "digits"}, "task mnist, not digits$"),
        ({"kind": "gram"}, "kind fisher, not gram$"),
        ({"labels": "true"}, "labels model, not true$"),
        ({"seed": 1}, "seed 0, not 1$"),
        ({"split": "validation"}, "split train, not validation$"),
        ({"images": 1}, "images 2, not 1$"),
        ({"model": "other"}, r"model embedded \(.*, not other"),
    ],
    ids=["task", "kind", "labels", "seed", "split", "more images", "model"],
)
def test_what_is_of_another_run_is_kept_and_told(
    place: str, asked: dict[str, Any], told: str, other_model: Path, tmp_path: Path
) -> None:
    left = tmp_path / place
    collect("embedded", **_FISHER).save(left)
    before = left.read_bytes()
    given = {"model": "embedded", **_FISHER, **asked}
    given["model"] = other_model if given["model"] == "other" else "embedded"
    with pytest.raises(OutputError, match=f"{place} is of another run: ") as caught:
        collect_to(tmp_path / "a.safetensors", **given, resume=True)
    assert re.search(told, caught.value.fact)
    assert left.read_bytes() == before
    assert list(tmp_path.iterdir()) == [left]


@pytest.mark.parametrize("place", ["a.safetensors", ".a.partial.safetensors"])
def test_what_is_damaged_is_kept_and_told(place: str, tmp_path: Path) -> None:
    left, out = tmp_path / place, tmp_path / "a.safetensors"
    collect("embedded", "mnist", images=2).save(left)
    left.write_bytes(left.read_bytes()[:-100])
    with pytest.raises(OutputError, match=f"{place} is not a sound safetensors file"):
        collect_to(out, "embedded", "mnist", images=4, resume=True)
    open_checkpoint({"w": torch.ones(2)}).save(left, overwrite=True)
    with pytest.raises(OutputError, match=f"{place} is no statistic"):
        collect_to(out, "embedded", "mnist", images=4, resume=True)
    assert list(tmp_path.iterdir()) == [left]


def test_without_resume_a_part_is_replaced_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / ".a.partial.safetensors"
    collect("embedded", "digits", images=2).save(left)
    collect_to(tmp_path / "a.safetensors", "embedded", "mnist", images=2)
    assert [record.getMessage() for record in caplog.records] == [
        f"{left}, a part of an unfinished run, is replaced"
    ]
    assert not left.exists()


def test_resuming_what_is_finished_does_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    line = ["statistics", "embedded", "--task", "mnist", "--images", "2", "-o", str(out)]
    assert run(line) == 0
    before = out.stat()
    assert run([*line, "--resume"]) == 0
    assert (out.stat().st_mtime_ns, out.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert run(line) == 1
    assert run([*line, "--images", "3", "--resume"]) == 1
    assert run([*line, "--images", "3", "--resume", "--overwrite"]) == 0
    assert record_of(open_checkpoint(out))["count"] == 3


def test_resuming_a_finished_text_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line\n" * 60)
    model, out = letter_model(tmp_path / "model", [text], steps=1), tmp_path / "a.safetensors"
    line = ["statistics", str(model), "--text", str(text), "-o", str(out)]
    assert run(line) == 0
    before = out.stat().st_mtime_ns
    assert run([*line, "--resume"]) == 0
    assert out.stat().st_mtime_ns == before
    assert run([*line, "--images", "1", "--resume"]) == 1
    assert "is of another run: images" in capsys.readouterr().err


def test_one_bar_counts_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "PART", 2)
    bars: list[tuple[Any, ...]] = []
    real = Bar.__init__

    def noted(self: Bar, *how: Any) -> None:
        bars.append(how)
        real(self, *how)

    monkeypatch.setattr(Bar, "__init__", noted)
    out = tmp_path / "a.safetensors"
    collect("embedded", "mnist", "fisher", images=2).save(tmp_path / ".a.partial.safetensors")
    bars.clear()
    collect_to(out, "embedded", "mnist", "fisher", images=6, resume=True)
    assert [bar for bar in bars if bar[1] == "fisher"] == [(6, "fisher", "images", 0.0, 2)]


def test_the_command_prints_counts_not_lists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["statistics", "embedded", "--task", "mnist", "--images", "2"]
    assert run([*line, "-o", "a.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) < 100
    assert re.search(r"input first +1 tensor\n", shown)
    assert re.search(r"rows +2 to 34 for each tensor", shown)
    assert run([*line, "-o", "b.safetensors", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"]["visual.proj"] == 2
    assert told["input_first"] == ["visual.proj"]


def test_the_model_is_not_replaced(tmp_path: Path) -> None:
    model = open_checkpoint("embedded").save(tmp_path / "model")
    file = model / "open_clip_model.safetensors"
    before = file.read_bytes()
    with pytest.raises(OutputError, match="is an input"):
        collect_to(file, model, "mnist", images=1, overwrite=True)
    line = ["statistics", str(model), "--task", "mnist", "--kind", "gram", "--images", "1"]
    assert run([*line, "-o", str(file), "--overwrite"]) == 1
    assert file.read_bytes() == before


def test_the_model_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "PART", 2)
    built, build = [], OpenClipArchitecture.build

    def counted(self: OpenClipArchitecture) -> torch.nn.Module:
        built.append(self)
        return build(self)

    monkeypatch.setattr(OpenClipArchitecture, "build", counted)
    collect_to(tmp_path / "a.safetensors", "embedded", "mnist", images=8)
    assert len(built) == 1
