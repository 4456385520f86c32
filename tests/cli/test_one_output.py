"""Two jobs with one output, for every verb that writes: the second says who is writing it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightops import TaskVector, open_checkpoint
from weightops.cli.main import run

HOLDER = """
import sys
from pathlib import Path
from weightops.support.atomic import atomic_output

with atomic_output(Path(sys.argv[1])) as temporary:
    print("begun", flush=True)
    sys.stdin.read()
    temporary.write_text("the first job's")
"""

WEIGHTS = {
    "merge": "merge {ft} {pre}",
    "apply": "apply {vector} --base {pre}",
    "vector": "vector {pre} {ft}",
    "vector --compress": "vector {pre} {ft} --compress int8",
    "vector --lora": "vector {pre} {ft} --lora 2",
    "pack": "pack {ft} --base {pre}",
}
SCORED = {
    "patch": "patch --task digits --steps 1",
    "negate": "negate --target digits --control shapes --steps 1",
    "add": "add --tasks digits,shapes --steps 1",
    "finetune": "finetune --task digits --steps 1",
    "lofi": "lofi --task digits --nodes 1 --steps 1",
    "soup": "soup embedded embedded --tasks digits",
    "statistics": "statistics embedded --task digits --images 4",
    "evaluate": "evaluate embedded --tasks digits",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    import torch

    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    pre, ft = ({"a.weight": torch.randn(8, 8), "a.bias": torch.randn(8)} for _ in range(2))
    vector = folder / "vector.safetensors"
    TaskVector(pre, ft).save(vector)
    saved = {name: folder / f"{name}.safetensors" for name in ("pre", "ft")}
    for name, state in (("pre", pre), ("ft", ft)):
        open_checkpoint(state).save(saved[name])
    return {"vector": str(vector), **{name: str(path) for name, path in saved.items()}}


@pytest.fixture
def held(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Return an output that another process is writing; it ends with the test."""
    verb = request.node.callspec.params["verb"]
    single = verb not in SCORED and verb != "vector --lora"
    out = tmp_path / "out" / ("out.safetensors" if single or verb == "statistics" else "out")
    out.parent.mkdir()
    shared = out
    if verb == "lofi":  # whose nodes share a folder, and have one each in it
        shared, out = out, out / "node0"
        shared.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        yield shared
        process.communicate()
    assert out.read_text() == "the first job's"
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("verb", [*WEIGHTS, *SCORED])
def test_the_second_of_two_jobs_is_refused(
    verb: str, held: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in held.parent.iterdir())
    command = {**WEIGHTS, **SCORED}[verb].format(**files)
    code = run([*command.split(), "-o", str(held)])
    error = capsys.readouterr().err
    assert code == 1, error
    assert f"{held / 'node0' if verb == 'lofi' else held} is being written by process" in error
    assert sorted(path.name for path in held.parent.iterdir()) == before
