"""Nodes of several processes, and how the first processes of nodes exchange tensors."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, Any, NamedTuple, TypeVar

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from weightops.errors import CheckpointError, OptionError
from weightops.support.lazy import dist, nn, torch
from weightops.support.ranges import Range
from weightops.support.text import first_few
from weightops.training.fsdp import gather, local_part, shard_
from weightops.training.leaders import Leaders
from weightops.training.nodes import Node, OneProcess, Resumable, common_start

log = logging.getLogger("weightops")

T = TypeVar("T")

PATIENCE = 1800.0
"""Seconds that a finished node waits for the others."""

MAX_STATES = 8
"""States of a run that nodes report to each other; a run keeps fewer."""


class Job(NamedTuple):
    """The store of a job, which outlives the processes that torchrun restarts, and a node's key."""

    store: Any
    key: str


class ProcessGroup(OneProcess):
    """A node of several processes, each with its slice of a batch.

    Args:
        group: the processes.
        fsdp: shard parameters, gradients and the optimizer's state over the processes (FSDP2)
            instead of copying them; the module stays sharded.
        job: the job, in which the begin of the node's run is recorded.
    """

    def __init__(self, group: Any, *, fsdp: bool = False, job: Job | None = None) -> None:
        self.group, self.fsdp, self.job = group, fsdp, job
        self.restarted = job is not None and job.store.check([job.key])
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._first_rank = dist.get_global_rank(group, 0)
        self._counted_until = 0.0

    def mark_begun(self) -> None:
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

    def broadcast(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, self._first_rank, group=self.group)
        return box[0]


def _all_reduce(node: ProcessGroup, gradients: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients over a node's processes, as DDP does, and time it."""
    start = time.monotonic()
    work = dist.all_reduce(gradients.div_(node.size), group=node.group, async_op=True)

    def count_seconds(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        now = time.monotonic()
        node.seconds += now - max(start, node._counted_until)  # buckets overlap
        node._counted_until = now
        return future.value()[0]

    reduced: torch.futures.Future[torch.Tensor] = work.get_future().then(count_seconds)
    return reduced


class LofiNode(ProcessGroup):
    """One of several nodes, whose first processes can exchange tensors with each other.

    Args:
        group: this node's processes.
        leaders: the first processes of all nodes.
        fsdp: see `ProcessGroup`.
        job: see `ProcessGroup`.
    """

    def __init__(
        self, group: Any, leaders: Leaders, *, fsdp: bool = False, job: Job | None = None
    ) -> None:
        super().__init__(group, fsdp=fsdp, job=job)
        self._leaders = leaders
        self.index, self.count = leaders.index, leaders.count

    def as_one_node(self) -> OneProcess:
        if self.fsdp:
            raise OptionError(
                "a sharded model stays sharded, and can't be trained a second time",
                hint="compare without fsdp=True",
            )
        return ProcessGroup(dist.group.WORLD, job=self.job)

    def agree_on_start(self, resumable: Sequence[int], node: Node, run: Resumable) -> int:
        """Return a step between the same two averages as the other nodes' steps.

        Where this node has no state for it, another node sends one.
        """
        if not node.every:
            return max(resumable)
        steps = self._swap_steps(resumable)
        plan = common_start(steps, run.steps, node.averages_before)
        if plan[self.index] < max(resumable):
            behind = min(steps, key=lambda index: max(steps[index]))
            message = "going back from step %d: node %d has come no further than %d"
            log.warning(message, max(resumable), behind, max(steps[behind]))
        receivers = [index for index, step in plan.items() if step not in steps[index]]
        if receivers:
            step = plan[receivers[0]]
            sender = next(index for index in steps if step in steps[index])
            self._send_state(run, step, sender, receivers)
        return plan[self.index]

    def _swap_steps(self, resumable: Sequence[int]) -> dict[int, list[int]]:
        """Return node -> steps that it can resume from, for each node that answers."""
        own = torch.tensor([-1] * MAX_STATES + sorted(resumable))[-MAX_STATES:].contiguous()
        nodes = range(self.count)
        rows = self._leaders.swap(dict.fromkeys(nodes, own), dict.fromkeys(nodes, MAX_STATES))
        steps = {node: [step for step in rows[node].tolist() if step >= 0] for node in sorted(rows)}
        if len(steps) < self.count:
            missing = (f"node {index}" for index in nodes if index not in steps)
            log.warning("resuming without %s", first_few(missing))
        return steps

    def _send_state(self, run: Resumable, step: int, sender: int, receivers: Sequence[int]) -> None:
        """Send one node's state to the nodes that the others averaged without."""
        if self.index == sender:
            names = first_few(f"node {index}" for index in receivers)
            message = "%s missed averages, and resume from step %d of node %d"
            log.warning(message, names, step, sender)
            content = torch.frombuffer(bytearray(run.state_bytes(step)), dtype=torch.uint8)
            for receiver in receivers:
                self._leaders.send(content, receiver)
        elif self.index in receivers:
            run.accept_state(self._leaders.receive(sender).numpy().tobytes(), step)

    def swap_reports(self, samples: int, step: int) -> dict[int, int]:
        """Return node -> samples that it has seen, for each node that answers.

        A node that has no weights to average reports 0. Only first processes call this.

        Raises:
            CheckpointError: if another node is at another step.
        """
        own, nodes = torch.tensor([samples, step]), range(self.count)
        reports = self._leaders.swap(dict.fromkeys(nodes, own), dict.fromkeys(nodes, len(own)))
        weights = {}
        for node, report in sorted(reports.items()):
            weights[node], other_step = report.tolist()
            if other_step != step:
                raise CheckpointError(
                    f"node {node} is at step {other_step} and node {self.index} at {step}",
                    hint="start nodes that average on the way together",
                )
        return weights

    def exchange(
        self,
        state: Mapping[str, torch.Tensor],
        weights: Mapping[int, int],
        only: Sequence[str] = ("*",),
    ) -> dict[str, torch.Tensor]:
        """Return the weighted mean of the nodes' tensors, see `Leaders.mean`; count the seconds."""
        seconds = self._leaders.seconds
        try:
            return self._leaders.mean(state, weights, only)
        finally:
            self.seconds += self._leaders.seconds - seconds

    def average_(self, state: Mapping[str, torch.Tensor], samples: int, step: int) -> None:
        means = {name: gather(tensor) for name, tensor in state.items()}
        if self.rank == 0:
            finite = all(bool(torch.isfinite(tensor).all()) for tensor in means.values())
            means = self.exchange(means, self.swap_reports(samples if finite else 0, step))
        for name, tensor in state.items():
            mean = means[name].to(tensor.device).contiguous()
            if self.size > 1:
                dist.broadcast(mean, self._first_rank, group=self.group)
            tensor.detach().copy_(local_part(mean, tensor))


@contextmanager
def connected(
    node_size: Annotated[int, Range(min=1)] | None = None,
    patience: float = PATIENCE,
    *,
    fsdp: bool = False,
) -> Iterator[OneProcess]:
    """Join the job that torchrun started, and give this process's node.

    Without torchrun, the node is this one process.

    Args:
        node_size: processes in a node. Default: those of a machine.
        patience: seconds that a finished node waits for the others.
        fsdp: shard what is trained over the processes of a node (FSDP2) instead of copying it, for
            models that are too large to train on each.

    Raises:
        OptionError: if the processes can't be divided into nodes of this size.
    """
    if "RANK" not in os.environ:
        if fsdp:
            raise OptionError(
                "fsdp=True shards a model over the processes of a node, and there is one process",
                hint="start the processes with torchrun",
            )
        yield OneProcess()
        return
    world = int(os.environ["WORLD_SIZE"])
    size = node_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if fsdp and size == 1:
        raise OptionError(
            "fsdp=True shards a model over the processes of a node, and each node is one process"
        )
    if size < 1 or world % size:
        raise OptionError(f"{world} processes can't be divided into nodes of {size}")
    store = _init_process_group(world)
    try:
        yield _join_node(store, world, size, patience, fsdp)
    finally:
        dist.destroy_process_group()


def _init_process_group(world: int) -> Any:
    """Connect the processes of the job, and return the job's store."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    store, rank, _ = next(rendezvous("env://"))
    # After a restart (--max-restarts) the store still holds the addresses of the dead.
    starts = store.add(f"weightops/starts{rank}", 1)
    own_store = PrefixStore(f"weightops/start{starts}", store)
    dist.init_process_group(backend, store=own_store, rank=rank, world_size=world)
    return store


def _join_node(store: Any, world: int, size: int, patience: float, fsdp: bool) -> LofiNode:
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    timeout = timedelta(seconds=max(patience, PATIENCE))
    firsts = dist.new_group(list(range(0, world, size)), backend="gloo", timeout=timeout)
    index = dist.get_rank() // size
    leaders = Leaders(firsts, index, world // size, patience)
    return LofiNode(groups[index], leaders, fsdp=fsdp, job=Job(store, f"weightops/begun{index}"))
