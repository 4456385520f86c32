"""lo-fi: fine-tune on nodes that don't communicate, and average their weights once (arXiv 2210.11948)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from weightops.algebra.kernels import has_nonfinite
from weightops.algebra.linear_form import LinearForm, check_match
from weightops.algebra.names import NameRules
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import MismatchError, NonfiniteError, OptionError
from weightops.evaluation.image_model import ImageModel
from weightops.hub.cards import average_card
from weightops.support.atomic import atomic_output, check_free
from weightops.support.json_files import write_json
from weightops.support.text import first_few
from weightops.task_vector import TaskVector
from weightops.task_vector import average as mean_of
from weightops.tasks.table import as_tasks
from weightops.tasks.task import Task
from weightops.training.config import TrainingConfig, config_for
from weightops.training.finetune import fit
from weightops.training.learners import ImageLearner, Learner
from weightops.training.nodes import LofiNode, Node, OneProcess
from weightops.training.run_folder import RECORD as ENDED
from weightops.training.run_folder import RecordedSource, states_in, training_record

log = logging.getLogger("weightops")

RECORD = "lofi.json"
DIVERGED = "its weights have become NaN or infinite"
GONE = "it doesn't answer, and left no finished checkpoint"


@dataclass(frozen=True)
class Average:
    """An average of nodes: what it is of, and what was left out.

    Attributes:
        model: the averaged weights, lazy where they come from files.
        weights: node -> its weight, of the nodes that take part.
        left_out: node -> why it doesn't.
        means: how the nodes met: "files" or "all-reduce".
    """

    model: Checkpoint
    weights: Mapping[str, float]
    left_out: Mapping[str, str] = field(default_factory=dict)
    means: str = "files"

    def record(self) -> dict[str, Any]:
        """All but the weights themselves, for JSON."""
        return _record(self.weights, self.left_out, self.means)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a folder with the model, and ``lofi.json`` on what it is the average of.

        Raises:
            OutputError: if it exists or can't be written.
        """
        path = Path(path)
        with atomic_output(path, overwrite=overwrite) as part:
            part.mkdir()
            self.model.card = average_card(_shares(self.weights), self.left_out)
            self.model.save_into(part, final=path, on_nonfinite="error")
            write_json(part / RECORD, self.record())
        return path


def _record(
    weights: Mapping[str, float], left_out: Mapping[str, str], means: str
) -> dict[str, Any]:
    shares = _shares(weights)
    nodes = {
        name: {"weight": weight, "coefficient": shares[name]} for name, weight in weights.items()
    }
    return {"nodes": nodes, "left_out": dict(left_out), "means": means}


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def average(nodes: Sequence[CheckpointLike], *, only: str | Sequence[str] = "*") -> Checkpoint:
    r"""The average :math:`\sum_i n_i \theta_i / \sum_i n_i` of nodes that belong together, by the samples :math:`n_i` they saw.

    Nothing is computed until the result is saved or loaded; then one chunk after another is. See `survey`, which says more.

    Args:
        nodes: their checkpoints: folders that `finetune` left, or any weights.
        only: name patterns of the tensors to average; the others are the first node's.

    Raises:
        MismatchError: naming the node that has another base, other shapes or another recipe, or is one of the others again.
        NonfiniteError: if no node is left.

    >>> average([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])["w"]
    tensor([0.5000, 0.5000])
    """
    return survey(nodes, only=only).model


def survey(nodes: Sequence[CheckpointLike], *, only: str | Sequence[str] = "*") -> Average:
    """The average of nodes, and what it is made of. Nodes that aren't finished, or hold NaN or Inf, are left out with a warning.

    See `average` for arguments and errors. Nodes without a record of how they were made count as having
    seen equally many samples, and only their names and shapes are checked.
    """
    given = [str(node) for node in nodes if isinstance(node, (str, Path))]
    twice = [name for name in given if given.count(name) > 1]
    if twice:
        raise MismatchError(f"{twice[0]} is given twice")
    named = {
        str(node) if isinstance(node, (str, Path)) else f"number {i}": node
        for i, node in enumerate(nodes)
    }
    unfinished = [
        name
        for name, node in named.items()
        if isinstance(node, (str, Path)) and _unfinished(Path(node))
    ]
    left_out = dict.fromkeys(unfinished, "it isn't finished (--resume goes on with it)")
    return _survey(
        {name: node for name, node in named.items() if name not in left_out}, left_out, only
    )


def _survey(
    nodes: Mapping[str, CheckpointLike], left_out: dict[str, str], only: str | Sequence[str]
) -> Average:
    """The average of nodes by name, beside those that are left out already."""
    opened = {name: open_checkpoint(node) for name, node in nodes.items()}
    weights = _check_kin(opened)
    for name, checkpoint in opened.items():
        bad = [tensor for tensor in checkpoint if has_nonfinite(checkpoint[tensor])]
        if bad:
            left_out[name] = f"NaN or Inf in {len(bad)} tensors: {first_few(bad)}"
    return _averaged(
        {n: c for n, c in opened.items() if n not in left_out}, weights, left_out, only
    )


def _averaged(
    nodes: Mapping[str, Checkpoint],
    weights: Mapping[str, float],
    left_out: Mapping[str, str],
    only: str | Sequence[str],
) -> Average:
    _warn(left_out)
    if not nodes:
        raise NonfiniteError(
            f"there is no node to average{': ' if left_out else ''}{first_few(left_out)}"
        )
    kept = {name: float(weights[name]) for name in nodes}
    patterns = [only] if isinstance(only, str) else list(only)
    first, *others = nodes.values()
    if patterns == ["*"]:
        return Average(mean_of(list(nodes.values()), list(kept.values())), kept, left_out)
    NameRules.of(dict.fromkeys(patterns, 1.0)).check(first.specs)
    total = sum(kept.values())
    zero = TaskVector(first, first)
    shares = [
        TaskVector(first, other).select(patterns) * (weight / total)
        for other, weight in zip(others, list(kept.values())[1:], strict=True)
    ]
    return Average(sum(shares, zero).apply(first), kept, left_out)


def _warn(left_out: Mapping[str, str]) -> None:
    for name, reason in left_out.items():
        log.warning("left out of the average: %s: %s", name, reason)


def _unfinished(path: Path) -> bool:
    """True for the folder of a run that has not come to its end."""
    return path.is_dir() and not (path / ENDED).exists() and bool(states_in(path))


def _check_kin(nodes: Mapping[str, Checkpoint]) -> dict[str, float]:
    """Check that nodes belong together; node -> samples seen.

    Raises:
        MismatchError: naming the first that doesn't belong to the first.
    """
    found = {name: training_record(checkpoint) for name, checkpoint in nodes.items()}
    records = {name: record for name, record in found.items() if record}
    silent = [name for name in found if name not in records]
    if silent and records:
        raise MismatchError(
            f"{first_few(records)} say that they are nodes, and {first_few(silent)} doesn't; `weightops merge` averages any models"
        )
    if silent:
        log.warning(
            "nothing says how these were made, so only their names and shapes are checked: %s",
            first_few(silent),
        )
    for name, checkpoint in nodes.items():
        first = next(iter(nodes))
        if name != first:
            check_match(nodes[first].form, checkpoint.form)
    seen: dict[tuple[int, int], str] = {}
    for name, record in records.items():
        first, reference = next(iter(records.items()))
        if record["base"] != reference["base"]:
            raise MismatchError(
                f"{name} started from another base ({record['base']}) than {first} ({reference['base']}): "
                "only nodes that start from the same weights can be averaged"
            )
        mine, other = _recipe(record), _recipe(reference)
        odd = [
            f"{key} {mine.get(key)} / {other.get(key)}"
            for key in {**mine, **other}
            if mine.get(key) != other.get(key)
        ]
        if odd:
            raise MismatchError(
                f"{name} was made by another recipe than {first}: {first_few(odd)}; fine-tune both alike"
            )
        order = (record["config"]["seed"], record["node"]["index"])
        if order in seen:
            raise MismatchError(
                f"{name} saw the same images in the same order as {seen[order]}: it is the same run again"
            )
        seen[order] = name
    counts = {record["node"]["count"] for record in records.values()}
    if records and len(seen) < max(counts) and len({seed for seed, _ in seen}) == 1:
        absent = sorted(set(range(max(counts))) - {index for _, index in seen})
        log.warning(
            "of %d nodes, these are missing: %s",
            max(counts),
            first_few(f"node {index}" for index in absent),
        )
    return {name: float(records[name]["samples"]) if not silent else 1.0 for name in nodes}


def _recipe(record: Mapping[str, Any]) -> dict[str, Any]:
    """What nodes must have in common, beside the base: all but the order of their images."""
    config, node = dict(record["config"]), dict(record["node"])
    del node["index"]
    seed = config.pop("seed")
    shards = {"seed": seed} if node["data"] == "shard" else {}  # with other seeds, shards overlap
    return {
        "task": record["task"],
        "digest of the data": record.get("digest"),
        **config,
        **node,
        **shards,
    }


def run(
    task: str | Task | Learner,
    out: str | Path,
    *,
    model: CheckpointLike = "embedded",
    config: TrainingConfig | None = None,
    strategy: OneProcess | None = None,
    nodes: int | None = None,
    like: Node | None = None,
    checkpoint_every: int = 250,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
) -> Average | None:
    """Fine-tune every node into ``out/node0``, ``out/node1``, ... and average them into ``out/merged``.

    Under torchrun, this process is part of one node (`weightops.nodes.connected`), and nothing is sent between
    nodes until they are done. Then those that still answer average by one all-reduce; if some don't, the saved
    checkpoints are averaged, where they can all be seen. Without torchrun, one node is trained after another.

    Args:
        task: what to learn; or a learner, which has its model and data.
        out: the folder.
        model: what all nodes start from, if not the learner's.
        config: how; by default `config_for` the model. The batch size is that of all nodes together.
        strategy: this process's part, from `connected`; by default this process alone.
        nodes: how many, where that isn't said by the strategy.
        like: how the nodes work together; see `Node`.
        checkpoint_every: steps between states to resume from.
        resume: nodes go on from their last state, and finished ones are taken as they are.
        overwrite: replace what is there.
        device: "auto", "cpu", "cuda", ...

    Returns:
        The average, in the process that wrote it; None in others.

    Raises:
        OptionError: if it isn't said how many nodes, or said twice.
        NonfiniteError: if no node has finite weights.
    """
    out, strategy, like = Path(out), strategy or OneProcess(), like or Node()
    count = strategy.count if isinstance(strategy, LofiNode) else nodes
    if count is None or nodes not in (None, count):
        started = f"; torchrun started {count}" if count else ""
        raise OptionError(
            f"say how many nodes there are with --nodes, or start the nodes with torchrun{started}"
        )
    check_free(out / "merged", overwrite=overwrite or resume)
    if isinstance(task, Learner):
        learner = task
    else:
        [task] = as_tasks(task)
        learner = ImageLearner(ImageModel.open(model, device, learning=task), task)
    config = config or config_for(learner.base)
    diverged: dict[int, str] = {}
    mine = [strategy.index] if isinstance(strategy, LofiNode) else range(count)
    for index in mine:
        learner.base.load_into(learner.module)
        try:
            tuned = fit(
                learner,
                config,
                out=out / f"node{index}",
                checkpoint_every=checkpoint_every,
                resume=resume,
                overwrite=overwrite,
                node=replace(like, index=index, count=count),
                strategy=strategy,
            )
            state = tuned.state_dict()
        except NonfiniteError as error:
            diverged[index], state = str(error), learner.blank()
    if strategy.rank:
        return None
    if isinstance(strategy, LofiNode):
        samples = config.steps * replace(like, index=strategy.index, count=count).batch_size(
            config.batch_size
        )
        meeting = _Meeting(out, strategy, 0 if diverged else samples, config.steps, like.only)
        return meeting.average(state, learner.base.architecture)
    merged = _from_files(out, count, diverged, like.only)
    merged.save(out / "merged", overwrite=True)
    return merged


@dataclass(frozen=True)
class _Meeting:
    """How the nodes that still answer average what they have, and write it.

    Attributes:
        out: the folder of all nodes.
        nodes: the line to the others.
        samples: seen by this node; 0 if it has nothing to give.
        steps: taken by each node.
        only: name patterns of what is averaged.
    """

    out: Path
    nodes: LofiNode
    samples: int
    steps: int
    only: Sequence[str]

    def average(
        self, state: Mapping[str, torch.Tensor], architecture: Architecture | None
    ) -> Average | None:
        """By one all-reduce, or from files if a node is gone and all checkpoints can be seen; in the first node, what was written."""
        weights = self.nodes.reports(self.samples, self.steps)
        if len(weights) == self.nodes.count and all(weights.values()):
            for path in states_in(self.out / f"node{self.nodes.index}").values():
                path.unlink()  # as no node will go back
        writer = self.nodes.index == min((i for i in weights if weights[i]), default=-1)
        merged = None
        try:
            if len(weights) == self.nodes.count or not self._all_visible(weights):
                merged = self._all_reduce(state, architecture, weights)
            elif writer:
                merged = self._from_files(weights)
        except (
            RuntimeError
        ) as error:  # another node was lost meanwhile, and each of the others does what it can
            log.warning("%s; averaging the saved checkpoints", error)
            merged, writer = self._from_files(weights), True
        if merged is not None and writer:
            merged.save(self.out / "merged", overwrite=True)
        self.nodes.reports(self.samples, self.steps)  # by now it is written
        if merged is not None and not writer and not _holds(self.out / "merged", merged.model):
            merged.save(self.out / "merged", overwrite=True)  # the nodes don't share a disk
        return merged if writer else None

    def _all_visible(self, weights: Mapping[int, int]) -> bool:
        """True if every node that answers sees the checkpoints of all that do."""
        seen = all(
            (self.out / f"node{index}" / ENDED).exists()
            for index, weight in weights.items()
            if weight
        )
        return all(self.nodes.reports(int(seen), self.steps).values())

    def _all_reduce(
        self,
        state: Mapping[str, torch.Tensor],
        architecture: Architecture | None,
        weights: Mapping[int, int],
    ) -> Average:
        ties = MemorySource(state, "").ties
        here = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in state.items()
            if name not in ties
        }
        mean = self.nodes.exchange(here, weights, self.only)
        mean = {name: mean[ties.get(name, name)] for name in state}
        names = {f"node{index}": float(weight) for index, weight in weights.items() if weight}
        left_out = {
            f"node{i}": DIVERGED if i in weights else GONE
            for i in range(self.nodes.count)
            if not weights.get(i)
        }
        if f"node{self.nodes.index}" == next(iter(names)):
            _warn(left_out)
        record = _record(names, left_out, "all-reduce")
        source = RecordedSource(mean, f"the mean of {first_few(names)}", lofi=record)
        return Average(
            Checkpoint(LinearForm.of(source), architecture), names, left_out, "all-reduce"
        )

    def _from_files(self, weights: Mapping[int, int]) -> Average:
        diverged = [index for index, weight in weights.items() if not weight]
        return _from_files(self.out, self.nodes.count, diverged, self.only)


def _from_files(out: Path, count: int, diverged: Iterable[int], only: Sequence[str]) -> Average:
    """The average of the checkpoints that there are."""
    left_out = {f"node{index}": DIVERGED for index in diverged}
    folders: dict[str, CheckpointLike] = {}
    for name in (f"node{index}" for index in range(count)):
        if name not in left_out and (out / name / ENDED).exists():
            folders[name] = out / name
        else:
            left_out.setdefault(name, GONE)
    return _survey(folders, left_out, only)


def _holds(folder: Path, model: Checkpoint) -> bool:
    """True if the folder has these weights."""
    return folder.exists() and open_checkpoint(folder).fingerprint == model.fingerprint
