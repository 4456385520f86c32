"""The folder of a fine-tuning run: its state while it lasts; its weights, log and record at the end."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch

from weightops.algebra.kernels import has_nonfinite
from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.opening import open_checkpoint
from weightops.errors import CheckpointError, NonfiniteError, OutputError
from weightops.hub.cards import training_card
from weightops.support.atomic import atomic_output, check_free
from weightops.support.json_files import read_json
from weightops.support.text import first_few

log = logging.getLogger("weightops")

WEIGHTS, LOG, RECORD, STATE = "finetuned.safetensors", "log.jsonl", "training.json", "training."
EMA = "ema"
"""The folder, inside the run's, of the moving average of the weights."""


class Stateful(Protocol):
    """Something that a run goes on from."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class RunFolder:
    """A run's folder. It opens as a model when the run is finished.

    Of a run that averages with others on the way, two states are kept: the last one, and the last one from before the average
    that came before it. Another node may not have come any further.

    Args:
        path: the folder.
        identity: what makes it this run; nothing of another is resumed.
        architecture: of the weights.
        steps: of the whole run.
        stretch: step -> how many averages came before it.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        architecture: Architecture | None,
        steps: int,
        stretch: Callable[[int], int],
    ) -> None:
        self.path = path
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.architecture = architecture
        self.steps = steps
        self.lines: list[dict[str, float]] = []
        self.finished = False
        self._stretch = stretch

    def begin(self, *, resume: bool, overwrite: bool) -> list[int]:
        """Make the folder ready; the steps that the run can go on from, the last of all if it is finished.

        Raises:
            OutputError: if it is, or was interrupted, and is neither to be resumed nor overwritten.
            CheckpointError: if it is to be resumed, and is of another run.
        """
        if not resume:
            check_free(self.path / WEIGHTS, overwrite=overwrite)
            if states_in(self.path) and not overwrite:
                raise OutputError(
                    f"{self.path} holds a run that was interrupted; --resume goes on with it, --overwrite starts anew"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume:
            self.go_back(0)
        steps = self._sound_states()
        self.finished = (self.path / RECORD).is_file() and (self.path / WEIGHTS).is_file()
        if self.finished:
            self._same(read_json(self.path / RECORD))
            steps.append(self.steps)
        elif (
            resume
            and (self.path / WEIGHTS).is_file()
            and not training_record(open_checkpoint(self.path / WEIGHTS))
        ):
            raise CheckpointError(
                f"{self.path} holds weights and no record of how they were made; --overwrite starts anew"
            )  # other weights are of a run that is being replaced
        return steps if len({self._stretch(step) for step in steps}) > 1 else [0, *steps]

    def _sound_states(self) -> list[int]:
        """The steps of which there is a state of this run; a damaged one is passed over if there is another.

        Raises:
            CheckpointError: if all are damaged, or one is of another run.
        """
        sound, damage = [], None
        for step in states_in(self.path):
            try:
                identity = json.loads(self._load(step, mmap=True)["identity"])
            except CheckpointError as error:
                damage = error
                continue
            self._same(identity)
            sound.append(step)
        if damage and not sound:
            raise damage
        if damage:
            log.warning("%s", damage)
        return sound

    def go_back(self, step: int) -> None:
        """Forget what came after a step, and what isn't needed any more before it; weights stay until they are replaced."""
        if step < self.steps:
            (self.path / RECORD).unlink(missing_ok=True)
        self._forget(later for later in states_in(self.path) if later > step)
        self._forget_before(step)

    def _forget(self, steps: Iterable[int]) -> None:
        for step in list(steps):
            self._state(step).unlink()

    def _state(self, step: int) -> Path:
        return self.path / f"{STATE}{step}.pt"

    def _same(self, identity: Mapping[str, Any]) -> None:
        theirs, mine = ({**run.get("config", {}), **run} for run in (identity, self.identity))
        odd = [
            f"{key} {theirs.get(key)!r}, not {mine[key]!r}"
            for key in mine
            if key != "config" and theirs.get(key) != mine[key]
        ]
        if odd:
            raise CheckpointError(
                f"{self.path} holds another run: {first_few(odd)}; give the same options, or start again without resume"
            )

    def restore(self, parts: Mapping[str, Stateful], step: int) -> None:
        """Load the state of a step, counted from 1; at 0 there is none."""
        if not step:
            return
        state = self._load(step)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.lines = json.loads(state["lines"])
        log.info("going on from step %d", step)

    def _load(self, step: int, *, mmap: bool = False) -> dict[str, Any]:
        path = self._state(step)
        try:
            state: dict[str, Any] = torch.load(
                path, map_location="cpu", mmap=mmap, weights_only=True
            )
            json.loads(state["identity"])
        except (
            RuntimeError,
            UnpicklingError,
            TypeError,
            LookupError,
            ValueError,
            OSError,
            EOFError,
        ) as error:
            raise CheckpointError(
                f"{path} isn't a state to go on from; delete it, or start anew with --overwrite"
            ) from error
        return state

    def keep(self, states: Mapping[str, Any], step: int) -> None:
        """Write the state to go on from, whole or not at all."""
        self._keep({"lines": json.dumps(self.lines), **states}, step)
        self._write(LOG, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._forget_before(step)

    def _keep(self, state: Mapping[str, Any], step: int) -> None:
        content = io.BytesIO()  # torch.save to a file tells of a full disk in its own way
        torch.save({**state, "identity": json.dumps(self.identity)}, content)
        with atomic_output(self._state(step), overwrite=True) as part:
            part.write_bytes(content.getbuffer())

    def _forget_before(self, step: int) -> None:
        """Delete the states that no node needs once this one has come to a step."""
        states = states_in(self.path)
        earlier = [kept for kept in states if self._stretch(kept) < self._stretch(step)]
        self._forget({*states} - {step, max(earlier, default=step)})

    def give(self, step: int) -> bytes:
        """The state of a step, for another node."""
        return self._state(step).read_bytes()

    def take(self, content: bytes, step: int) -> None:
        """Have the state that another node gave as one's own."""
        self._keep(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), step)

    def finish(
        self, weights: Mapping[str, torch.Tensor], ema: Mapping[str, torch.Tensor], **facts: Any
    ) -> None:
        """Write what is left of the run: first the weights, which a full disk has no room for, and last the record, which says that it ended."""
        bad = [name for name, tensor in weights.items() if has_nonfinite(tensor)]
        if bad:
            raise NonfiniteError(
                f"NaN or Inf in {first_few(bad)}: the training of {self.path} diverged; a lower learning rate may help"
            )
        record = {**self.identity, **facts}
        self._checkpoint(weights, record).save(
            self.path / WEIGHTS, overwrite=True, on_nonfinite="error"
        )
        if ema:
            self._checkpoint(ema, record).save(
                self.path / EMA, overwrite=True, on_nonfinite="error"
            )
        self._write(LOG, "".join(json.dumps(line) + "\n" for line in self.lines))
        if self.architecture:
            self.architecture.write(self.path, self.path)
        self._write("README.md", training_card(record))
        self._write(RECORD, json.dumps(record, indent=2) + "\n")
        self._forget_before(self.steps)

    def _checkpoint(
        self, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]
    ) -> Checkpoint:
        source = RecordedSource(tensors, f"a run in {self.path}", training=dict(record))
        return Checkpoint(LinearForm.of(source), self.architecture)

    def _write(self, name: str, text: str) -> None:
        with atomic_output(self.path / name, overwrite=True) as part:
            part.write_text(text, encoding="utf-8")

    def weights(self) -> Checkpoint:
        """The finished run's weights."""
        return Checkpoint(open_checkpoint(self.path / WEIGHTS).form, self.architecture)


def states_in(path: Path) -> dict[int, Path]:
    """Step -> the state of it that an unfinished run in a folder can go on from."""
    files = ((file.name[len(STATE) : -len(".pt")], file) for file in path.glob(f"{STATE}*.pt"))
    return {int(step): file for step, file in files if step.isdecimal()}


class RecordedSource(MemorySource):
    """Weights in memory that tell the metadata of the file they go to how they were made."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], ref: str, **records: Any) -> None:
        super().__init__(tensors, ref)
        self._records = records

    def describe(self) -> dict[str, object]:
        """As every source's, and the records."""
        return {**super().describe(), **self._records}


def training_record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The record that a run left in its weights' metadata: config, base, task, node, samples; None for other weights."""
    [source, *others] = checkpoint.form.sources
    made_from = {} if others else getattr(source, "made_from", {})
    base = made_from.get("base")
    record = base.get("training") if isinstance(base, dict) else None
    return record if isinstance(record, dict) and _sound(record) else None


def _sound(record: Mapping[str, Any]) -> bool:
    """True if a record has what is asked of it: anyone may have written the file."""
    kinds = {"config": dict, "node": dict, "base": str, "task": str, "source": str, "samples": int}
    if not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        return False
    numbers = [
        record["config"].get("seed"),
        *(record["node"].get(key) for key in ("index", "count")),
    ]
    return (
        all(isinstance(number, int) for number in numbers)
        and "data" in record["node"]
        and record["samples"] > 0
    )
