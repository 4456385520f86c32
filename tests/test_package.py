"""The package: its surface, what importing it costs, what its files promise."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
from pathlib import Path

import weightops

ROOT = Path(__file__).parent.parent
SURFACE = [
    "Checkpoint",
    "Choice",
    "Clip",
    "EVALUATORS",
    "METHODS",
    "Point",
    "Recipe",
    "TASKS",
    "Task",
    "TaskVector",
    "TrainingConfig",
    "WeightopsError",
    "add",
    "analogy",
    "average",
    "choose",
    "compare",
    "evaluate",
    "finetune",
    "interpolate",
    "merge",
    "negate",
    "open_checkpoint",
    "patch",
    "run_experiment",
    "select",
    "soup",
]


def test_surface() -> None:
    assert weightops.__all__ == SURFACE
    for name in SURFACE:
        assert getattr(weightops, name).__doc__


def modules_after(code: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys, json; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_imports_are_light() -> None:
    heavy = {"open_clip", "datasets", "torchvision", "matplotlib", "timm", "huggingface_hub"}
    assert not modules_after("from weightops import TaskVector, Checkpoint, average") & heavy
    assert "torch" not in modules_after("import weightops")
    assert "torch" not in modules_after(
        "from weightops.cli.main import run; run(['--help']); run(['tasks'])"
    )


def test_the_embedded_model_is_small() -> None:
    folder = ROOT / "weightops" / "clip"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6e6
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "merges.txt.gz",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    }


def test_dependencies_are_the_six() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = {line.split(">")[0] for line in config["options"]["install_requires"].split()}
    assert required == {
        "torch",
        "open_clip_torch",
        "safetensors",
        "huggingface_hub",
        "datasets",
        "tqdm",
    }
