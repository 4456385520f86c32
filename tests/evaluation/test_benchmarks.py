"""Benchmarks that need what is rarely there run as far as they can without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU = [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / "gpu.py")]


def test_the_benchmark_of_a_device_runs(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    small = ["--device", "cpu", "--small", "--rounds", "1", "-o", str(out)]
    subprocess.run([*GPU, *small], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["device"] == "cpu"
    assert found["evaluation"]["images_a_second"] > 0
    assert found["alpha"]["milliseconds"] > 0
    assert found["fit"]["steps_a_second"] > 0
    assert {"bus_seconds", "linear", "ties"} == found["merges"].keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_nothing_is_measured(tmp_path: Path) -> None:
    run = subprocess.run([*GPU, "-o", str(tmp_path / "x")], capture_output=True, text=True)
    assert run.returncode == 1
    assert "no CUDA device" in run.stderr
    assert not (tmp_path / "x").exists()
