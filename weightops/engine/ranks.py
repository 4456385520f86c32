"""Several processes that share one job, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from weightops.engine.plan import Segment, size


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a job."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """True for the one that prepares and completes the output."""
        return self.index == 0

    def share(self, work: Sequence[list[Segment]]) -> list[int]:
        """Which units are this process's: the largest first, each to whoever has least."""
        loads = [0] * self.count
        mine = []
        for i, unit in enumerate(work):
            rank = loads.index(min(loads))
            loads[rank] += size(unit)
            if rank == self.index:
                mine.append(i)
        return mine

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def torchrun() -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, joined for as long as this lasts; this one alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
