"""Nodes of several processes under torchrun: their steps, and averages over the nodes."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import split

import pytest
import torch
from helpers.lofi_jobs import RECIPE, equal, opened, run_and_restart, torchrun

from weightops import TaskVector, finetune, open_checkpoint
from weightops.errors import OptionError
from weightops.training import lofi
from weightops.training.config import config_for
from weightops.training.nodes import Node
from weightops.training.process_groups import connected

pytestmark = pytest.mark.usefixtures("one_thread")


def test_torchrun_two_nodes_of_two(tmp_path: Path) -> None:
    out = tmp_path / "run"
    agents = torchrun(2, 2, "-m", "weightops", "lofi", *RECIPE, "--steps", "4", "-o", out, "--json")
    printed = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    result = json.loads(printed[0][0])
    assert result["means"] == "all-reduce"
    assert result["left_out"] == {}
    assert printed[1][0] == ""
    assert sorted(path.name for path in out.iterdir()) == ["merged", "node0", "node1", "run.yaml"]
    merged, *nodes = opened(out, "merged", "node0", "node1")
    assert equal(merged, lofi.average([out / "node0", out / "node1"]))
    for name, tensor in merged.state_dict().items():
        mean = (nodes[0][name].double() + nodes[1][name].double()) / 2
        assert torch.allclose(tensor.double(), mean, rtol=1e-7, atol=1e-9)
    # Two processes make the steps that one makes with the whole batch of the node.
    config = config_for("embedded", steps=4, batch_size=16, seed=5)
    alone = finetune("embedded", "digits", config, node=Node(1, 2), device="cpu")
    moved = TaskVector(open_checkpoint("embedded"), alone).norm()
    to_own, to_other = (TaskVector(alone, node).norm() / moved for node in (nodes[1], nodes[0]))
    # Where gradients vanish, Adam divides rounding errors by rounding errors.
    assert to_own < 0.01 < 0.5 < to_other, (to_own, to_other)
    assert not equal(*nodes)


def test_sharded_nodes_make_the_same_steps_and_resume(tmp_path: Path) -> None:
    options = split("--steps 6 --node-size 2 --average-every 3 --checkpoint-every 2")
    copied, sharded, dies = (tmp_path / name for name in ("copied", "sharded", "dies"))
    script = tmp_path / "dying.py"
    run_and_restart(script, 4, copied, *options)
    run_and_restart(script, 4, sharded, *options, "--fsdp")
    printed = run_and_restart(script, 4, dies, *options, "--fsdp")
    assert "resuming from step 2" in printed
    for name in ("node0", "node1", "merged", "node0/ema"):
        a, b, c = (open_checkpoint(out / name) for out in (copied, sharded, dies))
        assert equal(b, c)
        moved = TaskVector(open_checkpoint("embedded"), a).norm()
        assert TaskVector(a, b).norm() < 0.01 * moved
    assert equal(*opened(sharded, "node0", "node1"))


STRIDED = """
import torch
from weightops.training.process_groups import connected
with connected(2) as node:
    tensor = torch.arange(24.0).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    node.average_({"w": tensor}, 1, 1)
    assert torch.equal(tensor, torch.arange(24.0).reshape(2, 3, 2, 2))
"""


def test_averages_on_the_way_of_strided_tensors(tmp_path: Path) -> None:
    (tmp_path / "strided.py").write_text(STRIDED)
    [agent] = torchrun(1, 2, tmp_path / "strided.py")
    printed = agent.communicate(timeout=120)
    assert agent.returncode == 0, printed


def test_nodes_that_processes_cannot_make_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(OptionError, match="start the processes with torchrun"),
        connected(fsdp=True),
    ):
        pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(OptionError, match="each node is one process"), connected(1, fsdp=True):
        pass
    with pytest.raises(OptionError, match="4 processes can't be divided into nodes of 3"):
        connected(3).__enter__()
