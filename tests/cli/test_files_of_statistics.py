"""Files that running a model has made: what the verbs for other files say of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightops import TaskVector, collect, localize, open_checkpoint, pack, verify
from weightops.cli.main import run
from weightops.errors import UnverifiedError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, statistics of it, a localised vector, and a packed file."""
    folder = tmp_path_factory.mktemp("made")
    model = open_checkpoint(open_checkpoint("embedded").save(folder / "pre"))
    for kind in ("gram", "fisher"):
        collect(model, "mnist", kind, images=2).save(folder / f"a.{kind}.safetensors")
    tuned = {n: t * 1.01 if t.is_floating_point() else t for n, t in model.items()}
    vector = TaskVector(model, tuned)
    sparse = localize(vector, "mnist", penalty=9, images=16, search_steps=1, device="cpu")
    sparse.save(folder / "sparse.safetensors")
    pack({"own": tuned, "other": dict(model)}, model, folder / "packed.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_inspect_says_what_a_statistic_is_of(
    kind: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "--no-tensors", str(made / f"a.{kind}.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert f"statistic    {kind} of " in shown
    assert f"pre ({open_checkpoint(made / 'pre').fingerprint}), by 2 train images of mnist" in shown
    assert "made from" not in shown


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("apply {made}/a.gram.safetensors --base {made}/pre -o {out}", 1, "statistic, not a task"),
        ("verify {made}/a.gram.safetensors", 3, "it is a gram statistic, which comes from running"),
        ("verify {made}/a.fisher.safetensors", 3, "`weightops statistics` makes it again"),
        ("verify {made}/sparse.safetensors", 3, "its mask was learned from images of mnist"),
        ("verify {made}/packed.safetensors:own", 3, "one of several models that share a file"),
    ],
)
def test_what_it_is_is_told(
    line: str, code: int, told: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.format(made=made, out=tmp_path / "out").split()) == code
    error = capsys.readouterr().err
    assert told in error
    assert "isn't here" not in error
    assert "weightops vector BASE" not in error


def test_python_says_so_too(made: Path) -> None:
    for name, told in (("a.gram", "it is a gram statistic"), ("sparse", "its mask was learned")):
        with pytest.raises(UnverifiedError, match=told):
            verify(made / f"{name}.safetensors")


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gram.safetensors").touch()
    for name, hint in (
        ("b.gram.safetensors", f"did you mean {tmp_path}/a.gram.safetensors?"),
        ("nowhere/b.gram.safetensors", f"there is no folder {tmp_path}/nowhere"),
        ("other.pt", ""),
        ("nosuch.safetensors", ""),
    ):
        assert run(["inspect", str(tmp_path / name)]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == f"weightops: there is no file or folder {tmp_path / name}"
        assert lines[1:] == ([f"hint: {hint}"] if hint else [])
    assert run(["inspect", str(tmp_path / "a.gram.safetensors")]) == 1
    assert "a.gram.safetensors is empty" in capsys.readouterr().err
