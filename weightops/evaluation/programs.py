"""Scores of any program that takes a model's folder and prints a line of JSON for each item."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import NonfiniteError, OptionError, TaskError
from weightops.support.json_files import read_json, write_json
from weightops.support.lazy import torch
from weightops.support.progress import progress
from weightops.support.registry import unknown
from weightops.support.text import first_few
from weightops.tasks.scored import ScoredTask

HARNESS = "lm_eval:"
"""What a program's name begins with that is a task of lm-evaluation-harness."""

_SPLITS = ("validation", "test")


class Item(NamedTuple):
    """The score of one item of a task."""

    item: str
    split: str
    value: float


Scores = Mapping[str, list[Item]]
"""Task -> the scores of its items, in the order of their names."""


@dataclass(eq=False)
class Candidate:
    """A model that programs score: its weights are written to a folder for each of them.

    Attributes:
        base: the model to edit.
        edited: the model as it is edited at present.
        device: where weights are computed.
        folder: where scores are kept, for a run to resume, and models are written; a temporary
            folder by default.
        precision: how it is run, which is the program's business.
    """

    base: Checkpoint
    edited: Checkpoint
    device: torch.device
    folder: Path | None = None
    precision: str = "the program's"
    _scores: dict[tuple[str, str], Scores] = field(default_factory=dict)
    _items: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)

    @classmethod
    def open(
        cls, model: CheckpointLike, device: torch.device, folder: Path | None = None
    ) -> Candidate:
        """Return the candidate of a model, which isn't edited yet."""
        checkpoint = open_checkpoint(model)
        return cls(checkpoint, checkpoint, device, folder)

    @property
    def trained(self) -> tuple[Any, str]:
        """Nothing: a program builds the model as it likes."""
        return self.module, ""

    @property
    def module(self) -> Any:
        """Nothing, as `trained`."""
        raise OptionError(
            f"{self.base.ref} is scored by a program, which has no use for batch statistics of "
            "images or for a linearised model",
            hint="leave out batchnorm=, and vectors of linearised models",
        )

    def in_precision(self, precision: str) -> Candidate:
        """Return the model itself: a program runs it in a precision of its own."""
        return self

    def values(self, task: ScoredTask, split: str) -> torch.Tensor:
        """Return the scores of the items of a split, of the model as it is edited, shape ``(n,)``.

        Raises:
            TaskError: as `scores`; or if no item is of the split.
            NonfiniteError: as `scores`.
        """
        found = [item.value for item in self.scores(task) if item.split == split]
        if not found:
            raise TaskError(
                f"{task.program} scores no item of {task.name} for {split}",
                hint='a few dozen items, or "split": "validation" and "test" in the lines',
            )
        return torch.tensor(found, dtype=torch.float64)

    def record(
        self, task: ScoredTask, split: str, scores: Mapping[str, Any], fingerprint: str
    ) -> dict[str, Any]:
        """Return a line of a file of results."""
        return {
            "dataset": task.name,
            "model": self.base.ref,
            "pretrained": fingerprint,
            "task": "program",
            "metrics": dict(scores),
            "split": split,
            "precision": self.precision,
            **task.reading(split),
        }

    def scores(self, task: ScoredTask) -> list[Item]:
        """Return the scores of a task's items, from one run of its program for each edit.

        Raises:
            TaskError: if the program fails, prints what isn't a score, or scores other items than
                of another edit.
            NonfiniteError: if a score is NaN or infinite.
        """
        key = task.program, self.edited.fingerprint
        if key not in self._scores:
            self._scores[key] = self._run(*key)
        by_task = self._scores[key]
        if task.name not in by_task:
            error = unknown("task", task.name, by_task)
            raise TaskError(f"{task.program}: {error.fact}", hint=error.hint)
        found = by_task[task.name]
        self._check_items(task, found)
        bad = [item.item for item in found if not math.isfinite(item.value)]
        if bad:
            raise NonfiniteError(
                f"{task.program} scores {len(bad)} items of {task.name} with NaN or Inf: "
                f"{first_few(bad)}"
            )
        return found

    def _check_items(self, task: ScoredTask, found: list[Item]) -> None:
        """Refuse items other than those of the first edit."""
        items = [(item.item, item.split) for item in found]
        first = self._items.setdefault((task.program, task.name), items)
        if items != first:
            other = [name for name, _ in {*items} ^ {*first}]
            raise TaskError(
                f"{task.program} scores other items of {task.name} than it did of another edit: "
                f"{first_few(sorted(set(other)))}",
                hint="every edit is compared on the same items",
            )

    def _run(self, program: str, fingerprint: str) -> Scores:
        """Run a program on the edited model, or read what it printed in a run that is resumed."""
        name = sha256(f"{program}\0{fingerprint}".encode()).hexdigest()[:16]
        kept = self.folder / "scores" / f"{name}.json" if self.folder else None
        if kept is not None and kept.is_file():
            return {t: [Item(*row) for row in rows] for t, rows in read_json(kept).items()}
        place = tempfile.mkdtemp(prefix="candidate-", dir=self._place())
        try:
            self.edited.save_into(Path(place), on_nonfinite="ignore")
            with progress(1, program, "runs", work=1) as bar:
                scores = _read(_output(program, Path(place)), program)
                bar.update()
        finally:
            shutil.rmtree(place, ignore_errors=True)
            if self.folder is not None:
                with suppress(OSError):  # it holds scores
                    self.folder.rmdir()
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, scores)
        return scores

    def _place(self) -> Path | None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder


def command_of(program: str, folder: Path) -> list[str]:
    """Return the command that scores the model in a folder.

    >>> command_of("python judge.py --few 3", Path("model"))
    ['python', 'judge.py', '--few', '3', 'model']
    """
    if program.startswith(HARNESS):
        own = [sys.executable, "-m", "weightops.evaluation.harness"]
        return [*own, program.removeprefix(HARNESS), str(folder)]
    return [*shlex.split(program), str(folder)]


def _output(program: str, folder: Path) -> str:
    """Run a program and return what it prints; its messages go to stderr."""
    command = command_of(program, folder)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TaskError(f"the program {program} can't be run: {reason}") from error
    if done.returncode:
        raise TaskError(
            f"the program {program} failed with exit code {done.returncode}",
            hint=f"run it by hand: {shlex.join(command[:-1])} FOLDER",
        )
    return done.stdout.decode("utf-8", errors="replace")


def _read(output: str, program: str) -> Scores:
    """Return the scores that a program printed."""
    scores: dict[str, dict[str, Item]] = {}
    for number, line in enumerate(output.splitlines(), 1):
        if line.strip():
            task, item = _item(line, f"line {number} of what {program} prints")
            if item.item in scores.setdefault(task, {}):
                raise TaskError(f"{program} prints two scores of the item {item.item} of {task}")
            scores[task][item.item] = item
    if not scores:
        raise TaskError(f"{program} prints no scores", hint=_HINT)
    return {task: sorted(items.values()) for task, items in scores.items()}


_HINT = 'a line for each item: {"task": "sums", "item": "7", "value": 1}'


def _item(line: str, place: str) -> tuple[str, Item]:
    """Return the task and item of a line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TaskError(
            f"{place} isn't JSON: {line[:100]!r}", hint=f"print messages to stderr; {_HINT}"
        ) from error
    keys = ("task", "item", "value")
    if not isinstance(record, dict) or not all(key in record for key in keys):
        raise TaskError(f"{place} has no {', '.join(keys)}: {line[:100]!r}", hint=_HINT)
    task, item, value = (record[key] for key in keys)
    if not isinstance(task, str) or not isinstance(item, (str, int)):
        raise TaskError(f"{place} names task and item by {task!r} and {item!r}", hint=_HINT)
    if not isinstance(value, (bool, int, float)):
        raise TaskError(f"{place} has the value {value!r}, which is no number", hint=_HINT)
    split = record.get("split", _half(task, str(item)))
    if split not in _SPLITS:
        raise TaskError(f"{place} has the split {split!r}", hint=" or ".join(_SPLITS))
    return task, Item(str(item), split, float(value))


def _half(task: str, item: str) -> str:
    """Return the split of an item, which depends on its name only."""
    return _SPLITS[sha256(f"{task}\0{item}".encode()).digest()[0] % 2]
