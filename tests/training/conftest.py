from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.lofi_jobs import RECIPE
from helpers.threads import one_torch_thread

from weightops.cli.main import run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with as many threads as the processes of torchrun have, for the same bits."""
    with one_torch_thread():
        yield


@pytest.fixture(scope="session")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three nodes, trained by three commands, one after another."""
    out = tmp_path_factory.mktemp("separate")
    with one_torch_thread(), pytest.MonkeyPatch.context() as patch:
        # One cache for all tests: the last bits of a head depend on the number of threads.
        patch.setenv("WEIGHTOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        for node in range(3):
            options = [*RECIPE, "--steps", "8", "--node", f"{node}/3"]
            assert run(["finetune", *options, "-o", str(out / f"node{node}")]) == 0
    return out
