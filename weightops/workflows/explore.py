"""Explore edits by hand: coefficients are moved, and accuracies follow at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from weightops.algebra.precision import Precision
from weightops.checkpoints.opening import CheckpointLike
from weightops.checkpoints.origin import Origin
from weightops.errors import OptionError, WeightopsError
from weightops.evaluation.image_model import check_finite
from weightops.evaluation.units import require_images
from weightops.merging.recipe import Recipe
from weightops.search.glimpses import Glimpses, Guesses
from weightops.search.goal import Coefficients
from weightops.search.session import EditSession
from weightops.support.lazy import torch, without_gradients
from weightops.task_vector import TaskVector
from weightops.tasks.table import TaskList, as_tasks
from weightops.tasks.task import Task
from weightops.workflows.soup import short_names

EXAMPLES, OWN = 6, 6
"""The most changed pictures of a task that are shown, and the most pictures of one's own."""


class Explorer:
    """One model whose edits are measured as their coefficients are moved.

    One edit is measured at a time, first on a few images and then on more; a move ends what is
    being measured. `work` does all of it in the one thread that calls it; the other methods may
    be called from any thread.

    Args:
        model: the model to edit.
        vectors: paths of task vectors, or of fine-tuned weights.
        tasks: what to measure on.
        images: the most validation images of each task.
        device: where to compute.
        precision: what the model is run in.

    Raises:
        OptionError: without vectors or tasks.

    Attributes:
        names: the names of the vectors.
        tasks: the tasks.
    """

    def __init__(
        self,
        model: CheckpointLike,
        vectors: Sequence[str | Path],
        tasks: TaskList,
        *,
        images: int,
        device: str,
        precision: Precision,
    ) -> None:
        self.tasks: list[Task] = as_tasks(tasks)
        if not vectors or not self.tasks:
            raise OptionError("an exploration needs a vector and a task at least")
        require_images(self.tasks, "images are explored")
        session = EditSession(model, self.tasks, device=device, precision=precision)
        self.names = short_names([str(path) for path in vectors])
        opened = [_of_base(session.vector(path), session) for path in vectors]
        self._paths = [str(path) for path in vectors]
        self._glimpses = Glimpses(session, dict(zip(self.names, opened, strict=True)), images)
        self._base: Coefficients = (0.0,) * len(opened)
        self._news = threading.Condition()
        self._wanted, self._moves, self._done = self._base, 0, -1
        self._closed = False
        self._pictures = 0
        self._own: dict[int, tuple[str, Image.Image]] = {}
        self._state: dict[str, Any] = {"version": 0, "done": False, "tasks": [], "own": []}

    # ------------------------------------------------------- from any thread

    def move(self, alpha: Sequence[float]) -> None:
        """Ask for an edit, which ends the measurement of another.

        Raises:
            OptionError: unless there is one finite number for each vector.
        """
        values = tuple(float(a) + 0.0 for a in alpha)
        if len(values) != len(self.names) or not all(abs(a) <= 1e3 for a in values):
            raise OptionError(f"{len(self.names)} coefficients from -1000 to 1000 are needed")
        with self._news:
            self._wanted, self._moves = values, self._moves + 1
            self._news.notify_all()

    def add_picture(self, name: str, picture: Image.Image) -> int:
        """Add a picture of one's own, in place of the oldest if there are many; return its id."""
        with self._news:
            self._pictures += 1
            self._own[self._pictures] = (name, picture)
            while len(self._own) > OWN:
                del self._own[min(self._own)]
            self._moves += 1
            self._news.notify_all()
            return self._pictures

    def state(self, seen: int = -1, seconds: float = 0.0) -> dict[str, Any]:
        """Return what is known of the wanted edit, when it is newer than version ``seen``.

        After so many seconds it is returned in any case.
        """
        with self._news:
            self._news.wait_for(lambda: self._closed or self._state["version"] > seen, seconds)
            return self._state

    def picture(self, task: int, index: int) -> Image.Image:
        """Return a validation image of a task.

        Raises:
            IndexError: if there is no such image.
        """
        images = self.tasks[task].load("validation")
        if index not in range(len(images)) or task < 0:
            raise IndexError(index)
        picture: Image.Image = images[index]
        return picture

    @property
    def recipe(self) -> Recipe:
        """The recipe of the wanted edit, which `weightops merge` makes the same weights from."""
        entries = [
            {"model": path, "weight": alpha}
            for path, alpha in zip(self._paths, self._wanted, strict=True)
            if alpha
        ]
        if not entries:
            raise OptionError("all coefficients are 0: that is the model itself")
        base = self._glimpses.session.base.ref
        return Recipe.of({"method": "task_arithmetic", "base": base, "models": entries})

    def close(self) -> None:
        """End `work`, and whoever waits for news."""
        with self._news:
            self._closed = True
            self._moves += 1
            self._news.notify_all()

    # --------------------------------------------------- in the one that works

    def work(self) -> None:
        """Measure what is asked for until `close` is called; the base comes first."""
        while not self._closed:
            with self._news:
                self._news.wait_for(lambda: self._closed or self._moves != self._done)
                alpha, move = self._wanted, self._moves
                self._done = move
            try:
                self._measure(alpha, move)
            except WeightopsError as error:
                self._tell(alpha, move, {"tasks": [], "own": [], "done": True, "error": error.fact})

    def _measure(self, alpha: Coefficients, move: int) -> None:
        base: Guesses = {}
        for seen in self._glimpses.look(self._base, lambda: not self._closed):
            base = seen
        if self._closed:
            return
        own = self._guess_own(alpha)
        for seen in self._glimpses.look(alpha, lambda: self._moves == move):
            told = [self._told(i, seen, base) for i in range(len(self.tasks))]
            done = all(task["images"] == task["of"] for task in told)
            self._tell(alpha, move, {"tasks": told, "own": own, "done": done})

    def _tell(self, alpha: Coefficients, move: int, news: Mapping[str, Any]) -> None:
        """Make news known, unless something newer is wanted."""
        with self._news:
            if move == self._moves:
                version = self._state["version"] + 1
                self._state = {"version": version, "alpha": list(alpha), **news}
                self._news.notify_all()

    def _told(self, index: int, seen: Guesses, base: Guesses) -> dict[str, Any]:
        """Return what is known of a task: accuracies, and what is fixed and broken."""
        task = self.tasks[index]
        guesses, order = seen[task.name], self._glimpses.orders[task.name]
        before, order = base[task.name][: len(guesses)], order[: len(guesses)]
        pixels = self._glimpses.session.model.pixels(task, "validation")
        labels = pixels.labels[torch.from_numpy(order)]
        change = (guesses == labels).int() - (before == labels).int()

        def examples(sign: int) -> list[dict[str, Any]]:
            places = (change == sign).nonzero().flatten().tolist()[:EXAMPLES]
            return [
                {
                    "index": int(order[place]),
                    "truth": task.classes[int(labels[place])],
                    "before": task.classes[int(before[place])],
                    "after": task.classes[int(guesses[place])],
                }
                for place in places
            ]

        return {
            "name": task.name,
            "images": len(guesses),
            "of": len(self._glimpses.orders[task.name]),
            "accuracy": (guesses == labels).double().mean().item(),
            "base": (before == labels).double().mean().item(),
            "fixed": int((change == 1).sum()),
            "broken": int((change == -1).sum()),
            "fixed_pictures": examples(1),
            "broken_pictures": examples(-1),
        }

    @without_gradients
    def _guess_own(self, alpha: Coefficients) -> list[dict[str, Any]]:
        """Return what the edit takes one's own pictures for, by task."""
        with self._news:
            own = dict(self._own)
        if not own:
            return []
        self._glimpses.set_to(alpha)
        model = self._glimpses.session.model
        model.module.eval()
        batch = torch.stack([model.preprocess(picture) for _, picture in own.values()])
        features = model.encode_image(batch)
        told = [{"id": key, "name": name, "guesses": []} for key, (name, _) in own.items()]
        for task in self.tasks:
            scores = features @ model.class_features(task).T
            check_finite(~scores.isfinite().all(1).cpu(), "the logits of a picture")
            for entry, best in zip(told, scores.argmax(1).tolist(), strict=True):
                entry["guesses"].append({"task": task.name, "guess": task.classes[best]})  # type: ignore[attr-defined]
        return told


def _of_base(vector: TaskVector, session: EditSession) -> TaskVector:
    """Return a vector as one of the session's base; of another, it warns now and at no move."""
    vector.apply(session.base)
    return TaskVector.of_form(vector.form, Origin.of(session.base))
