"""Nodes that average on the way, and resume together after one of them has died."""

from __future__ import annotations

import json
import time
from pathlib import Path
from shlex import split

import pytest
from helpers.lofi_jobs import DYING, RECIPE, equal, opened, run_and_restart, torchrun

from weightops.training import lofi
from weightops.training.run_folder import states_in

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = split("--steps 6 --node-size 1 --average-every 2 --checkpoint-every 2")


def test_nodes_that_average_on_the_way_resume_together(tmp_path: Path) -> None:
    """One node dies after the other has kept a later state, or has ended, or loses its disk too."""
    whole, dies, ends, loses = (tmp_path / name for name in ("whole", "dies", "ends", "loses"))
    script = tmp_path / "dying.py"
    printed = {out: run_and_restart(script, 2, out, *OPTIONS) for out in (whole, dies, ends, loses)}
    names = ("node0", "node1", "node0/ema", "node1/ema", "merged")
    for resumed in (dies, ends):
        for model, reference in zip(opened(resumed, *names), opened(whole, *names), strict=True):
            assert equal(model, reference)
    assert "resuming from step 2" in printed[dies]
    assert "resuming from step 4" in printed[ends]
    assert "node 1 missed averages" in printed[loses]
    assert "from step 4 of node 0" in printed[loses]
    assert equal(*opened(loses, "node0", "node1"))


def test_a_node_that_missed_averages_comes_late(tmp_path: Path) -> None:
    """One node dies, and the other ends without it.

    What there is gets averaged, and opens although states are beside it. Later both nodes go back
    to a step before it.
    """
    (tmp_path / "dying.py").write_text(DYING)
    out = tmp_path / "dies"
    command = [tmp_path / "dying.py", "lofi", *RECIPE, *OPTIONS]
    agents = torchrun(2, 1, *command, "-o", out)
    while not (out / "merged").exists() and agents[0].poll() is None:
        time.sleep(0.05)
    agents[0].terminate()  # it would wait for the other's agent
    printed = [agent.communicate(timeout=300)[1] for agent in agents]
    assert (out / "merged").exists(), printed
    assert agents[1].returncode != 0
    record = json.loads((out / "merged" / "lofi.json").read_text())
    assert record["left_out"] == {"node1": lofi.GONE}
    assert equal(*opened(out, "merged", "node0"))
    assert states_in(out / "node0")
    [agent] = torchrun(1, 2, *command, "--resume", "-o", out)
    error = agent.communicate(timeout=300)[1]
    assert agent.returncode == 0, error
    record = json.loads((out / "merged" / "lofi.json").read_text())
    assert set(record["nodes"]) == {"node0", "node1"}
    assert not [*states_in(out / "node0"), *states_in(out / "node1")]


def test_only_a_run_that_a_job_began_is_resumed_by_its_restart(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "merged").mkdir(parents=True)
    (out / "merged" / "lofi.json").write_text("{}")
    command = ["-m", "weightops", "lofi", *RECIPE, *split("--steps 2 --node-size 1 -o"), out]
    [agent] = torchrun(1, 2, "--max-restarts", 1, *command)
    error = agent.communicate(timeout=300)[1]
    assert agent.returncode != 0
    assert error.count("merged exists") >= 2
    assert error.count("--overwrite replaces") >= 2
    assert (out / "merged" / "lofi.json").read_text() == "{}"
