"""The meeting of the nodes that still answer, at the end of a lo-fi run: they average and write."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.opening import open_checkpoint
from weightops.support.atomic import held
from weightops.support.lazy import torch
from weightops.support.text import first_few
from weightops.training.lofi_average import (
    DIVERGED,
    GONE,
    Average,
    average_folders,
    average_record,
    warn_left_out,
)
from weightops.training.process_groups import LofiNode
from weightops.training.run_folder import RECORD as TRAINING_RECORD
from weightops.training.run_folder import states_in

log = logging.getLogger("weightops")


@dataclass(frozen=True)
class Meeting:
    """The meeting of the nodes that still answer.

    Attributes:
        out: the folder of all nodes.
        node: this node.
        samples: samples that this node saw; 0 if it has no weights to average.
        steps: steps that each node took.
        only: name patterns of the tensors that are averaged.
    """

    out: Path
    node: LofiNode
    samples: int
    steps: int
    only: Sequence[str]

    def average(
        self, state: Mapping[str, torch.Tensor], architecture: Architecture | None
    ) -> Average | None:
        """Average the nodes' tensors and write the result to ``out/merged``.

        The nodes exchange tensors. If a node is gone and each of the others sees all checkpoints,
        the checkpoints are averaged instead.

        Returns:
            The average in the node that wrote it, None in others.
        """
        weights = self.node.swap_reports(self.samples, self.steps)
        nodes_with_weights = [index for index in weights if weights[index]]
        all_here = len(weights) == self.node.count
        if all_here and len(nodes_with_weights) == len(weights):
            for path in states_in(self.out / f"node{self.node.index}").values():
                path.unlink()  # no node will go back
        writes = self.node.index == min(nodes_with_weights, default=-1)
        merged = None
        try:
            if all_here or not self._all_see_checkpoints(nodes_with_weights):
                merged = self._exchange(state, architecture, weights)
            elif writes:
                merged = self._average_folders(weights)
        except RuntimeError as error:  # lost a node meanwhile: each of the others does what it can
            log.warning("%s; averaging the saved checkpoints", error)
            merged, writes = self._average_folders(weights), True
        if merged is not None and writes:
            self._write(merged)
        self.node.swap_reports(self.samples, self.steps)  # by now the result is written
        if merged is not None and not writes and not _holds(self.out / "merged", merged.model):
            self._write(merged)  # the nodes don't share a disk
        return merged if writes else None

    def _write(self, merged: Average) -> None:
        """Write the average, after other nodes that may be writing it to the same disk."""
        with held(self.out / "merged", wait=True):
            merged.save(self.out / "merged", overwrite=True)

    def _all_see_checkpoints(self, indices: Sequence[int]) -> bool:
        """Return True if each node that answers sees the finished checkpoints of these nodes."""
        seen = all((self.out / f"node{index}" / TRAINING_RECORD).exists() for index in indices)
        return all(self.node.swap_reports(int(seen), self.steps).values())

    def _exchange(
        self,
        state: Mapping[str, torch.Tensor],
        architecture: Architecture | None,
        weights: Mapping[int, int],
    ) -> Average:
        ties = MemorySource(state, "").ties
        names = [name for name in state if name not in ties]
        untied = {name: state[name].detach().cpu().contiguous() for name in names}
        mean = self.node.exchange(untied, weights, self.only)
        mean = {name: mean[ties.get(name, name)] for name in state}
        kept = {f"node{index}": float(weight) for index, weight in weights.items() if weight}
        left_out = {
            f"node{index}": DIVERGED if index in weights else GONE
            for index in range(self.node.count)
            if not weights.get(index)
        }
        if f"node{self.node.index}" == next(iter(kept)):
            warn_left_out(left_out)
        record = average_record(kept, left_out, "all-reduce")
        source = MemorySource(mean, f"the mean of {first_few(kept)}", record={"lofi": record})
        model = Checkpoint(LinearForm.of(source), architecture)
        return Average(model, kept, left_out, "all-reduce")

    def _average_folders(self, weights: Mapping[int, int]) -> Average:
        diverged = [index for index, weight in weights.items() if not weight]
        return average_folders(self.out, self.node.count, diverged, self.only)


def _holds(folder: Path, model: Checkpoint) -> bool:
    """Return True if the folder holds these weights."""
    return folder.exists() and open_checkpoint(folder).fingerprint == model.fingerprint
