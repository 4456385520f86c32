"""The end of a lo-fi job: nodes that are killed or diverge are left out."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from shlex import split

import pytest
import torch
from helpers.lofi_jobs import RECIPE, equal, opened, torchrun

from weightops import open_checkpoint
from weightops.cli.main import run
from weightops.training import lofi
from weightops.training.run_folder import states_in

pytestmark = pytest.mark.usefixtures("one_thread")


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task/{process}/children")
    return [int(pid) for pid in tasks.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a worker by its parent")
def test_a_killed_node_is_left_out_and_may_come_late(separate: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [*RECIPE, *split("--steps 8 --checkpoint-every 1 --device cpu")]
    agents = torchrun(3, 1, "-m", "weightops", "lofi", *options, "-o", out, "--patience", "120")
    while not states_in(out / "node0") and agents[0].poll() is None:
        time.sleep(0.01)
    os.kill(children(agents[0].pid)[0], signal.SIGKILL)
    printed = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents][1:] == [0, 0], printed
    assert agents[0].returncode != 0
    assert not (out / "node0" / "finetuned.safetensors").exists()
    record = json.loads((out / "merged" / "lofi.json").read_text())
    assert record["left_out"] == {"node0": lofi.GONE}
    assert "left out of the average: node0" in printed[1][1]
    # Commands at other times and places train the same nodes, to the bit.
    names = ("node1", "node2")
    for node, reference in zip(opened(out, *names), opened(separate, *names), strict=True):
        assert equal(node, reference)
    mean = lofi.average([separate / name for name in names])
    assert equal(open_checkpoint(out / "merged"), mean)
    assert run(["finetune", *options, "--node", "0/3", "--resume", "-o", str(out / "node0")]) == 0
    folders = [str(out / f"node{index}") for index in range(3)]
    assert run(["lofi", "merge", *folders, "-o", str(out / "merged"), "--overwrite"]) == 0
    mean = lofi.average([separate / f"node{index}" for index in range(3)])
    assert equal(open_checkpoint(out / "merged"), mean)


POISONED = """
import os, sys, torch
from weightops.cli import main
from weightops.training.learners import ImageLearner
forward = ImageLearner.forward
if os.environ["RANK"] == "0":
    ImageLearner.forward = lambda *a: forward(*a) * torch.nan
main.main()
"""


def test_a_diverged_node_is_left_out(tmp_path: Path) -> None:
    """The model is stored in half precision; a node sends tensors of the dtypes it trains in."""
    (tmp_path / "poisoned.py").write_text(POISONED)
    out = tmp_path / "run"
    half = open_checkpoint("embedded").save(tmp_path / "half", dtype=torch.float16)
    options = [*RECIPE, "--model", half, *split("--steps 2 --average-every 0 --node-size 1")]
    [agent] = torchrun(1, 2, tmp_path / "poisoned.py", "lofi", *options, "-o", out)
    printed = agent.communicate(timeout=300)
    assert agent.returncode == 0, printed
    record = json.loads((out / "merged" / "lofi.json").read_text())
    assert record["left_out"] == {"node0": lofi.DIVERGED}
    assert record["means"] == "all-reduce"
    assert equal(open_checkpoint(out / "merged"), open_checkpoint(out / "node1"))
