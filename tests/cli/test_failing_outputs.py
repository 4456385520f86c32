"""Outputs that can't be written, for every verb that edits weights: one error, and nothing left."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weightops import TaskVector, open_checkpoint
from weightops.cli.main import run

LIMITED = """
import resource, sys
from weightops.cli.main import run
import torch
limit, most, *arguments = sys.argv[1:]
resource.setrlimit(getattr(resource, limit), (int(most), int(most)))
sys.exit(run(arguments))
"""

VERBS = {
    "merge": "merge {ft} {pre} -o {out}.safetensors",
    "merge into shards": "merge {ft} {pre} -o {out} --max-shard-size 100KB",
    "apply": "apply {vector} --base {pre} -o {out}.safetensors",
    "vector": "vector {pre} {ft} -o {out}.safetensors",
    "vector --compress": "vector {pre} {ft} --compress int8 -o {out}.safetensors",
    "vector --lora": "vector {pre} {ft} --lora 64 -o {out}",
    "pack": "pack {ft} --base {pre} -o {out}.safetensors",
}
RESUMED = {name: VERBS[name] for name in ("merge", "merge into shards", "apply")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    pre, ft = ({f"{i}.weight": torch.randn(256, 256) for i in range(2)} for _ in range(2))
    TaskVector(pre, ft).save(folder / "vector.safetensors")
    for name, state in (("pre", pre), ("ft", ft)):
        open_checkpoint(state).save(folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in ("vector", "pre", "ft")}


@pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are Linux's here")
@pytest.mark.parametrize("most", [0, 50_000])
@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_leaves_nothing(
    verb: str, most: int, files: dict[str, str], tmp_path: Path
) -> None:
    command = VERBS[verb].format(**files, out=tmp_path / "out")
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, "RLIMIT_FSIZE", str(most), *command.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1, process.stderr
    last = process.stderr.splitlines()[-1]
    assert re.fullmatch(r"weightops: no space left for \S*out\S*; nothing was written", last)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are Linux's here")
@pytest.mark.parametrize("most", [4, 5])
@pytest.mark.parametrize("verb", ["pack", "merge into shards"])
def test_where_few_files_can_be_open_nothing_is_left(
    verb: str, most: int, files: dict[str, str], tmp_path: Path
) -> None:
    command = VERBS[verb].format(**files, out=tmp_path / "out")
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, "RLIMIT_NOFILE", str(most), *command.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1, process.stderr
    assert "Too many open files" in process.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", VERBS)
def test_an_output_behind_a_link(verb: str, files: dict[str, str], tmp_path: Path) -> None:
    """The file that the link names is written, and the link stays."""
    place, target = tmp_path / "out", tmp_path / "elsewhere" / "really"
    suffix = ".safetensors" if "{out}.safetensors" in VERBS[verb] else ""
    place, target = place.with_name(place.name + suffix), target.with_name(target.name + suffix)
    target.parent.mkdir()
    place.symlink_to(target)
    command = VERBS[verb].format(**files, out=tmp_path / "out").split()
    assert run(command) == 0
    assert place.is_symlink()
    assert target.exists()
    assert sorted(path.name for path in target.parent.iterdir()) == [target.name]


@pytest.mark.parametrize("verb", RESUMED)
def test_what_is_finished_is_resumed(
    verb: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = VERBS[verb].format(**files, out=tmp_path / "out").split()
    assert run(command) == 0
    assert run(command) == 1
    assert run([*command, "--resume"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("verb", [name for name in VERBS if "lora" not in name])
def test_an_output_that_is_an_input(
    verb: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {name: str(tmp_path / Path(path).name) for name, path in files.items()}
    for name, path in files.items():
        Path(own[name]).write_bytes(Path(path).read_bytes())
    if verb == "merge into shards":
        folder = tmp_path / "model"
        folder.mkdir()
        own["ft"] = str(Path(own["ft"]).rename(folder / "model.safetensors").parent)
    out = own["ft"] if "{ft}" in VERBS[verb] else own["pre"]
    command = VERBS[verb].format(**own, out=out.removesuffix(".safetensors")).split()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run([*command, "--overwrite"]) == 1
    assert "input" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
