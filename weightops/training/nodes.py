"""A node of a run: which images it sees, and the processes that make it up: one, a DDP group, or one group of several (arXiv 2210.11948)."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from weightops.algebra.names import NameRules
from weightops.errors import CheckpointError, NonfiniteError, OptionError
from weightops.support.text import first_few
from weightops.task_vector import average
from weightops.training.fsdp import gather, local_part, shard_

log = logging.getLogger("weightops")

T = TypeVar("T")
NodeData = Literal["shuffle", "shard"]

PATIENCE = 1800.0
"""Seconds that a node which is done waits for the others."""


HELD = 8
"""More states than a run keeps."""


@dataclass(frozen=True)
class Node:
    """One node of a run, and how the nodes work together; by default the only one.

    Attributes:
        index: which, counted from 0.
        count: of how many.
        data: "shuffle" for its own order of all images, "shard" for its own part of them in its own order.
        every: steps between averages over the nodes; 0 for none before the end.
        only: name patterns of the tensors that are averaged; the others are the first node's.

    Raises:
        OptionError: if there is no such node.

    >>> [Node(index, 3).batch_size(128) for index in range(3)]
    [42, 43, 43]
    """

    index: int = 0
    count: int = 1
    data: NodeData = "shuffle"
    every: int = 0
    only: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise OptionError(
                f"there is no node {self.index} of {self.count}: they are numbered 0 to {self.count - 1}"
            )

    def batch_size(self, total: int) -> int:
        """How many of the images of a step are this node's: all nodes together see as many as one run without nodes.

        Raises:
            OptionError: if there is none for each node.
        """
        if total < self.count:
            raise OptionError(f"a batch of {total} can't be divided among {self.count} nodes")
        return (self.index + 1) * total // self.count - self.index * total // self.count

    def key(self, *numbers: int) -> list[int]:
        """The seed of something random, this node's own."""
        return [*numbers, self.index + 1] if self.count > 1 else [*numbers]

    def stretch(self, step: int) -> int:
        """How many averages over the nodes come before the end of a step."""
        return step // self.every if self.every else 0

    def images(self, total: int, seed: int) -> npt.NDArray[np.int64]:
        """The indices that this node draws from: shards are disjoint, and together all images."""
        if self.data == "shuffle" or self.count == 1:
            return np.arange(total)
        return np.random.default_rng([seed, total]).permutation(total)[self.index :: self.count]


class Resumable(Protocol):
    """A run whose states go from node to node."""

    steps: int

    def give(self, step: int) -> bytes: ...
    def take(self, content: bytes, step: int) -> None: ...


class OneProcess:
    """A node that is one process, and sends nothing. What the training loop asks of any node.

    Attributes:
        rank: of this process in its node.
        size: processes in the node.
        seconds: spent in communication by this process, waiting included, but for what FSDP sends within a node. On CUDA, until
            it was launched.
    """

    rank = 0
    size = 1
    seconds = 0.0
    begun = False
    """True if torchrun has started this job again, after the node's run was begun."""

    def mark(self) -> None:
        """Keep in mind, in the job, that the node's run is begun: it may replace what it finds, or found nothing."""

    def everyone(self) -> OneProcess:
        """All processes of all nodes as one node: the baseline, which communicates in every step."""
        return self

    def part(self, count: int) -> slice:
        """Which of the samples of a node's batch are this process's.

        Raises:
            OptionError: if there is none for each process.
        """
        if count < self.size:
            raise OptionError(
                f"a batch of {count} can't be divided among the {self.size} processes of a node"
            )
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients are averaged over the node's processes in every backward pass. Make optimizers after it."""
        return module

    def tell(self, value: T) -> T:
        """What the node's first process has, in all of them."""
        return value

    def agree(self, held: Sequence[int], node: Node, run: Resumable) -> int:
        """Which of the steps that a run can go on from it goes on from. For first processes."""
        return max(held)

    def average_(self, state: Mapping[str, torch.Tensor], samples: int, step: int) -> None:
        """Make the tensors the mean over nodes, weighted by samples, in place."""
        raise NotImplementedError


class Job(NamedTuple):
    """What outlives the processes that torchrun starts again."""

    store: Any
    key: str


class ProcessGroup(OneProcess):
    """A node of several processes, each with its part of a batch.

    Args:
        group: the processes.
        job: where it is kept in mind that the node's run is begun.
        fsdp: parameters, gradients and the optimizer's state are sharded over them (FSDP2), not copied; the
            module stays sharded.
    """

    def __init__(self, group: Any, *, fsdp: bool = False, job: Job | None = None) -> None:
        self.group, self.fsdp, self.job = group, fsdp, job
        self.begun = job is not None and job.store.check([job.key])
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._first = dist.get_global_rank(group, 0)
        self._until = 0.0

    def mark(self) -> None:
        if self.job is not None:
            self.job.store.set(self.job.key, "yes")

    def parallel(self, module: nn.Module) -> nn.Module:
        if self.size == 1:
            return module
        if self.fsdp:
            shard_(module, self.group)
            return module
        wrapped = DistributedDataParallel(module, process_group=self.group)
        wrapped.register_comm_hook(self, lambda node, bucket: _all_reduce(node, bucket.buffer()))
        return wrapped

    def tell(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, self._first, group=self.group)
        return box[0]


def _all_reduce(node: ProcessGroup, gradients: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """The mean of a bucket of gradients over a node's processes, as DDP does it by itself, and timed."""
    begun = time.monotonic()
    work = dist.all_reduce(gradients.div_(node.size), group=node.group, async_op=True)

    def done(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        now = time.monotonic()
        node.seconds += now - max(begun, node._until)  # buckets overlap
        node._until = now
        return future.value()[0]

    reduced: torch.futures.Future[torch.Tensor] = work.get_future().then(done)
    return reduced


class LofiNode(ProcessGroup):
    """One of several nodes, and a line to the others' first processes, which is silent until they average.

    Args:
        group: this node's processes.
        leaders: the first processes of all nodes, over gloo.
        patience: seconds to wait for another node.
        fsdp: as of `ProcessGroup`.
        job: as of `ProcessGroup`.
    """

    def __init__(
        self,
        group: Any,
        leaders: Any,
        patience: float = PATIENCE,
        *,
        fsdp: bool = False,
        job: Job | None = None,
    ) -> None:
        super().__init__(group, fsdp=fsdp, job=job)
        self._leaders = leaders
        self._patience = timedelta(seconds=patience)
        self.index = dist.get_rank() // self.size
        self.count = dist.get_world_size() // self.size

    def everyone(self) -> OneProcess:
        if self.fsdp:
            raise OptionError(
                "a model that is sharded stays so, and can't be trained once more: compare without fsdp"
            )
        return ProcessGroup(dist.group.WORLD, job=self.job)

    def agree(self, held: Sequence[int], node: Node, run: Resumable) -> int:
        """As every node's: the last step between the same two averages as the others', or one whose state another node gives."""
        if not node.every:
            return max(held)
        mine = torch.tensor([-1] * HELD + sorted(held))[-HELD:].contiguous()
        found = self._swap(
            dict.fromkeys(range(self.count), mine), dict.fromkeys(range(self.count), HELD)
        )
        steps = {
            index: [step for step in row.tolist() if step >= 0]
            for index, row in sorted(found.items())
        }
        if len(steps) < self.count:
            log.warning(
                "going on without %s",
                first_few(f"node {i}" for i in range(self.count) if i not in steps),
            )
        plan = going_on(steps, run.steps, node.stretch)
        if plan[self.index] < max(held):
            behind = min(steps, key=lambda index: max(steps[index]))
            log.warning(
                "going back from step %d: node %d has come no further than %d",
                max(held),
                behind,
                max(steps[behind]),
            )
        lost = [index for index, step in plan.items() if step not in steps[index]]
        if lost:
            step = plan[lost[0]]
            self._hand_over(run, step, next(index for index in steps if step in steps[index]), lost)
        return plan[self.index]

    def _hand_over(self, run: Resumable, step: int, giver: int, lost: Sequence[int]) -> None:
        """Send a node's state to those that the others went on without."""
        size = torch.zeros(1, dtype=torch.int64)
        if self.index == giver:
            names = first_few(f"node {index}" for index in lost)
            log.warning("%s missed averages, and go on from step %d of node %d", names, step, giver)
            content = torch.frombuffer(bytearray(run.give(step)), dtype=torch.uint8)
            for other in (dist.get_global_rank(self._leaders, index) for index in lost):
                dist.send(torch.tensor([len(content)]), other, group=self._leaders)
                dist.send(content, other, group=self._leaders)
        elif self.index in lost:
            other = dist.get_global_rank(self._leaders, giver)
            dist.recv(size, other, group=self._leaders)
            content = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(content, other, group=self._leaders)
            run.take(content.numpy().tobytes(), step)

    def reports(self, samples: int, step: int) -> dict[int, int]:
        """The samples that every node which answers has seen, 0 from one with nothing to give. For first processes.

        Raises:
            CheckpointError: if another node is at another step.
        """
        mine = torch.tensor([samples, step])
        found = self._swap(
            {node: mine for node in range(self.count)}, dict.fromkeys(range(self.count), 2)
        )
        for node, report in found.items():
            if int(report[1]) != step:
                raise CheckpointError(
                    f"node {node} is at step {int(report[1])} and node {self.index} at {step}: nodes that average on the way start together"
                )
        return {node: int(found[node][0]) for node in sorted(found)}

    def exchange(
        self,
        state: Mapping[str, torch.Tensor],
        weights: Mapping[int, int],
        only: Sequence[str] = ("*",),
    ) -> dict[str, torch.Tensor]:
        """The weighted mean of the nodes' tensors, to the bit as `average` makes it from their checkpoints.

        Each node averages a part of the tensors, and sends the result to the others. For first processes.

        Args:
            state: this node's tensors, on CPU.
            weights: node -> weight, for all that take part; of those with 0 nothing is used.
            only: name patterns of the tensors to average; the others are the first node's.

        Raises:
            NonfiniteError: if all weights are 0.
            RuntimeError: if a node is lost meanwhile.
        """
        finite = [node for node in weights if weights[node]]
        if not finite:
            raise NonfiniteError("no node has finite weights to average")
        parts = dict(zip(weights, _parts(state, len(weights)), strict=True))
        mine = parts[self.index]
        size = _pack(state, mine).numel()
        begun = time.monotonic()
        received = self._swap(
            {node: _pack(state, part) for node, part in parts.items()}, dict.fromkeys(parts, size)
        )
        self.seconds += time.monotonic() - begun
        if len(received) < len(weights):
            raise RuntimeError(f"lost a node: only {sorted(received)} of {sorted(weights)} answer")
        pieces = [_unpack(received[node], state, mine) for node in finite]
        mean = _pack(_mean(pieces, [float(weights[node]) for node in finite], only), mine)
        begun = time.monotonic()
        sizes = {node: _pack(state, part).numel() for node, part in parts.items()}
        means = self._swap(dict.fromkeys(parts, mean), sizes)
        self.seconds += time.monotonic() - begun
        if len(means) < len(weights):
            raise RuntimeError(f"lost a node: only {sorted(means)} of {sorted(weights)} answer")
        return {
            name: t
            for node, part in parts.items()
            for name, t in _unpack(means[node], state, part).items()
        }

    def average_(self, state: Mapping[str, torch.Tensor], samples: int, step: int) -> None:
        here = {name: gather(tensor) for name, tensor in state.items()}
        if self.rank == 0:
            finite = all(bool(torch.isfinite(tensor).all()) for tensor in here.values())
            here = self.exchange(here, self.reports(samples if finite else 0, step))
        for name, tensor in state.items():
            mean = here[name].to(tensor.device).contiguous()
            if self.size > 1:
                dist.broadcast(mean, self._first, group=self.group)
            tensor.detach().copy_(local_part(mean, tensor))

    def _swap(
        self, outgoing: Mapping[int, torch.Tensor], sizes: Mapping[int, int]
    ) -> dict[int, torch.Tensor]:
        """Send a tensor to each node and receive one of its size (and my dtype) from each; those that answer, and my own."""
        received = {self.index: outgoing[self.index]}
        works: dict[int, tuple[Any, Any, torch.Tensor]] = {}
        for node, tensor in outgoing.items():
            if node != self.index:
                buffer = torch.empty(sizes[node], dtype=tensor.dtype)
                try:
                    other = dist.get_global_rank(self._leaders, node)
                    works[node] = (
                        dist.irecv(buffer, other, group=self._leaders),
                        dist.isend(tensor, other, group=self._leaders),
                        buffer,
                    )
                except RuntimeError:  # its process is gone
                    continue
        for node, (receiving, sending, buffer) in works.items():
            try:
                receiving.wait(self._patience)
                sending.wait(self._patience)
            except RuntimeError:
                continue
            received[node] = buffer
        return received


def going_on(
    held: Mapping[int, Sequence[int]], steps: int, stretch: Callable[[int], int]
) -> dict[int, int]:
    """Node -> the step that it goes on from: all between the same two averages, which as many nodes as can be hold, as late as can be.

    Nodes that the others went on without may hold no such step. Theirs is one of which another holds the state.

    Args:
        held: node -> steps that it can go on from.
        steps: of the whole run; of this one there is no state, nor of 0.
        stretch: step -> how many averages came before it.

    >>> going_on({0: [0, 5, 9], 1: [0, 3]}, 20, lambda step: step // 4)
    {0: 0, 1: 3}
    >>> going_on({0: [5, 9], 1: [0, 3]}, 20, lambda step: step // 4)
    {0: 9, 1: 9}
    """
    own = {index: {stretch(step): step for step in sorted(row)} for index, row in held.items()}
    states = {
        stretch(step): step for row in held.values() for step in sorted(row) if 0 < step < steps
    }
    holders = Counter(place for row in own.values() for place in row)
    goal = max(
        (place for place in holders if holders[place] == len(held) or place in states),
        key=lambda p: (holders[p], p),
    )
    return {index: row.get(goal, states.get(goal, 0)) for index, row in own.items()}


def _mean(
    pieces: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float], only: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The weighted mean of some tensors, and the first's others."""
    chosen = NameRules.of(dict.fromkeys(only, 1.0))
    selected = [
        {name: tensor for name, tensor in piece.items() if chosen(name)} for piece in pieces
    ]
    return {**pieces[0], **(average(selected, weights) if selected[0] else {})}


def _parts(state: Mapping[str, torch.Tensor], count: int) -> list[list[str]]:
    """The names in parts of about equal size, the widest dtypes first in each so that all are aligned."""
    parts: list[list[str]] = [[] for _ in range(count)]
    filled = [0] * count
    for name in sorted(state, key=lambda n: (-state[n].nbytes, n)):
        least = filled.index(min(filled))
        parts[least].append(name)
        filled[least] += state[name].nbytes
    return [sorted(part, key=lambda n: (-state[n].itemsize, n)) for part in parts]


def _pack(state: Mapping[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """The bytes of some tensors, one after another."""
    flat = [state[name].detach().reshape(-1).contiguous().view(torch.uint8) for name in names]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)


def _unpack(
    content: torch.Tensor, like: Mapping[str, torch.Tensor], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The tensors that `_pack` packed, in the shapes and dtypes of ``like``."""
    sizes = [like[name].nbytes for name in names]
    return {
        name: part.view(like[name].dtype).view(like[name].shape)
        for name, part in zip(names, torch.split(content, sizes), strict=True)
    }


@contextmanager
def connected(
    node_size: int | None = None, patience: float = PATIENCE, *, fsdp: bool = False
) -> Iterator[OneProcess]:
    """This process's node, in a job that torchrun started; without torchrun, a node of one process.

    Args:
        node_size: processes in a node; by default those of a machine.
        patience: seconds that a node which is done waits for the others.
        fsdp: shard what is trained over the processes of a node, for models that are too large to train on each.

    Raises:
        OptionError: if the processes can't be divided so.
    """
    if "RANK" not in os.environ:
        if fsdp:
            raise OptionError(
                "fsdp shards a model over the processes of a node: start them with torchrun"
            )
        yield OneProcess()
        return
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0))
    size = node_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if fsdp and size == 1:
        raise OptionError(
            "fsdp shards a model over the processes of a node, and these nodes are one process each"
        )
    if world % size:
        raise OptionError(f"{world} processes can't be divided into nodes of {size}")
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, _ = next(rendezvous("env://"))
    # After a restart (--max-restarts) the store still holds the addresses of the dead.
    start = store.add(f"weightops/starts{rank}", 1)
    here = PrefixStore(f"weightops/start{start}", store)
    dist.init_process_group(backend, store=here, rank=rank, world_size=world)
    try:
        groups = [
            dist.new_group(list(range(first, first + size))) for first in range(0, world, size)
        ]
        leaders = dist.new_group(
            list(range(0, world, size)),
            backend="gloo",
            timeout=timedelta(seconds=max(patience, PATIENCE)),
        )
        index = dist.get_rank() // size
        yield LofiNode(
            groups[index], leaders, patience, fsdp=fsdp, job=Job(store, f"weightops/begun{index}")
        )
    finally:
        dist.destroy_process_group()
