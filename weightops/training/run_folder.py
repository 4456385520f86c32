"""The folder of a fine-tuning run: states while it lasts; weights, log and record at its end."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from weightops.algebra.kernels import has_nonfinite
from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.formats.torch_objects import read_object, read_texts
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.opening import open_checkpoint
from weightops.checkpoints.training_record import training_record
from weightops.errors import CheckpointError, NonfiniteError, OutputError
from weightops.hub.cards import CardFacts, training_card
from weightops.support.atomic import atomic_output, check_free, clear_killed
from weightops.support.json_files import read_json
from weightops.support.lazy import torch
from weightops.support.result_files import CARD
from weightops.support.text import first_few

log = logging.getLogger("weightops")

WEIGHTS, LOG, RECORD, STATE = "finetuned.safetensors", "log.jsonl", "training.json", "training."
EMA = "ema"
"""The folder of the moving average of the weights, inside of the run's folder."""
CHECKPOINT_EVERY = 500
"""Steps between the states that a run can be resumed from."""


class Stateful(Protocol):
    """An object whose state a run saves and restores."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class RunFolder:
    """The folder of a run, which opens as a model when the run is finished.

    Of a run whose nodes average on the way, two states are kept: the last one, and the last one
    from before the latest average, because another node may not have come any further.

    Args:
        path: the folder.
        identity: config, base, task, digest and node; a run with another identity isn't resumed.
        architecture: the architecture of the weights.
        steps: steps of the whole run.
        averages_before: step -> number of averages over the nodes up to its end.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        architecture: Architecture | None,
        steps: int,
        averages_before: Callable[[int], int],
    ) -> None:
        self.path = path
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.architecture = architecture
        self.steps = steps
        self.lines: list[dict[str, float]] = []
        self.finished = False
        self._averages_before = averages_before

    def begin(self, *, resume: bool, overwrite: bool) -> list[int]:
        """Prepare the folder and return the steps that the run can resume from.

        The last step of the run is among them if the run is finished. With both arguments true, a
        run that was started with ``overwrite`` is resumed, and another run is replaced.

        Raises:
            OutputError: if the folder holds a run, and neither argument is true.
            CheckpointError: if the run is to be resumed, and the folder holds another run.
        """
        if not resume:
            check_free(self.path / WEIGHTS, overwrite=overwrite)
            if states_in(self.path) and not overwrite:
                raise OutputError(
                    f"{self.path} holds a run that was interrupted",
                    hint="resume=True continues the run, overwrite=True starts it again",
                )
        self.path.mkdir(parents=True, exist_ok=True)
        clear_killed(self.path)
        if resume:
            try:
                return self._resumable()
            except CheckpointError as error:
                if not overwrite:
                    raise
                log.info("%s; it is replaced", error.fact)
        self.go_back(0)
        return [0]

    def _resumable(self) -> list[int]:
        """Return the steps that the run in the folder can resume from; see `begin`."""
        steps = self._usable_states()
        has_weights = (self.path / WEIGHTS).is_file()
        if has_weights and (self.path / RECORD).is_file():
            self._check_identity(read_json(self.path / RECORD))
            self.finished = True
            steps.append(self.steps)
        elif has_weights and not training_record(open_checkpoint(self.path / WEIGHTS)):
            # Weights with a record are those of an earlier run, which this run replaces.
            raise CheckpointError(
                f"{self.path} holds weights, and no record of how they were made",
                hint="overwrite=True starts the run again",
            )
        return steps if len({self._averages_before(step) for step in steps}) > 1 else [0, *steps]

    def _usable_states(self) -> list[int]:
        """Return the steps that have a state of this run; skip damaged states if another is sound.

        Raises:
            CheckpointError: if all states are damaged, or one is of another run.
        """
        usable, damage = [], None
        for step in states_in(self.path):
            try:
                identity = json.loads(self._read(step, read_texts)["identity"])
            except CheckpointError as error:
                damage = error
                continue
            self._check_identity(identity)
            usable.append(step)
        if damage and not usable:
            raise damage
        if damage:
            log.warning("%s", damage)
        return usable

    def go_back(self, step: int) -> None:
        """Delete the states after a step and those no longer needed before it.

        Weights stay until new ones replace them.
        """
        if step < self.steps:
            (self.path / RECORD).unlink(missing_ok=True)
        self._delete_states(later for later in states_in(self.path) if later > step)
        self._delete_states_before(step)

    def _delete_states(self, steps: Iterable[int]) -> None:
        for step in list(steps):
            self._state(step).unlink()

    def _delete_states_before(self, step: int) -> None:
        """Delete the states that no node needs once this node has come to a step."""
        states = states_in(self.path)
        averages = self._averages_before(step)
        earlier = [kept for kept in states if self._averages_before(kept) < averages]
        self._delete_states({*states} - {step, max(earlier, default=step)})

    def _state(self, step: int) -> Path:
        return self.path / f"{STATE}{step}.pt"

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        theirs, ours = ({**run.get("config", {}), **run} for run in (identity, self.identity))
        theirs.setdefault("precision", "float32")  # 0.1.0 recorded none
        differences = [
            f"{key} {theirs.get(key)!r}, not {ours[key]!r}"
            for key in ours
            if key != "config" and theirs.get(key) != ours[key]
        ]
        if differences:
            raise CheckpointError(
                f"{self.path} holds another run: {first_few(differences)}",
                hint="give the arguments of that run, or start again without resume=True",
            )

    def restore(self, stateful: Mapping[str, Stateful], step: int) -> None:
        """Load the log and the objects' states after a number of steps; after 0 there is none."""
        if not step:
            return
        state = self._read(step, _whole)
        for name, target in stateful.items():
            target.load_state_dict(state[name])
        self.lines = json.loads(state["lines"])
        log.info("resuming from step %d", step)

    def _read(self, step: int, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Read the state after a step, or its texts alone."""
        path = self._state(step)
        try:
            state = read(path)
            json.loads(state["identity"])
        except (CheckpointError, TypeError, LookupError, ValueError, OSError) as error:
            raise CheckpointError(
                f"{path} isn't a state that a run can resume from",
                hint="delete the file, or start again with overwrite=True",
            ) from error
        return state

    def keep(self, states: Mapping[str, Any], step: int) -> None:
        """Write the state after a step, complete or not at all, and the log."""
        self._write_state({"lines": json.dumps(self.lines), **states}, step)
        self._write_log()
        self._delete_states_before(step)

    def _write_state(self, state: Mapping[str, Any], step: int) -> None:
        content = io.BytesIO()  # torch.save to a file reports a full disk as another error
        torch.save({**state, "identity": json.dumps(self.identity)}, content)
        with atomic_output(self._state(step), overwrite=True) as temporary:
            temporary.write_bytes(content.getbuffer())

    def state_bytes(self, step: int) -> bytes:
        """Return the state after a step, for another node."""
        return self._state(step).read_bytes()

    def accept_state(self, content: bytes, step: int) -> None:
        """Write the state that another node sent as this run's own."""
        self._write_state(read_object(bytearray(content), "the state of another node"), step)

    def finish(
        self, weights: Mapping[str, torch.Tensor], ema: Mapping[str, torch.Tensor], **facts: Any
    ) -> None:
        """Write the results of the run and delete its states.

        The weights come first, because a full disk has no room for them. The record comes last,
        because it marks the run as finished.

        Args:
            weights: the tensors of the whole model.
            ema: the same with the moving average; empty if there is none.
            facts: entries of the record besides the run's identity.

        Raises:
            NonfiniteError: if the weights hold NaN or infinities.
        """
        nonfinite = [name for name, tensor in weights.items() if has_nonfinite(tensor)]
        if nonfinite:
            raise NonfiniteError(
                f"the training of {self.path} diverged: NaN or Inf in {first_few(nonfinite)}",
                hint="a lower learning rate may help",
            )
        record = {**self.identity, **facts}
        self._save(weights, record, self.path / WEIGHTS)
        if ema:
            self._save(ema, record, self.path / EMA)
        self._write_log()
        if self.architecture:
            self.architecture.write(self.path)
        self._write(CARD, self._card(record))
        self._write(RECORD, json.dumps(record, indent=2) + "\n")
        self._delete_states_before(self.steps)

    def _card(self, record: Mapping[str, Any]) -> str:
        of_library, inputs = CardFacts(), {}
        if self.architecture:
            of_library = self.architecture.card_facts
            inputs = {record["model"]: self.architecture.folder}
        device = str(record.get("device", "cpu"))
        return training_card(record).text(of_library, device, name=self.path.name, inputs=inputs)

    def _save(
        self, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any], path: Path
    ) -> None:
        source = MemorySource(
            tensors, f"a run in {self.path.name}", record={"training": dict(record)}
        )
        checkpoint = Checkpoint(LinearForm.of(source), self.architecture)
        checkpoint.save(path, overwrite=True, on_nonfinite="error")

    def _write_log(self) -> None:
        self._write(LOG, "".join(json.dumps(line) + "\n" for line in self.lines))

    def _write(self, name: str, text: str) -> None:
        with atomic_output(self.path / name, overwrite=True) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def weights(self) -> Checkpoint:
        """Return the finished run's weights."""
        return Checkpoint(open_checkpoint(self.path / WEIGHTS).form, self.architecture)


def _whole(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_object(bytearray(path.read_bytes()), str(path))
    return state


def states_in(path: Path) -> dict[int, Path]:
    """Return step -> file of the states that an unfinished run in a folder can resume from."""
    files = ((file.name[len(STATE) : -len(".pt")], file) for file in path.glob(f"{STATE}*.pt"))
    return {int(step): file for step, file in files if step.isdecimal()}
