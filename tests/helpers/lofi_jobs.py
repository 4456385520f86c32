"""Jobs of torchrun, with a node that dies where a test wants it to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from shlex import split

import torch

from weightops import Checkpoint, open_checkpoint
from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.formats.memory import MemorySource
from weightops.training.run_folder import states_in

RECIPE = split("--task digits --batch-size 16 --seed 5 --model embedded")

DYING = """
import os, shutil, sys, time
from dataclasses import replace
from pathlib import Path
from weightops.cli import main
from weightops.training import config
from weightops.training.process_groups import ProcessGroup
from weightops.training.run_folder import RunFolder
out = Path(sys.argv[-1])
parallel, config_for = ProcessGroup.parallel, config.config_for
keep, finish = RunFolder.keep, RunFolder.finish
def die_after(file):
    while not (out / "node0" / file).exists():
        time.sleep(0.02)
    os._exit(9)
def kept(folder, states, step):
    if folder.path.name == "node1" and step == 4:
        die_after("training.4.pt")
    keep(folder, states, step)
    if step == 4 and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        time.sleep(600)
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
        RunFolder.keep = kept
    if out.name.startswith("ends"):
        RunFolder.finish = finished
elif out.name.startswith("loses") and os.environ["RANK"] == "1":
    shutil.rmtree(out / "node1")
if "--fsdp" in sys.argv:
    ProcessGroup.parallel = checked
config.config_for = lambda *a, **k: replace(config_for(*a, **k), ema=0.5)
main.main()
"""
"""A script that runs the command line, in which node 1 dies when the folder's name says so.

"dies": before it keeps the state after step 4. Where torchrun will restart the nodes, node 0 waits
for that, because torchrun may notice late, and node 0 would end without the other. "ends": before
it writes its results. "loses": as "dies", and its folder is gone when it is restarted. Sharded
modules are checked to be sharded, and a moving average is kept.
"""


def equal(a: Checkpoint, b: Checkpoint) -> bool:
    """Return True if two checkpoints have the same names and bits."""
    left, right = a.state_dict(), b.state_dict()
    same_names = left.keys() == right.keys()
    return same_names and all(torch.equal(left[name], right[name]) for name in left)


def recorded_node(state: dict[str, torch.Tensor], **changes: object) -> Checkpoint:
    """Return a node's checkpoint with a record of its own.

    Args:
        state: the tensors.
        changes: entries of the record, such as ``base``; those of ``node`` and ``config`` are
            added to the usual ones.
    """
    node = {"index": 0, "count": 2, "data": "shuffle", "every": 0, "only": ["*"]}
    config = {"lr": 0.1, "seed": 0}
    record = {"base": "f00d", "task": "t", "source": "s", "samples": 10, **changes}
    record["node"] = node | changes.get("node", {})  # type: ignore[operator]
    record["config"] = config | changes.get("config", {})  # type: ignore[operator]
    source = MemorySource(state, "a node", record={"training": record})
    source.made_from = {"base": source.describe()}
    return Checkpoint(LinearForm.of(source))


def opened(folder: Path, *names: str) -> list[Checkpoint]:
    """Return the checkpoints in folders of a folder."""
    return [open_checkpoint(folder / name) for name in names]


def torchrun(nodes: int, processes: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start one torchrun for each node, as on machines of their own.

    Args:
        nodes: number of nodes.
        processes: processes per node.
        arguments: arguments of torchrun, then the script or module and its arguments.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    job = f"--nnodes {nodes} --nproc-per-node {processes} --master-addr 127.0.0.1".split()
    job += ["--master-port", str(port)]
    command = [sys.executable, "-m", "torch.distributed.run", *job]
    return [
        subprocess.Popen(
            [*command, "--node-rank", str(node), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in range(nodes)
    ]


def run_and_restart(script: Path, processes: int, out: Path, *options: object) -> str:
    """Run a job that torchrun restarts when one of its processes has died; return its stderr."""
    script.write_text(DYING)
    arguments = ["--max-restarts", 1, script, "lofi", *RECIPE, *options, "-o", out]
    [agent] = torchrun(1, processes, *arguments)
    printed = agent.communicate(timeout=300)[1]
    assert agent.returncode == 0, printed
    assert not [*states_in(out / "node0"), *states_in(out / "node1")]
    return printed
