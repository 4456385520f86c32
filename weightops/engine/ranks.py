"""Processes that share one job, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from weightops.engine.plan import Segment, unit_numel
from weightops.support.lazy import dist


@dataclass(frozen=True)
class Ranks:
    """This process among the processes that share a job."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """True for the process that prepares and completes the output."""
        return self.index == 0

    def share(self, work: Sequence[list[Segment]]) -> list[int]:
        """Return the indices of this process's units: each goes to the least loaded process."""
        loads = [0] * self.count
        own = []
        for i, unit in enumerate(work):
            rank = loads.index(min(loads))
            loads[rank] += unit_numel(unit)
            if rank == self.index:
                own.append(i)
        return own

    def wait(self) -> None:
        """Wait until all processes have called this method."""
        if self.count > 1:
            dist.barrier()


ONE_RANK = Ranks()
"""The only process of a job."""


@contextmanager
def torchrun() -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started; without ``torchrun``, this is the only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ONE_RANK
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
