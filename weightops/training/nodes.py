"""The nodes of a run: which samples each sees, and what the training loop asks of any node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from weightops.errors import OptionError
from weightops.support.arguments import check_arguments
from weightops.support.lazy import nn, torch
from weightops.support.ranges import Range

T = TypeVar("T")
NodeData = Literal["shuffle", "shard"]


@dataclass(frozen=True)
class Node:
    """One node of a run, and how the nodes work together (arXiv 2210.11948).

    The default is the only node of its run.

    Attributes:
        index: number of the node, counted from 0.
        count: number of nodes.
        data: "shuffle" if each node draws from all samples in an order of its own; "shard" if each
            draws from a part of them.
        every: steps between averages over the nodes; 0 for no average before the end.
        only: name patterns of the tensors that are averaged; the others are the first node's.

    Raises:
        OptionError: if there is no node of this index, or ``every`` is negative.

    >>> [Node(index, 3).batch_size(128) for index in range(3)]
    [42, 43, 43]
    """

    index: int = 0
    count: int = 1
    data: NodeData = "shuffle"
    every: Annotated[int, Range(min=0)] = 0
    only: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        check_arguments(type(self), **vars(self))
        if not 0 <= self.index < self.count:
            raise OptionError(
                f"there is no node {self.index} of {self.count}",
                hint=f"nodes are numbered 0 to {self.count - 1}",
            )

    def batch_size(self, total: int) -> int:
        """Return how many of a step's ``total`` samples are this node's.

        Raises:
            OptionError: if there are fewer samples than nodes.
        """
        if total < self.count:
            raise OptionError(f"a batch of {total} can't be divided among {self.count} nodes")
        return (self.index + 1) * total // self.count - self.index * total // self.count

    def key(self, *numbers: int) -> list[int]:
        """Return a seed from numbers that differs from those of other nodes."""
        return [*numbers, self.index + 1] if self.count > 1 else [*numbers]

    def averages_before(self, step: int) -> int:
        """Return how many averages over the nodes there are up to the end of a step."""
        return step // self.every if self.every else 0

    def samples(self, total: int, seed: int) -> npt.NDArray[np.int64]:
        """Return the indices that this node draws from; shards are disjoint, and cover all."""
        if self.data == "shuffle" or self.count == 1:
            return np.arange(total)
        return np.random.default_rng([seed, total]).permutation(total)[self.index :: self.count]


class Resumable(Protocol):
    """A run whose states one node can send to another."""

    steps: int

    def state_bytes(self, step: int) -> bytes: ...
    def accept_state(self, content: bytes, step: int) -> None: ...


class OneProcess:
    """A node of one process, which sends nothing; the base of nodes of several processes.

    Attributes:
        rank: number of this process in its node.
        size: processes in the node.
        seconds: seconds that this process spent in communication, with the time it waited. What
            FSDP sends within a node isn't counted. On CUDA, the launch is counted.
        restarted: True if torchrun has started the job again after the node's run was begun.
    """

    rank = 0
    size = 1
    seconds = 0.0
    restarted = False

    def mark_begun(self) -> None:
        """Record in the job that the node's run has begun, so that a restart resumes the run."""

    def as_one_node(self) -> OneProcess:
        """Return all processes of all nodes as one node, which communicates in every step."""
        return self

    def local_slice(self, count: int) -> slice:
        """Return which of the ``count`` samples of a node's batch are this process's.

        Raises:
            OptionError: if there are fewer samples than processes.
        """
        if count < self.size:
            raise OptionError(
                f"a batch of {count} can't be divided among the {self.size} processes of a node"
            )
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return a module whose backward pass averages gradients over the node's processes.

        Build optimizers after this call, because it may replace the parameters.
        """
        return module

    def broadcast(self, value: T) -> T:
        """Broadcast a value from the node's first process to the others."""
        return value

    def agree_on_start(self, resumable: Sequence[int], node: Node, run: Resumable) -> int:
        """Return the step to resume from, of the steps that the run can resume from.

        Only the first process of a node calls this.
        """
        return max(resumable)

    def average_(self, state: Mapping[str, torch.Tensor], samples: int, step: int) -> None:
        """Replace tensors by their mean over the nodes, weighted by samples, in place."""
        raise NotImplementedError


def common_start(
    resumable: Mapping[int, Sequence[int]], steps: int, averages_before: Callable[[int], int]
) -> dict[int, int]:
    """Return node -> step to resume from, so that all nodes are between the same two averages.

    These are the averages for which most nodes have a state, and of those the latest. A node that
    has no state there, because the others averaged without it, gets the step of another's state.

    Args:
        resumable: node -> steps that the node can resume from.
        steps: steps of the whole run; the last step has no state, nor has step 0.
        averages_before: step -> number of averages up to its end.

    >>> common_start({0: [0, 5, 9], 1: [0, 3]}, 20, lambda step: step // 4)
    {0: 0, 1: 3}
    >>> common_start({0: [5, 9], 1: [0, 3]}, 20, lambda step: step // 4)
    {0: 9, 1: 9}
    """
    own = {
        node: {averages_before(step): step for step in sorted(row)}
        for node, row in resumable.items()
    }
    states = {
        averages_before(step): step
        for row in resumable.values()
        for step in sorted(row)
        if 0 < step < steps
    }
    holders = Counter(averages for row in own.values() for averages in row)
    reachable = [n for n in holders if holders[n] == len(resumable) or n in states]
    goal = max(reachable, key=lambda averages: (holders[averages], averages))
    return {node: row.get(goal, states.get(goal, 0)) for node, row in own.items()}
