"""PAINT: patch a model on one task without harming others (arXiv 2208.05592)."""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from weightops.checkpoints.checkpoint import Checkpoint, CheckpointLike, open_checkpoint
from weightops.checkpoints.likeness import open_like
from weightops.errors import MissingExtraError, OutputError, TaskError
from weightops.evaluators.clip import Clip
from weightops.evaluators.zero_shot import as_tasks, metrics, predict, record
from weightops.files import check_free, jsonable, whole, write_json
from weightops.finetuning import TrainingConfig, config_for, finetune
from weightops.keys import finite
from weightops.reports.card import patch_card
from weightops.reports.frontier import draw_frontier
from weightops.search import Choice, NothingSatisfiesError, Point, Rule, choose
from weightops.task_vector import TaskVector
from weightops.tasks.table import RENDERED
from weightops.tasks.task import Task

log = logging.getLogger("weightops")

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))


@dataclass(frozen=True)
class Sweep:
    """What was measured at one alpha: every task's metrics, which images were right, and the weights' fingerprint."""

    alpha: float
    scores: Mapping[str, Mapping[str, Any]]
    hits: Mapping[str, torch.Tensor]
    fingerprint: str

    def point(self, patching: str, base: Sweep) -> Point:
        """Patching accuracy against the mean of the others, and the error of the latter's difference from the base's."""
        supported = [name for name in self.scores if name != patching]
        changes = [self.hits[name].double() - base.hits[name].double() for name in supported]
        variance = sum(float(change.var(unbiased=False)) / len(change) for change in changes)
        mean = sum(self.scores[name]["acc1"] for name in supported) / len(supported)
        return Point(self.alpha, self.scores[patching]["acc1"], mean, math.sqrt(variance) / len(supported))


@dataclass(frozen=True)
class Plan:
    """What a patch will do and what it takes, for ``--dry-run``."""

    model: str
    task: str
    supported: tuple[str, ...]
    alphas: tuple[float, ...]
    config: TrainingConfig
    training_images: int
    evaluated_images: int
    output: str
    output_bytes: int
    free_bytes: int


class Patch:
    """One patching run: fine-tune, sweep alpha on validation data, choose, confirm on test data once, write.

    See `patch` for the arguments; the steps can be called one by one.
    """

    def __init__(
        self,
        task: str | Task,
        *,
        model: CheckpointLike = "embedded",
        supported: Iterable[str | Task] | None = None,
        alphas: Iterable[float] = ALPHAS,
        rule: Rule = "patching",
        max_supported_drop: float = 0.01,
        finetuned: CheckpointLike | None = None,
        device: str = "auto",
        **training: Any,
    ) -> None:
        [self.task] = as_tasks(task)
        self.supported = [t for t in as_tasks(RENDERED if supported is None else supported) if t.name != self.task.name]
        if not self.supported:
            raise TaskError("a patch needs at least one supported task, to tell what it harms")
        self.alphas = tuple(sorted({0.0, 1.0, *map(finite, alphas)}))
        self.rule, self.max_supported_drop = rule, max_supported_drop
        self.checkpoint = open_checkpoint(model)
        self.finetuned = open_like(finetuned, self.checkpoint) if finetuned is not None else None
        self.config = config_for(self.checkpoint, **training)
        self.device = device

    @property
    def tasks(self) -> list[Task]:
        """The patching task, then the supported ones."""
        return [self.task, *self.supported]

    def plan(self, out: Path) -> Plan:
        """What `run` would do."""
        validation, test = (sum(task.sizes[split] for task in self.tasks) for split in ("validation", "test"))
        copies = (
            2 if self.finetuned else 6
        )  # the model and the vector; before that weights and state of the fine-tuning
        size = copies * sum(spec.numel * 4 for spec in self.checkpoint.specs.values())
        parent = next(p for p in out.absolute().parents if p.exists())
        return Plan(
            self.checkpoint.ref, self.task.name, tuple(t.name for t in self.supported), self.alphas, self.config,
            0 if self.finetuned else self.config.steps * self.config.batch_size, len(self.alphas) * validation + 3 * test,
            str(out), size, shutil.disk_usage(parent).free,
        )  # fmt: skip

    def run(
        self,
        out: Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        on_sweep: Callable[[Sweep], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Do it all; the content of ``summary.json``. ``out`` appears whole, at the end."""
        check_free(out, overwrite=overwrite)
        plan = self.plan(out)
        if plan.free_bytes < plan.output_bytes:
            need, free = plan.output_bytes / 1e6, plan.free_bytes / 1e6
            raise OutputError(f"{out} needs about {need:.0f} MB while it is made, and {free:.0f} MB are free")
        for task in self.tasks:
            for split in ("validation", "test"):
                task.load(split)[0]  # what can't be had is better told now than after the fine-tuning
        work = out.with_name(f".{out.name}.run")
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        started = time.monotonic()
        clip = Clip.open(self.checkpoint, self.device)
        base = clip.base.to(next(clip.module.parameters()).dtype)
        try:
            finetuned = self.finetuned or finetune(clip, self.task, self.config, out=work, resume=resume)
            tuned = time.monotonic()
            vector = TaskVector(base, finetuned.to(next(clip.module.parameters()).dtype))
            sweep = [self._measure(clip, vector, base, alpha, "validation", on_sweep) for alpha in self.alphas]
            choice = self._choose(self.points(sweep))
            swept = time.monotonic()
            test = [self._measure(clip, vector, base, alpha, "test") for alpha in (0.0, 1.0, choice.alpha)]
            seconds = {"finetune": tuned - started, "sweep": swept - tuned, "total": time.monotonic() - started}
            summary = self._summary(clip, choice, test, seconds, out)
            with whole(out, overwrite=overwrite) as part:
                part.mkdir()
                self._write(part, clip, vector.apply(base, choice.alpha), sweep, test, summary)
                if (work / "log.jsonl").is_file():
                    shutil.copyfile(work / "log.jsonl", part / "finetuning.jsonl")
                vector.save(part / "task_vector.safetensors")
        except (KeyboardInterrupt, OSError, OutputError):
            raise  # the work folder is kept, to go on from
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
        return summary

    def points(self, sweep: Sequence[Sweep]) -> list[Point]:
        """The sweep as points; alpha 0 must be in it."""
        base = next(s for s in sweep if s.alpha == 0)
        return [s.point(self.task.name, base) for s in sweep]

    def _choose(self, points: Sequence[Point]) -> Choice:
        choice = choose(points, rule=self.rule, max_supported_drop=self.max_supported_drop)
        if choice.alpha == 0:
            best = max((p for p in points if p.alpha), key=lambda p: (p.supported, p.patching))
            raise NothingSatisfiesError(
                f"no alpha improves {self.task.name} within the rule, so there is no patch; the one that costs least is alpha "
                f"{best.alpha:g}: {best.patching:.2%} at {best.supported:.2%} supported"
            )
        return choice

    def _measure(
        self,
        clip: Clip,
        vector: TaskVector,
        base: Checkpoint,
        alpha: float,
        split: str,
        on_sweep: Callable[[Sweep], None] = lambda _: None,
    ) -> Sweep:
        vector.apply_(clip.module, alpha, base=base)
        scores, hits = {}, {}
        for task in self.tasks:
            guesses, labels = predict(clip, task, split), clip.pixels(task, split).labels
            scores[task.name] = metrics(guesses, labels, len(task.classes))
            hits[task.name] = guesses[:, 0] == labels
        result = Sweep(alpha, scores, hits, vector.apply(base, alpha).fingerprint)
        on_sweep(result)
        return result

    def _summary(
        self, clip: Clip, choice: Choice, test: Sequence[Sweep], seconds: Mapping[str, float], out: Path
    ) -> dict[str, Any]:
        roles = {task.name: "patching" if task is self.task else "supported" for task in self.tasks}
        return {
            "alpha": choice.alpha,
            "chosen_on": "the validation splits of " + ", ".join(roles),
            "why": choice.why,
            "tasks": {
                task.name: {
                    "role": roles[task.name],
                    "source": task.source,
                    **{
                        which: dict(s.scores[task.name])
                        for which, s in zip(("base", "finetuned", "patched"), test, strict=True)
                    },
                }
                for task in self.tasks
            },
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "model": {"ref": self.checkpoint.ref, "fingerprint": self.checkpoint.fingerprint},
            "finetuned": self.finetuned.ref if self.finetuned else None,
            "training": None if self.finetuned else asdict(self.config),
            "seed": self.config.seed,
            "device": str(clip.device),
            "output": str(out.absolute()),
            "versions": versions(),
        }

    def _write(
        self,
        folder: Path,
        clip: Clip,
        patched: Checkpoint,
        sweep: Sequence[Sweep],
        test: Sequence[Sweep],
        summary: Mapping[str, Any],
    ) -> None:
        assert patched.architecture is not None
        patched.save_into(folder, final=Path(summary["output"]))
        names = ("base", "finetuned", "patched")
        rows = [
            {**record(clip, task, split, s.scores[task.name], s.fingerprint), "alpha": s.alpha, "weights": which}
            for split, measured in (
                ("validation", [("sweep", s) for s in sweep]),
                ("test", list(zip(names, test, strict=True))),
            )
            for which, s in measured
            for task in self.tasks
        ]
        (folder / "results.jsonl").write_text(
            "".join(json.dumps(jsonable(row)) + "\n" for row in rows), encoding="utf-8"
        )
        (folder / "README.md").write_text(patch_card(summary), encoding="utf-8")
        points = self.points(sweep)
        [chosen] = [point for point in points if point.alpha == summary["alpha"]]
        before, after = (s.point(self.task.name, test[0]) for s in (test[0], test[2]))
        gain = f"{self.task.name} {100 * before.patching:.1f} → {100 * after.patching:.1f} %"
        cost = f"supported {100 * before.supported:.1f} → {100 * after.supported:.1f} %"
        title = f"{gain}, {cost} (test)"
        supported = (
            self.supported[0].name if len(self.supported) == 1 else f"mean of {len(self.supported)} supported tasks"
        )
        try:
            draw_frontier(
                folder / "frontier.png", points, chosen, title=title, patching=self.task.name, supported=supported
            )
        except MissingExtraError as error:
            log.warning("frontier.png is left out: %s", error)
        write_json(folder / "summary.json", summary)


def patch(
    task: str | Task,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_sweep: Callable[[Sweep], None] = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    r"""Patch a model on one task without harming others (PAINT, arXiv 2208.05592).

    Fine-tune under the frozen zero-shot head, then :math:`\theta = (1 - \alpha)\theta_0 + \alpha\theta_{ft}` with alpha chosen on
    validation data of the patching and the supported tasks; the test splits are used once, after that.

    Args:
        task: what to patch: a name or a `Task`.
        out: the folder for the patched model, ``results.jsonl``, ``summary.json`` and ``frontier.png``; it appears whole.
        resume: go on from where a killed run stopped.
        overwrite: replace ``out``.
        on_sweep: called with the validation scores at each alpha.
        options: ``model`` (default the embedded one), ``supported`` tasks (default all rendered ones), ``alphas``, ``rule`` ("patching" or
            "mean", see `choose`), ``max_supported_drop``, ``finetuned`` (weights to use instead of fine-tuning), ``device``, and any field
            of `TrainingConfig`, such as ``steps`` or ``seed``.

    Returns:
        The content of ``summary.json``.

    Raises:
        OutputError: if ``out`` exists or the disk is full.
        NothingSatisfiesError: if no alpha satisfies the constraint; then nothing is written.
    """
    return Patch(task, **options).run(Path(out), resume=resume, overwrite=overwrite, on_sweep=on_sweep)


def versions() -> dict[str, str]:
    """Versions of what numbers may depend on."""
    packages = ("weightops", "torch", "open_clip_torch", "torchvision", "pillow", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
