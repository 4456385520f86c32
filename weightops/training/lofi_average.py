"""The average of nodes that were fine-tuned without communication (lo-fi, arXiv 2210.11948)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightops.algebra.kernels import has_nonfinite
from weightops.algebra.names import NameRules
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import MismatchError, NonfiniteError
from weightops.hub.cards import average_card
from weightops.merging.average import average as weighted_mean
from weightops.support.atomic import atomic_output
from weightops.support.text import first_few
from weightops.task_vector import TaskVector
from weightops.training.lofi_records import check_belong_together
from weightops.training.run_folder import RECORD as TRAINING_RECORD
from weightops.training.run_folder import states_in

log = logging.getLogger("weightops")

RECORD = "lofi.json"
DIVERGED = "its weights have become NaN or infinite"
GONE = "it doesn't answer, and left no finished checkpoint"


@dataclass(frozen=True)
class Average:
    """An average of nodes, with the weights of the nodes in it.

    Attributes:
        model: the averaged weights; lazy if they come from files.
        weights: node -> its weight, for each node that takes part.
        left_out: node -> reason, for each node that doesn't.
        means: how the nodes met: "files" or "all-reduce".
    """

    model: Checkpoint
    weights: Mapping[str, float]
    left_out: Mapping[str, str] = field(default_factory=dict)
    means: str = "files"

    def __post_init__(self) -> None:
        self.model.card = average_card(_shares(self.weights), self.left_out)
        self.model.records = {RECORD: self.record()}

    def record(self) -> dict[str, Any]:
        """Return all but the averaged weights themselves, for JSON."""
        return average_record(self.weights, self.left_out, self.means)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a folder with the model, and ``lofi.json`` with the record of the average.

        Raises:
            OutputError: if ``path`` exists or can't be written.
        """
        path = Path(path)
        with atomic_output(path, overwrite=overwrite) as temporary:
            temporary.mkdir()
            self.model.save_into(temporary, name=path.name, on_nonfinite="error")
        return path


def average_record(
    weights: Mapping[str, float], left_out: Mapping[str, str], means: str
) -> dict[str, Any]:
    """Return the record of an average, for JSON; see `Average` for the arguments."""
    shares = _shares(weights)
    nodes = {
        name: {"weight": weight, "coefficient": shares[name]} for name, weight in weights.items()
    }
    return {"nodes": nodes, "left_out": dict(left_out), "means": means}


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def average(nodes: Sequence[CheckpointLike], *, only: str | Sequence[str] = "*") -> Checkpoint:
    """Return the average of nodes that belong together, weighted by the samples they saw.

    The average is ``sum_i n_i theta_i / sum_i n_i`` for nodes with weights ``theta_i`` that saw
    ``n_i`` samples. It is computed when it is saved or loaded, one chunk after another. `survey`
    also says which nodes take part.

    Args:
        nodes: their checkpoints: folders that `finetune` wrote, or anything that `open_checkpoint`
            takes.
        only: name patterns of the tensors to average; the others are the first node's.

    Raises:
        MismatchError: naming the node that has another base, other shapes or another recipe, or
            that is the same run as another node.
        NonfiniteError: if no node is left.

    >>> import torch
    >>> average([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])["w"]
    tensor([0.5000, 0.5000])
    """
    return survey(nodes, only=only).model


def survey(nodes: Sequence[CheckpointLike], *, only: str | Sequence[str] = "*") -> Average:
    """Return the average of nodes, with the weight of each and the reasons to leave nodes out.

    Nodes that aren't finished or hold NaN or infinities are left out, with a warning. Nodes without
    a record of their training count as having seen equally many samples; only their names and
    shapes are checked. See `average` for the arguments and errors.
    """
    paths = [str(node) for node in nodes if isinstance(node, (str, Path))]
    repeated = [path for path in paths if paths.count(path) > 1]
    if repeated:
        raise MismatchError(f"{repeated[0]} is given twice")
    named, left_out = {}, {}
    for index, node in enumerate(nodes):
        is_path = isinstance(node, (str, Path))
        name = str(node) if is_path else f"number {index}"
        if is_path and _is_unfinished(Path(name)):
            left_out[name] = "it isn't finished; resuming its run finishes it"
        else:
            named[name] = node
    return _survey(named, left_out, only)


def average_folders(
    out: Path, count: int, diverged: Iterable[int], only: str | Sequence[str]
) -> Average:
    """Return the average of the finished nodes among ``out/node0``, ``out/node1``, ...

    Args:
        out: the folder of the nodes' folders.
        count: number of nodes.
        diverged: nodes that are left out because they diverged.
        only: name patterns of the tensors to average; the others are the first node's.
    """
    left_out = {f"node{index}": DIVERGED for index in diverged}
    finished: dict[str, CheckpointLike] = {}
    for name in (f"node{index}" for index in range(count)):
        if name not in left_out and (out / name / TRAINING_RECORD).exists():
            finished[name] = out / name
        else:
            left_out.setdefault(name, GONE)
    return _survey(finished, left_out, only)


def warn_left_out(left_out: Mapping[str, str]) -> None:
    """Warn of each node that is left out."""
    for name, reason in left_out.items():
        log.warning("left out of the average: %s: %s", name, reason)


def _survey(
    nodes: Mapping[str, CheckpointLike], left_out: dict[str, str], only: str | Sequence[str]
) -> Average:
    opened = {name: open_checkpoint(node) for name, node in nodes.items()}
    samples = check_belong_together(opened)
    for name, checkpoint in opened.items():
        nonfinite = [tensor for tensor in checkpoint if has_nonfinite(checkpoint[tensor])]
        if nonfinite:
            count, names = len(nonfinite), first_few(nonfinite)
            left_out[name] = f"NaN or Inf in {count} tensors: {names}"
    warn_left_out(left_out)
    kept = {name: opened[name] for name in opened if name not in left_out}
    if not kept:
        reason = f": {first_few(left_out)} can't take part" if left_out else ""
        raise NonfiniteError(f"there is no node to average{reason}")
    weights = {name: samples[name] for name in kept}
    patterns = [only] if isinstance(only, str) else list(only)
    mean = _partial_mean([*kept.values()], [*weights.values()], patterns)
    return Average(mean, weights, left_out)


def _partial_mean(
    models: Sequence[Checkpoint], weights: Sequence[float], patterns: Sequence[str]
) -> Checkpoint:
    """Return the first model with the mean in place of the tensors that patterns select."""
    if patterns == ["*"]:
        return weighted_mean(models, weights)
    first, *others = models
    NameRules.of(dict.fromkeys(patterns, 1.0)).check(first.specs)
    total = sum(weights)
    shares = [
        TaskVector(first, other).select(patterns) * (weight / total)
        for other, weight in zip(others, weights[1:], strict=True)
    ]
    return sum(shares, TaskVector(first, first)).apply(first)


def _is_unfinished(path: Path) -> bool:
    """Return True for the folder of a run that has not come to its end."""
    return path.is_dir() and not (path / TRAINING_RECORD).exists() and bool(states_in(path))
