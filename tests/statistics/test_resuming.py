"""A statistic that is collected in parts, and continued after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weightops import collect, open_checkpoint
from weightops.checkpoints.libraries.open_clip import OpenClipArchitecture
from weightops.cli.main import run
from weightops.errors import OutputError
from weightops.statistics import resuming
from weightops.statistics.resuming import collect_to
from weightops.statistics.statistic import record_of


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
    real, calls = collect, []

    def killed(*args: object, **options: int) -> object:
        calls.append(options["start"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)  # type: ignore[arg-type]

    out = tmp_path / "b.safetensors"
    monkeypatch.setattr(resuming, "collect", killed)
    with pytest.raises(KeyboardInterrupt):
        collect_to(out, "embedded", "mnist", kind, images=8)
    assert not out.exists()
    collect_to(out, "embedded", "mnist", kind, images=8, resume=True)
    assert calls == [0, 3, 3, 6]
    assert out.read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(OutputError, match="exists"):
        collect_to(out, "embedded", "mnist", kind, images=8)


def test_a_part_of_another_task_is_left_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "a.safetensors"
    collect("embedded", "digits", images=2).save(tmp_path / ".a.partial.safetensors")
    found = collect_to(out, "embedded", "mnist", images=4, resume=True)
    assert "is of another run" in caplog.text
    plain = collect("embedded", "mnist", images=4)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert open_checkpoint(out).keys() == plain.keys()


@pytest.mark.parametrize(
    ("left", "asked"),
    [({"labels": "true"}, {}), ({"seed": 1}, {}), ({"images": 4}, {"images": 2})],
    ids=["labels", "seed", "more images"],
)
def test_a_part_of_another_run_is_left_aside(
    left: dict[str, object],
    asked: dict[str, object],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "a.safetensors"
    given = {"images": 2, **left}
    collect("embedded", "mnist", "fisher", **given).save(tmp_path / ".a.partial.safetensors")
    found = collect_to(out, "embedded", "mnist", "fisher", **{"images": 3, **asked}, resume=True)
    assert "is of another run" in caplog.text
    plain = collect("embedded", "mnist", "fisher", **{"images": 3, **asked})
    assert record_of(found)["count"] == record_of(plain)["count"]
    assert all(torch.equal(found[name], plain[name]) for name in plain)


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
