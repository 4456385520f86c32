from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.lofi_jobs import RECIPE

from weightops.cli.main import run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with as many threads as the processes of torchrun have, for the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three nodes, trained by three commands, one after another."""
    out = tmp_path_factory.mktemp("separate")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # One cache for all tests: the last bits of a head depend on the number of threads.
        patch.setenv("WEIGHTOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        for node in range(3):
            options = [*RECIPE, "--steps", "8", "--node", f"{node}/3"]
            assert run(["finetune", *options, "-o", str(out / f"node{node}")]) == 0
    torch.set_num_threads(threads)
    return out
