"""Extensions of other packages on the command line: in help, in lists, and when they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.plugins import install

CODE = """
import torch

def halved_sum(deltas: torch.Tensor, *, share: float = 0.5) -> torch.Tensor:
    '''Sum a share of each delta.

    Args:
        deltas: shape ``(k, ...)``.
        share: the share.
    '''
    return share * deltas.sum(0)

def brightness(model, task, split):
    '''Mean of the images.'''
    return {"mean": 0.5, "n": 1}
"""
POINTS = {
    "weightops.methods": {"halved_sum": "halved_sum", "broken": "missing"},
    "weightops.evaluators": {"brightness": "brightness"},
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("packages"), "outside_cli", CODE, POINTS)


def weightops(packages: Path, *arguments: str) -> tuple[str, str]:
    """Run the command where the packages are installed; return what it prints."""
    command = [sys.executable, "-m", "weightops", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return run.stdout, run.stderr


def test_help_names_plugins(packages: Path) -> None:
    merge, _ = weightops(packages, "merge", "--help")
    assert "From plug-ins: halved_sum, broken." in " ".join(merge.split())
    evaluate, _ = weightops(packages, "evaluate", "--help")
    assert "|brightness]" in evaluate


def test_one_that_fails_is_a_warning_that_names_its_package(packages: Path) -> None:
    listed, warned = weightops(packages, "methods")
    assert "halved_sum" in listed
    assert "ties" in listed
    assert warned.count("can't be loaded from outside_cli") == 1
    shown, _ = weightops(packages, "methods", "halved_sum")
    assert "--share float, by default 0.5" in shown
