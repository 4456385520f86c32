"""lo-fi against its baselines, with averages on the way."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import split

import pytest
from helpers.lofi_jobs import equal, opened, torchrun

FEW = """
from dataclasses import replace
from weightops import TASKS
from weightops.cli import main

digits = TASKS["digits"]

class Few:
    def __init__(self, split):
        self.images = digits.load(split)
        self.labels = self.images.labels[:20]
    def __len__(self):
        return 20
    def __getitem__(self, index):
        return self.images[index]

TASKS.register("few", replace(digits, name="few", load=Few))
main.main()
"""


@pytest.mark.usefixtures("one_thread")
def test_compare_and_averages_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "few.py").write_text(FEW)
    out = tmp_path / "run"
    options = split("--compare --task few --batch-size 8 --steps 4 --average-every 2 --json")
    [agent] = torchrun(1, 2, tmp_path / "few.py", "lofi", *options, "--node-size", "1", "-o", out)
    printed = agent.communicate(timeout=600)
    assert agent.returncode == 0, printed
    result = json.loads(printed[0])
    assert result == json.loads((out / "comparison.json").read_text())
    models = result["models"]
    trained = ["base", "baseline", "node0 alone", "node1 alone"]
    assert list(models) == [*trained, "average", "EMA of node0", "ensemble"]
    *nodes, merged, ema = opened(out, "node0", "node1", "merged", "node0/ema")
    assert equal(*nodes)  # the last step averaged
    assert equal(nodes[0], merged)
    assert models["average"] == models["node0 alone"] == models["node1 alone"]
    assert models["ensemble"]["under_shift"] == models["average"]["under_shift"]
    assert 0 < models["base"]["in_distribution"] < 1
    assert not equal(ema, nodes[0])
    assert all(cost["communication_seconds"] > 0 for cost in result["cost"].values())
