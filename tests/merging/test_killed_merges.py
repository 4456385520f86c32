"""Merges that are killed, resumed and shared among processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.merges import same_files

from weightops import open_checkpoint
from weightops.cli.main import run
from weightops.errors import OutputError
from weightops.merging.merge import merge

KILLS = """
import json, os, random, signal, sys, time
import torch
import weightops.engine.plan as engine
from weightops import open_checkpoint
from weightops.engine import write
from weightops.support.atomic import stage_of
from weightops.merging.merge import merge
from pathlib import Path

torch.set_num_threads(2)
engine.SEGMENT = 1 << 14
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
models = [str(folder / f"m{i}.safetensors") for i in range(3)]

def in_child(out, **options):
    pid = os.fork()
    if pid:
        return pid
    merged = merge(models[1:], "ties", base=models[0], density=0.5)
    merged.save(out, max_shard_size=1_000_000, **options)
    os._exit(0)

def begun(out):
    journals = stage_of(out).glob("journal.0.*")
    return any(path.read_text().count(chr(10)) > 1 for path in journals)

def content(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())} if path.exists() else None

start = time.monotonic()
assert os.waitpid(in_child(folder / "reference"), 0)[1] == 0
duration = time.monotonic() - start
reference = content(folder / "reference")
generator, seen = random.Random(0), {"nothing": 0, "old": 0, "resumed": 0, "done": 0}
for i in range(rounds):
    out = folder / f"out{i}"
    old = None
    if i % 2:
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"old")
        old = content(out)
    pid = in_child(out, overwrite=bool(i % 2))
    if i % 5 == 4:  # as soon as there is something to resume, on a slow machine, too
        while not begun(out) and content(out) in (None, old):
            time.sleep(0.001)
    else:
        time.sleep(generator.uniform(0, 0.6 * duration))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    now = content(out)
    assert now in (old, reference), (i, sorted(now or ()))
    if now == reference:
        seen["done"] += 1
    else:
        seen["resumed" if begun(out) else "old" if old else "nothing"] += 1
        assert os.waitpid(in_child(out, overwrite=bool(i % 2), resume=True), 0)[1] == 0
        assert content(out) == reference, i
    assert not stage_of(out).exists()
print(json.dumps(seen))
"""


def test_killed_at_fifty_moments(tmp_path: Path) -> None:
    """What is left is nothing, the old output, or a state that is resumed to the same bytes."""
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        state = {
            f"layers.{j}.weight": torch.randn(300, 300, generator=generator) for j in range(12)
        }
        open_checkpoint(state).save(tmp_path / f"m{i}.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "50"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert sum(seen.values()) == 50
    assert seen["resumed"] >= 5, seen


def test_ranks_write_the_same_bytes(model_files: tuple[str, list[str]], tmp_path: Path) -> None:
    base, models = model_files
    line = ["merge", *models, "--method", "dare_ties", "--base", base, "--max-shard-size", "1KB"]
    assert run([*line, "-o", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "3", "-m", "weightops"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *line, "-o", str(tmp_path / "three")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 tensors") == 1
    one, three = (tmp_path / folder / "README.md" for folder in ("one", "three"))
    assert three.read_text().replace("-o three", "-o one") == one.read_text()
    three.write_text(one.read_text())
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes()
    assert same_files(tmp_path / "one", tmp_path / "three")


def test_another_job_is_not_resumed(model_files: tuple[str, list[str]], tmp_path: Path) -> None:
    _, models = model_files
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part/journal.0").write_text("another\n")
    with pytest.raises(OutputError, match="holds what another job left"):
        merge(models).save(tmp_path / "out", resume=True)
    merge(models).save(tmp_path / "out")
    assert [p.name for p in tmp_path.glob(".out*")] == []
