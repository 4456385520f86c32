from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.nets import Net, perturbed
from torch import nn
from tqdm import tqdm

os.environ["WEIGHTOPS_PRECISION"] = "float32"  # alike on all processors, in all processes
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
torch.set_num_threads(max(torch.get_num_threads() // workers, 1))
os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # of the processes that tests start

TRIED = pytest.StashKey[str]()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    # what --quiet does to its process
    logging.getLogger("weightops").setLevel(logging.NOTSET)
    monkeypatch.setattr(tqdm, "__init__", tqdm.__init__)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def attacks() -> str:
    """Return what the attacks tried, where they were collected."""
    if not {"helpers.gadgets", "test_mutants"} <= sys.modules.keys():
        return ""
    gadgets, mutants = sys.modules["helpers.gadgets"].GADGETS, sys.modules["test_mutants"]
    kinds = [*mutants.FORMS.values(), *mutants.INSIDE.values()]
    damaged = sum(count for count, *_ in kinds)
    return (
        f"attacks: {len(gadgets)} gadgets in 4 containers, "
        f"{damaged:,} damaged files of {len(kinds)} kinds"
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send it from a worker, which prints nothing."""
    getattr(session.config, "workeroutput", {})["attacks"] = attacks()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[TRIED] = getattr(node, "workeroutput", {}).get("attacks", "")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if tried := config.stash.get(TRIED, attacks()):
        terminalreporter.write_line(tried)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def tuned(net: nn.Module) -> nn.Module:
    return perturbed(net, 1)


@pytest.fixture
def saved(net: nn.Module, tuned: nn.Module, tmp_path: Path) -> tuple[Path, Path]:
    from weightops import open_checkpoint

    return open_checkpoint(net).save(tmp_path / "pre.safetensors"), open_checkpoint(tuned).save(
        tmp_path / "ft.safetensors"
    )
