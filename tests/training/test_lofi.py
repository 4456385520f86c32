"""lo-fi with real processes: who is averaged, to the bit; what is refused; what happens when a node is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightops import Checkpoint, TaskVector, TrainingConfig, finetune, open_checkpoint
from weightops.algebra.linear_form import LinearForm
from weightops.cli.main import run
from weightops.errors import (
    CheckpointError,
    MismatchError,
    NonfiniteError,
    OptionError,
    OutputError,
)
from weightops.training import lofi
from weightops.training.config import config_for
from weightops.training.finetune import batch_indices
from weightops.training.nodes import Node, _pack, _parts, _unpack, going_on
from weightops.training.run_folder import RecordedSource, RunFolder, states_in, training_record

RECIPE = ["--task", "digits", "--batch-size", "16", "--seed", "5", "--model", "embedded"]


def equal(a: Checkpoint, b: Checkpoint) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def torchrun(nodes: int, ranks: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """One torchrun for each node, as on machines of their own."""
    port = free_port()
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes",
                str(nodes),
                "--node-rank",
                str(node),
                "--nproc-per-node",
                str(ranks),
                "--master-addr",
                "127.0.0.1",
                "--master-port",
                str(port),
                *map(str, arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in range(nodes)
    ]


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """As many threads as the processes have, for the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three nodes as three commands, one after another."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("separate")
    for node in range(3):
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # one cache for all: a head depends in its last bits on threads
            patch.setenv("WEIGHTOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
            assert (
                run(
                    [
                        "finetune",
                        *RECIPE,
                        "--steps",
                        "8",
                        "--node",
                        f"{node}/3",
                        "-o",
                        str(out / f"node{node}"),
                    ]
                )
                == 0
            )
    return out


def test_nodes_see_together_what_one_run_sees() -> None:
    for data in ("shuffle", "shard"):
        batches = [
            [batch_indices(100, 10, s, 0, Node(i, 4, data)) for s in range(10)] for i in range(4)
        ]
        assert [sum(map(len, node)) for node in batches] == [20, 30, 20, 30]
        assert len({tuple(np.concatenate(node)[:20]) for node in batches}) == 4
        if data == "shard":
            seen = [set(np.concatenate(node)) for node in batches]
            assert sorted(i for images in seen for i in images) == sorted(
                {i for images in seen for i in images}
            )
    shards = [Node(i, 3, "shard").images(10, 7) for i in range(3)]
    assert sorted(np.concatenate(shards)) == list(range(10))
    assert np.array_equal(batch_indices(100, 10, 3, 0, Node()), batch_indices(100, 10, 3, 0))
    with pytest.raises(OptionError, match="numbered 0 to 3"):
        Node(4, 4)
    with pytest.raises(OptionError, match="among 4 nodes"):
        Node(0, 4).batch_size(3)


def test_a_node_checkpoint_says_how_it_was_made(separate: Path) -> None:
    node = open_checkpoint(separate / "node1")
    record = training_record(node)
    assert record is not None
    assert record == json.loads((separate / "node1" / "training.json").read_text())
    assert record["base"] == open_checkpoint("embedded").fingerprint
    assert record["config"]["steps"] == 8
    assert record["config"]["seed"] == 5
    assert record["node"] == {"index": 1, "count": 3, "data": "shuffle", "every": 0, "only": ["*"]}
    assert [
        training_record(open_checkpoint(separate / f"node{i}"))["samples"] for i in range(3)
    ] == [40, 40, 48]
    assert node.model().visual is not None
    assert training_record(open_checkpoint("embedded")) is None


def test_an_interrupted_run_is_not_thrown_away(separate: Path, tmp_path: Path) -> None:
    out = tmp_path / "node"
    out.mkdir()
    (out / "training.4.pt").write_bytes(b"state")
    config = config_for(open_checkpoint("embedded"), steps=1, batch_size=8)
    with pytest.raises(OutputError, match="holds a run that was interrupted; --resume goes on"):
        finetune("embedded", "digits", config, out=out, device="cpu")
    assert (out / "training.4.pt").read_bytes() == b"state"
    with pytest.raises(MismatchError, match="say that they are nodes, and embedded doesn't"):
        lofi.average([separate / "node0", "embedded"])


def test_averages_by_samples(
    separate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [separate / f"node{i}" for i in range(3)]
    states = [open_checkpoint(node).state_dict() for node in nodes]
    mean = lofi.average(nodes)
    for name, tensor in mean.state_dict().items():
        exact = sum(n * s[name].double() for n, s in zip((40, 40, 48), states, strict=True)) / 128
        assert torch.allclose(tensor.double(), exact, rtol=0, atol=1e-6)
    capsys.readouterr()
    assert run(["lofi", "merge", *map(str, nodes), "-o", str(tmp_path / "merged"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["nodes"][str(nodes[2])] == {"weight": 48.0, "coefficient": 0.375}
    for folder, said in (
        (tmp_path / "merged", f"* {nodes[2]}: 0.375"),
        (nodes[0], "# embedded fine-tuned on digits"),
    ):
        assert said in (folder / "README.md").read_text()
        assert run(["push", str(folder), "org/name", "--dry-run"]) == 0
    capsys.readouterr()
    assert equal(open_checkpoint(tmp_path / "merged"), mean)
    assert open_checkpoint(tmp_path / "merged").architecture is not None
    assert (
        run(["merge", *map(str, nodes), "-o", str(tmp_path / "plain"), "--weights", "40,40,48"])
        == 0
    )
    assert all(
        torch.allclose(open_checkpoint(tmp_path / "plain")[n], mean[n], atol=1e-6) for n in mean
    )


def test_averages_only_a_part(separate: Path) -> None:
    nodes = [open_checkpoint(separate / f"node{i}") for i in range(3)]
    part = lofi.average(nodes, only="visual.transformer.*").state_dict()
    whole = lofi.average(nodes).state_dict()
    for name, tensor in part.items():
        inside = name.startswith("visual.transformer.")
        assert torch.equal(tensor, whole[name] if inside else nodes[0][name]), name


def made(state: dict[str, torch.Tensor], **changes: object) -> Checkpoint:
    """A node's checkpoint with a record of its own."""
    node = {"index": 0, "count": 2, "data": "shuffle", "every": 0, "only": ["*"]} | changes.pop(
        "node", {}
    )
    config = {"lr": 0.1, "seed": 0} | changes.pop("config", {})
    record = {
        "config": config,
        "node": node,
        "base": "f00d",
        "task": "t",
        "source": "s",
        "samples": 10,
        **changes,
    }
    source = RecordedSource(state, f"node {node['index']}", training=record)
    source.made_from = {"base": source.describe()}
    return Checkpoint(LinearForm.of(source))


def test_refuses_what_does_not_belong(
    separate: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    w = {"w": torch.ones(2)}
    second = {"index": 1}
    assert len(lofi.average([made(w), made(w, node=second)])) == 1
    for other, message in (
        (
            made(w, base="beef", node=second),
            "number 1 started from another base .beef. than number 0 .f00d.",
        ),
        (
            made(w, config={"lr": 0.2}, node=second),
            "number 1 was made by another recipe than number 0: lr 0.2 / 0.1",
        ),
        (made(w, task="u", node=second), "task u / t"),
        (made(w, node=second | {"data": "shard"}), "data shard / shuffle"),
        (made(w), "number 1 saw the same images in the same order as number 0"),
        (made({"w": torch.ones(3)}, node=second), r"(?s)of other shape: w \(2,\) / \(3,\)"),
        (made({"v": torch.ones(2)}, node=second), "no tensor name in common"),
    ):
        with pytest.raises(MismatchError, match=message):
            lofi.average([made(w), other])
    lofi.average([made(w), made(w, config={"seed": 1})])  # a seed is an order of images too
    with pytest.raises(MismatchError, match="seed"):
        lofi.average(
            [
                made(w, node={"data": "shard"}),
                made(w, config={"seed": 1}, node=second | {"data": "shard"}),
            ]
        )
    caplog.clear()
    lofi.average([made(w, node={"count": 3}), made(w, node={"index": 2, "count": 3})])
    assert "of 3 nodes, these are missing: node 1" in caplog.text
    lofi.average([w, {"w": torch.zeros(2)}])
    assert "nothing says how these were made" in caplog.text
    caplog.clear()
    assert (
        len(lofi.average([made(w, samples="many"), made(w, node={"index": None})])) == 1
    )  # anyone may have written it
    assert "nothing says how these were made" in caplog.text


def test_nan_and_unfinished_nodes_are_left_out(
    separate: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unfinished = tmp_path / "node3"
    unfinished.mkdir()
    (unfinished / "training.4.pt").write_bytes(b"")
    w = {"w": torch.ones(2)}
    bad = made({"w": torch.tensor([1.0, torch.nan])}, node={"index": 1})
    average = lofi.survey([made(w), bad, made(w, config={"seed": 1}), unfinished])
    assert torch.equal(average.model["w"], torch.ones(2))
    assert average.record()["left_out"] == {
        "number 1": "NaN or Inf in 1 tensors: w",
        str(unfinished): "it isn't finished (--resume goes on with it)",
    }
    assert "left out of the average: number 1: NaN" in caplog.text
    saved = average.save(tmp_path / "merged")
    assert json.loads((saved / "lofi.json").read_text()) == average.record()
    with pytest.raises(NonfiniteError, match="no node to average"):
        lofi.average([bad])


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(
            [
                "lofi",
                *RECIPE,
                "--steps",
                "8",
                "--nodes",
                "3",
                "-o",
                str(tmp_path / "out"),
                "--dry-run",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["samples"] == {"node0": 40, "node1": 40, "node2": 48}
    assert (
        run(
            [
                "lofi",
                *RECIPE,
                "--steps",
                "8",
                "--nodes",
                "3",
                "-o",
                str(tmp_path / "out"),
                "--dry-run",
            ]
        )
        == 0
    )
    assert "samples           node0 40, node1 40, node2 48" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert run(["lofi", "--task", "digits"]) == 2
    assert run(["finetune", "--task", "digits", "--node", "4/4"]) == 2


@given(st.integers(0, 5), st.integers(1, 7), st.lists(st.integers(0, 2), max_size=60))
@settings(max_examples=60, deadline=None)
def test_killed_nodes_have_states_to_go_on_from_together(
    every: int, often: int, turns: list[int]
) -> None:
    """Whatever their speed: of each node, one of the last two states is between the same averages as the others'."""
    node, steps, at = Node(0, 3, every=every), 20, [0, 0, 0]
    with tempfile.TemporaryDirectory() as place:
        folders = [
            RunFolder(Path(place) / f"node{i}", {}, None, steps, node.stretch) for i in range(3)
        ]
        for folder in folders:
            folder.begin(resume=False, overwrite=False)
        for i in turns:
            step = at[i] + 1
            meets = node.stretch(step) > node.stretch(at[i])
            if step < steps and (
                not meets or min(at) + 1 >= step
            ):  # an average ends when all have come to it
                at[i] = step
                if step % often == 0:
                    folders[i].keep({}, step)
        held = {i: folder.begin(resume=True, overwrite=False) for i, folder in enumerate(folders)}
        plan = going_on(held, steps, node.stretch)
        assert all(len(states_in(folder.path)) <= 2 for folder in folders)
        assert len({node.stretch(step) for step in plan.values()}) == 1
        assert all(step in held[i] for i, step in plan.items())
        assert every or [*plan.values()] == [max(row) for row in held.values()]


def test_a_run_that_is_being_replaced(tmp_path: Path) -> None:
    def folder(steps: int) -> RunFolder:
        return RunFolder(
            tmp_path / "run",
            {
                "config": {"steps": steps, "seed": 0},
                "node": {"index": 0, "count": 1, "data": "shuffle"},
                "base": "b",
                "task": "t",
            },
            None,
            steps,
            lambda step: 0,
        )

    facts: dict[str, Any] = {"model": "m", "source": "s", "samples": 4}
    first = folder(4)
    assert first.begin(resume=False, overwrite=False) == [0]
    first.finish({"w": torch.ones(2)}, {}, **facts)
    assert folder(4).begin(resume=True, overwrite=False) == [0, 4]
    with pytest.raises(CheckpointError, match="holds another run: steps 4, not 6"):
        folder(6).begin(resume=True, overwrite=False)
    assert folder(6).begin(resume=False, overwrite=True) == [0]
    assert torch.equal(
        open_checkpoint(tmp_path / "run")["w"], torch.ones(2)
    )  # until there are new ones
    assert folder(6).begin(resume=True, overwrite=False) == [0]
    folder(6).keep({}, 3)
    assert folder(6).begin(resume=True, overwrite=False) == [0, 3]
    open_checkpoint({"w": torch.zeros(2)}).save(
        tmp_path / "run" / "finetuned.safetensors", overwrite=True
    )
    folder(6)._forget([3])
    with pytest.raises(
        CheckpointError, match="no record of how they were made; --overwrite starts anew"
    ):
        folder(6).begin(resume=True, overwrite=False)


def test_packing() -> None:
    state = {
        "a": torch.ones(3, dtype=torch.float16),
        "b": torch.arange(4.0),
        "c": torch.tensor(7),
        "d": torch.ones(0),
    }
    for count in (1, 2, 3, 5):
        parts = _parts(state, count)
        assert sorted(name for part in parts for name in part) == sorted(state)
        for part in parts:
            back = _unpack(_pack(state, part), state, part)
            assert all(torch.equal(back[name], state[name]) for name in part)


def test_torchrun_two_nodes_of_two(tmp_path: Path) -> None:
    out = tmp_path / "run"
    agents = torchrun(2, 2, "-m", "weightops", "lofi", *RECIPE, "--steps", "4", "-o", out, "--json")
    printed = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    told = json.loads(printed[0][0])
    assert told["means"] == "all-reduce"
    assert told["left_out"] == {}
    assert printed[1][0] == ""
    assert sorted(path.name for path in out.iterdir()) == ["merged", "node0", "node1"]
    merged = open_checkpoint(out / "merged")
    nodes = [out / "node0", out / "node1"]
    assert equal(merged, lofi.average(nodes))
    a, b = (open_checkpoint(node).state_dict() for node in nodes)
    for name in a:
        assert torch.allclose(
            merged[name].double(), (a[name].double() + b[name].double()) / 2, rtol=1e-7, atol=1e-9
        )
    # Two processes make the steps that one makes with the whole batch of the node.
    config = config_for(open_checkpoint("embedded"), steps=4, batch_size=16, seed=5)
    base = open_checkpoint("embedded")
    alone = finetune("embedded", "digits", config, node=Node(1, 2), device="cpu")
    moved, other = TaskVector(base, alone), TaskVector(alone, nodes[0])
    apart = TaskVector(alone, nodes[1]).norm() / moved.norm()
    assert apart < 0.01 < 0.5 < other.norm() / moved.norm(), (
        apart
    )  # Adam divides rounding by rounding where gradients vanish
    assert not equal(open_checkpoint(nodes[0]), open_checkpoint(nodes[1]))


DYING = """
import os, shutil, sys, time
from dataclasses import replace
from pathlib import Path
from weightops import finetuning, nodes, runs
from weightops.cli import main
out, parallel, config_for, keep, finish = (
    Path(sys.argv[-1]), nodes.Ddp.parallel, finetuning.config_for, runs.Folder.keep, runs.Folder.finish,
)
def die_after(file):
    while not (out / "node0" / file).exists():
        time.sleep(0.02)
    os._exit(9)
def kept(folder, states, step):
    if folder.path.name == "node1" and step == 4:
        die_after("training.4.pt")
    keep(folder, states, step)
def finished(folder, *args, **kwargs):
    if folder.path.name == "node1":
        die_after("training.json")
    finish(folder, *args, **kwargs)
def checked(node, module):
    module = parallel(node, module)
    held = sum(p.to_local().numel() for p in module.parameters())
    assert held < 0.6 * sum(p.numel() for p in module.parameters())
    return module
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and "--resume" not in sys.argv:
    if out.name.startswith(("dies", "loses")):
        runs.Folder.keep = kept
    if out.name.startswith("ends"):
        runs.Folder.finish = finished
elif out.name.startswith("loses") and os.environ["RANK"] == "1":
    shutil.rmtree(out / "node1")
if "--fsdp" in sys.argv:
    nodes.Ddp.parallel = checked
finetuning.config_for = lambda *a, **k: replace(config_for(*a, **k), ema=0.5)
main.main()
"""


def run_and_restart(script: Path, ranks: int, out: Path, *options: object) -> str:
    """What a job says, which torchrun starts again when one of its processes has died."""
    script.write_text(DYING)
    [agent] = torchrun(1, ranks, "--max-restarts", 1, script, "lofi", *RECIPE, *options, "-o", out)
    told = agent.communicate(timeout=300)[1]
    assert agent.returncode == 0, told
    assert not [*states_in(out / "node0"), *states_in(out / "node1")]
    return told


def test_nodes_that_average_on_the_way_go_on_together(tmp_path: Path) -> None:
    """One dies when another has kept a later state, or has ended, or loses its disk as well."""
    options = [
        "--steps",
        "6",
        "--node-size",
        "1",
        "--average-every",
        "2",
        "--checkpoint-every",
        "2",
    ]
    whole, dies, ends, loses = (tmp_path / name for name in ("whole", "dies", "ends", "loses"))
    told = [
        run_and_restart(tmp_path / "dying.py", 2, out, *options)
        for out in (whole, dies, ends, loses)
    ]
    for node in ("node0", "node1", "node0/ema", "node1/ema", "merged"):
        assert equal(open_checkpoint(whole / node), open_checkpoint(dies / node))
        assert equal(open_checkpoint(whole / node), open_checkpoint(ends / node))
    assert "going on from step 2" in told[1]
    assert "going on from step 4" in told[2]
    assert "node 1 missed averages" in told[3]
    assert "from step 4 of node 0" in told[3]
    assert equal(open_checkpoint(loses / "node0"), open_checkpoint(loses / "node1"))


def test_a_node_that_missed_averages_comes_late(tmp_path: Path) -> None:
    """It died, and the other ended without it: that is averaged, opens though states lie beside it, and is gone back from together."""
    (tmp_path / "dying.py").write_text(DYING)
    out = tmp_path / "dies"
    options = [
        *RECIPE,
        "--steps",
        "6",
        "--node-size",
        "1",
        "--average-every",
        "2",
        "--checkpoint-every",
        "2",
        "-o",
        out,
    ]
    agents = torchrun(2, 1, tmp_path / "dying.py", "lofi", *options)
    while not (out / "merged").exists() and agents[0].poll() is None:
        time.sleep(0.05)
    agents[0].terminate()  # which would wait for the other's agent
    printed = [agent.communicate(timeout=300)[1] for agent in agents]
    assert (out / "merged").exists(), printed
    assert agents[1].returncode != 0
    assert json.loads((out / "merged" / "lofi.json").read_text())["left_out"] == {
        "node1": lofi.GONE
    }
    assert equal(open_checkpoint(out / "merged"), open_checkpoint(out / "node0"))
    assert states_in(out / "node0")
    [agent] = torchrun(1, 2, tmp_path / "dying.py", "lofi", *options[:-2], "--resume", "-o", out)
    told = agent.communicate(timeout=300)[1]
    assert agent.returncode == 0, told
    assert set(json.loads((out / "merged" / "lofi.json").read_text())["nodes"]) == {
        "node0",
        "node1",
    }
    assert not [*states_in(out / "node0"), *states_in(out / "node1")]


def test_only_a_run_that_a_job_began_is_resumed_by_its_restart(
    separate: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    (out / "merged").mkdir(parents=True)
    (out / "merged" / "lofi.json").write_text("{}")
    options = [*RECIPE, "--steps", "2", "--node-size", "1", "-o", out]
    [agent] = torchrun(1, 2, "--max-restarts", 1, "-m", "weightops", "lofi", *options)
    told = agent.communicate(timeout=300)[1]
    assert agent.returncode != 0
    assert told.count("merged exists; --overwrite") >= 2
    assert (out / "merged" / "lofi.json").read_text() == "{}"


def test_sharded_nodes_make_the_same_steps_and_go_on(tmp_path: Path) -> None:
    options = [
        "--steps",
        "6",
        "--node-size",
        "2",
        "--average-every",
        "3",
        "--checkpoint-every",
        "2",
    ]
    copied, sharded, dies = (tmp_path / name for name in ("copied", "sharded", "dies"))
    run_and_restart(tmp_path / "dying.py", 4, copied, *options)
    run_and_restart(tmp_path / "dying.py", 4, sharded, *options, "--fsdp")
    assert "going on from step 2" in run_and_restart(
        tmp_path / "dying.py", 4, dies, *options, "--fsdp"
    )
    for part in ("node0", "node1", "merged", "node0/ema"):
        a, b, c = (open_checkpoint(out / part) for out in (copied, sharded, dies))
        assert equal(b, c)
        assert TaskVector(a, b).norm() < 0.01 * TaskVector(open_checkpoint("embedded"), a).norm()
    assert equal(open_checkpoint(sharded / "node0"), open_checkpoint(sharded / "node1"))


STRIDED = """
import torch
from weightops.training.nodes import connected
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


def children(process: int) -> list[int]:
    return [
        int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a worker by its parent")
def test_a_killed_node_is_left_out_and_may_come_late(separate: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [*RECIPE, "--steps", "8", "--checkpoint-every", "1", "--device", "cpu"]
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
    # Commands at other times and places make the same nodes, to the bit.
    for node in ("node1", "node2"):
        assert equal(open_checkpoint(out / node), open_checkpoint(separate / node))
    assert equal(
        open_checkpoint(out / "merged"), lofi.average([separate / "node1", separate / "node2"])
    )
    assert run(["finetune", *options, "--node", "0/3", "--resume", "-o", str(out / "node0")]) == 0
    folders = [str(out / f"node{i}") for i in range(3)]
    assert run(["lofi", "merge", *folders, "-o", str(out / "merged"), "--overwrite"]) == 0
    assert equal(
        open_checkpoint(out / "merged"), lofi.average([separate / f"node{i}" for i in range(3)])
    )


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
    """Of a model that is stored in half precision: what a node sends has the dtypes that it trains in."""
    (tmp_path / "poisoned.py").write_text(POISONED)
    out = tmp_path / "run"
    half = open_checkpoint("embedded").save(tmp_path / "half", dtype=torch.float16)
    options = [*RECIPE, "--model", half, "--steps", "2", "--average-every", "0", "--node-size", "1"]
    [agent] = torchrun(1, 2, tmp_path / "poisoned.py", "lofi", *options, "-o", out)
    printed = agent.communicate(timeout=300)
    assert agent.returncode == 0, printed
    record = json.loads((out / "merged" / "lofi.json").read_text())
    assert record["left_out"] == {"node0": lofi.DIVERGED}
    assert record["means"] == "all-reduce"
    assert equal(open_checkpoint(out / "merged"), open_checkpoint(out / "node1"))


def test_one_process_trains_node_after_node(separate: Path, tmp_path: Path) -> None:
    config = config_for(open_checkpoint("embedded"), steps=8, batch_size=16, seed=5)
    average = lofi.run("digits", tmp_path / "run", config=config, nodes=3, device="cpu")
    assert average is not None
    for i in range(3):
        assert equal(
            open_checkpoint(tmp_path / "run" / f"node{i}"), open_checkpoint(separate / f"node{i}")
        ), i
    assert equal(average.model, lofi.average([separate / f"node{i}" for i in range(3)]))
    with pytest.raises(OutputError, match="merged exists"):
        lofi.run("digits", tmp_path / "run", config=config, nodes=3, device="cpu")
    for done in ("node1/finetuned.safetensors", "merged/lofi.json"):
        (tmp_path / "run" / done).unlink()
    again = lofi.run("digits", tmp_path / "run", config=config, nodes=3, device="cpu", resume=True)
    assert again is not None
    assert again.record() == average.record()
    assert equal(open_checkpoint(tmp_path / "run" / "merged"), average.model)
    with pytest.raises(OptionError, match="start the nodes with torchrun"):
        lofi.run("digits", tmp_path / "other", config=config)
    with pytest.raises(OptionError, match="must run at once"):
        lofi.run(
            "digits",
            tmp_path / "other",
            config=TrainingConfig(steps=1),
            nodes=2,
            like=Node(every=1),
        )


FEW = """
from dataclasses import replace
from PIL import Image
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

TASKS._table["few"] = replace(digits, name="few", load=Few)
main.main()
"""


def test_compare_and_averages_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "few.py").write_text(FEW)
    out = tmp_path / "run"
    options = [
        "--compare",
        "--task",
        "few",
        "--batch-size",
        "8",
        "--steps",
        "4",
        "--average-every",
        "2",
        "--json",
    ]
    [agent] = torchrun(1, 2, tmp_path / "few.py", "lofi", *options, "--node-size", "1", "-o", out)
    printed = agent.communicate(timeout=600)
    assert agent.returncode == 0, printed
    result = json.loads(printed[0])
    assert result == json.loads((out / "comparison.json").read_text())
    models = result["models"]
    assert list(models) == [
        "base",
        "baseline",
        "node0 alone",
        "node1 alone",
        "average",
        "EMA of node0",
        "ensemble",
    ]
    nodes = [open_checkpoint(out / f"node{i}") for i in range(2)]
    assert equal(*nodes)  # as the last step averaged
    assert equal(nodes[0], open_checkpoint(out / "merged"))
    assert models["average"] == models["node0 alone"] == models["node1 alone"]
    assert models["ensemble"]["under_shift"] == models["average"]["under_shift"]
    assert 0 < models["base"]["in_distribution"] < 1
    assert not equal(open_checkpoint(out / "node0" / "ema"), nodes[0])
    assert all(cost["communication_seconds"] > 0 for cost in result["cost"].values())
