"""Folders with a model card are uploaded to a local server that answers like the Hub."""

from __future__ import annotations

from pathlib import Path

from helpers.fake_hub import FakeHub, fake_hub
from helpers.hub_cache import python

PUSH = """
import os, pathlib, sys, torch
from weightops import open_checkpoint
from weightops.cli.main import run
os.chdir(os.environ["WORK"])
open_checkpoint({"w": torch.ones(2)}).save("edited")
assert run(["push", "edited", "org/mine"]) == 1  # without a card
pathlib.Path("edited/README.md").write_text("---\\ntags: [merge]\\n---\\n")
assert run(["push", "edited", "org/mine", "--dry-run"]) == 0
print("---")
assert run(["push", "edited", "org/mine"]) == 0
assert run(["push", "edited", "other/mine"]) == 1
assert run(["merge", "edited", "edited", "-o", "merged", "--push", "org/mine"]) == 0
assert run(["merge", "edited", "edited", "-o", "merged.safetensors", "--push", "org/mine"]) == 2
"""


def test_pushing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with fake_hub({}) as environment:
        output = python(
            PUSH, WORK=str(work), HF_HOME=str(tmp_path / "home"), HF_TOKEN="hf_none", **environment
        )
    planned, _, done = output.partition("---")
    assert "would be pushed to org/mine" in planned
    assert "pushed to http" in done
    assert FakeHub.uploaded.keys() == {"README.md", "model.safetensors"}
    written = (work / "merged" / "model.safetensors").read_bytes()
    assert FakeHub.uploaded["model.safetensors"] == written
    assert b"# linear of 2 checkpoints" in FakeHub.uploaded["README.md"]
