"""The first processes of all nodes, and how they exchange tensors."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from weightops.algebra.names import NameRules
from weightops.errors import NonfiniteError
from weightops.merging.average import average
from weightops.support.lazy import dist, torch


class Leaders:
    """The first processes of all nodes, which are silent until they exchange tensors.

    Args:
        group: the processes, over gloo.
        index: this process's node.
        count: number of nodes.
        patience: seconds to wait for another node.

    Attributes:
        seconds: seconds that this process spent in `mean` on sending and waiting.
    """

    def __init__(self, group: Any, index: int, count: int, patience: float) -> None:
        self._group, self.index, self.count = group, index, count
        self._patience = timedelta(seconds=patience)
        self.seconds = 0.0

    def _rank(self, node: int) -> int:
        return dist.get_global_rank(self._group, node)

    def send(self, content: torch.Tensor, node: int) -> None:
        """Send bytes to a node that calls `receive`."""
        dist.send(torch.tensor([len(content)]), self._rank(node), group=self._group)
        dist.send(content, self._rank(node), group=self._group)

    def receive(self, node: int) -> torch.Tensor:
        """Return the bytes that a node sends."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, self._rank(node), group=self._group)
        content = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(content, self._rank(node), group=self._group)
        return content

    def swap(
        self, outgoing: Mapping[int, torch.Tensor], sizes: Mapping[int, int]
    ) -> dict[int, torch.Tensor]:
        """Send a tensor to each node and receive one from each.

        Args:
            outgoing: node -> tensor to send.
            sizes: node -> elements of the tensor to receive, which has the dtype of the sent one.

        Returns:
            Node -> tensor, for this node and each node that answers in time.
        """
        received = {self.index: outgoing[self.index]}
        pending: dict[int, tuple[Any, Any, torch.Tensor]] = {}
        for node, tensor in outgoing.items():
            if node != self.index:
                buffer = torch.empty(sizes[node], dtype=tensor.dtype)
                try:
                    receiving = dist.irecv(buffer, self._rank(node), group=self._group)
                    sending = dist.isend(tensor, self._rank(node), group=self._group)
                except RuntimeError:  # its process is gone
                    continue
                pending[node] = (receiving, sending, buffer)
        for node, (receiving, sending, buffer) in pending.items():
            try:
                receiving.wait(self._patience)
                sending.wait(self._patience)
            except RuntimeError:
                continue
            received[node] = buffer
        return received

    def mean(
        self,
        state: Mapping[str, torch.Tensor],
        weights: Mapping[int, int],
        only: Sequence[str] = ("*",),
    ) -> dict[str, torch.Tensor]:
        """Return the weighted mean of the nodes' tensors, with the bits that `average` gives.

        Each node averages a share of the tensors, and sends the result to the others.

        Args:
            state: this node's tensors, on CPU.
            weights: node -> weight, for each node that answers; tensors with weight 0 aren't used.
            only: name patterns of the tensors to average; the others are the first node's.

        Raises:
            NonfiniteError: if all weights are 0.
            RuntimeError: if a node is lost meanwhile.
        """
        finite = [node for node in weights if weights[node]]
        if not finite:
            raise NonfiniteError("no node has finite weights to average")
        shares = dict(zip(weights, split_names(state, len(weights)), strict=True))
        packed = {node: pack(state, names) for node, names in shares.items()}
        sizes = {node: content.numel() for node, content in packed.items()}
        own = shares[self.index]
        received = self._swap_all(packed, dict.fromkeys(shares, sizes[self.index]))
        states = [unpack(received[node], state, own) for node in finite]
        mean = pack(_mean(states, [float(weights[node]) for node in finite], only), own)
        means = self._swap_all(dict.fromkeys(shares, mean), sizes)
        return {
            name: tensor
            for node, names in shares.items()
            for name, tensor in unpack(means[node], state, names).items()
        }

    def _swap_all(
        self, outgoing: Mapping[int, torch.Tensor], sizes: Mapping[int, int]
    ) -> dict[int, torch.Tensor]:
        """Swap tensors with all nodes of ``outgoing``, and count the seconds.

        Raises:
            RuntimeError: if one of the nodes doesn't answer.
        """
        start = time.monotonic()
        received = self.swap(outgoing, sizes)
        self.seconds += time.monotonic() - start
        if len(received) < len(outgoing):
            raise RuntimeError(f"lost a node: only {sorted(received)} of {sorted(outgoing)} answer")
        return received


def _mean(
    states: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float], only: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the weighted mean of the tensors that patterns select, and the first's others."""
    selects = NameRules.of(dict.fromkeys(only, 1.0))
    selected = [{name: state[name] for name in state if selects(name)} for state in states]
    return {**states[0], **(average(selected, weights) if selected[0] else {})}


def split_names(state: Mapping[str, torch.Tensor], count: int) -> list[list[str]]:
    """Split the names into shares of about equal size in bytes.

    The widest dtypes come first in each share, so that all tensors are aligned in its bytes.
    """
    shares: list[list[str]] = [[] for _ in range(count)]
    filled = [0] * count
    for name in sorted(state, key=lambda n: (-state[n].nbytes, n)):
        least = filled.index(min(filled))
        shares[least].append(name)
        filled[least] += state[name].nbytes
    return [sorted(share, key=lambda n: (-state[n].itemsize, n)) for share in shares]


def pack(state: Mapping[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """Return the bytes of the named tensors, one after another, as a tensor of uint8."""
    flat = [state[name].detach().reshape(-1).contiguous().view(torch.uint8) for name in names]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)


def unpack(
    content: torch.Tensor, like: Mapping[str, torch.Tensor], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the tensors that `pack` packed, in the shapes and dtypes of ``like``."""
    sizes = [like[name].nbytes for name in names]
    return {
        name: piece.view(like[name].dtype).view(like[name].shape)
        for name, piece in zip(names, torch.split(content, sizes), strict=True)
    }
