"""Fine-tuning of a model on a task, by one process, several processes or many nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.precision import Precision
from weightops.algebra.source import LINEARIZED
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import OptionError
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.language_model import LanguageModel
from weightops.evaluation.linearized import LinearizedModel
from weightops.support.arguments import check_arguments
from weightops.support.atomic import held
from weightops.support.calls import repeatable
from weightops.support.ranges import Range
from weightops.support.text import portable
from weightops.tasks.table import TaskLike, as_task
from weightops.tasks.task import Task
from weightops.tasks.texts import TextTask
from weightops.training.config import TrainingConfig, config_for
from weightops.training.learners import ImageLearner, Learner, TextLearner
from weightops.training.log_sinks import log_sink
from weightops.training.nodes import Node, OneProcess
from weightops.training.process_groups import LofiNode
from weightops.training.run_folder import CHECKPOINT_EVERY, RunFolder
from weightops.training.training_loop import train


@repeatable("finetune")
def finetune(
    model: CheckpointLike | ImageModel | LanguageModel,
    task: TaskLike,
    config: TrainingConfig | None = None,
    *,
    out: str | Path | None = None,
    checkpoint_every: Annotated[int, Range(min=1)] = CHECKPOINT_EVERY,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    log_to: str | None = None,
    node: Node | None = None,
    strategy: OneProcess | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Checkpoint:
    """Fine-tune the image encoder of a CLIP model on a task (arXiv 2208.05592, 2212.04089).

    The text encoder stays as it is, and so does the zero-shot head. Of a timm classifier, and of a
    causal language model that learns a text, all tensors are fine-tuned.

    Args:
        model: the model to start from: anything that `open_checkpoint` takes and that has a known
            architecture, or an `ImageModel` or `LanguageModel`, whose module is then trained in
            place.
        task: a name, a folder, the path of a text or a `Task`; only its training split is used.
        config: the recipe. Default: that of `config_for`.
        out: folder for the weights, which opens as a model, for ``log.jsonl`` and
            ``training.json``, and for states while the run lasts. All processes of a node must see
            the folder.
        checkpoint_every: steps between states that a killed run can be resumed from.
        resume: continue from the last state in ``out``. On CPU, with as many threads, the weights
            are the same to the bit as without the interruption.
        overwrite: replace a run in ``out``; its weights stay until the new ones are complete. With
            ``resume``, a run with other arguments is replaced, and one with these continues.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: float32, bfloat16, or auto: bfloat16 where the processor computes in it, else
            float32. Weights and their updates are float32 in any case.
        log_to: where the log goes as well: tensorboard (or tensorboard:FOLDER), wandb (or
            wandb:PROJECT), or jsonl:PATH.
        node: which node of how many this is, and so which images it sees (lo-fi, arXiv 2210.11948).
            Default: the only one.
        strategy: the processes of the node, from `connected`. Default: this process alone.
        on_step: function that is called after each step with its number, counted from 1.

    Returns:
        The fine-tuned weights: in memory, or from ``out`` if it is given.

    Raises:
        OutputError: if ``out`` holds a run, and neither ``resume`` nor ``overwrite`` is true.
        CheckpointError: if ``out`` holds another run than the one to resume.
        NonfiniteError: if weights for ``out`` have become NaN or infinite.
        OptionError: if a model can't be linearised, or is and the recipe doesn't say so.
    """
    learner = learner_for(model, as_task(task), config, device, precision)
    return fit(
        learner,
        config or config_for(learner.base),
        out=out,
        checkpoint_every=checkpoint_every,
        resume=resume,
        overwrite=overwrite,
        log_to=log_to,
        node=node,
        strategy=strategy,
        on_step=on_step,
    )


def learner_for(
    model: CheckpointLike | ImageModel | LanguageModel,
    task: Task,
    config: TrainingConfig | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> Learner:
    """Return a model with a task to learn: see `finetune`."""
    if isinstance(task, TextTask):
        if isinstance(model, ImageModel):
            raise OptionError(f"{model.base.ref} learns from images, and {task.name} is a text")
        return TextLearner(model, task, device=device, precision=precision)
    if isinstance(model, LanguageModel):
        raise OptionError(f"{model.base.ref} learns from texts, and {task.name} has images")
    image_model = ImageModel.open(model, device, learning=task, precision=precision)
    if (config or config_for(image_model.base)).linearized:
        image_model = LinearizedModel.of(image_model).in_precision(precision)
    return ImageLearner(image_model, task)


@repeatable("fit")
def fit(
    learner: Learner,
    config: TrainingConfig,
    *,
    out: str | Path | None = None,
    checkpoint_every: Annotated[int, Range(min=1)] = CHECKPOINT_EVERY,
    resume: bool = False,
    overwrite: bool = False,
    log_to: str | None = None,
    node: Node | None = None,
    strategy: OneProcess | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Checkpoint:
    """Fine-tune any learner, in place.

    The result and the errors are those of `finetune`, which says more on the arguments.

    Args:
        learner: the model with its training data and loss, such as a `ModuleLearner`.
        config: the recipe.
        out: folder for the weights, the log and the states.
        checkpoint_every: steps between states that a killed run can be resumed from.
        resume: continue from the last state in ``out``.
        overwrite: replace a run in ``out``; with ``resume``, only one with other arguments.
        log_to: where the log goes as well: tensorboard, wandb or jsonl:PATH.
        node: which node of how many this is.
        strategy: the processes of the node.
        on_step: function that is called after each step with its number.
    """
    check_arguments(fit, checkpoint_every=checkpoint_every)
    _check_linearized(learner, config, sharded=getattr(strategy, "fsdp", False))
    node, strategy = node or Node(), strategy or OneProcess()
    if node.every and not isinstance(strategy, LofiNode):
        raise OptionError(
            "nodes that average on the way must run at once", hint="start the nodes with torchrun"
        )
    folder = _run_folder(Path(out), learner, config, node) if out is not None else None
    with _held_folder(folder if strategy.rank == 0 else None):
        start, finished = _begin(folder, config, node, strategy, resume, overwrite)
        if folder is not None and finished:
            return folder.weights()
        parts = Path(out).parts if out is not None else (learner.name,)
        run = "/".join(parts[-2 if node.count > 1 else -1 :])
        with log_sink(None if strategy.rank else log_to, run, asdict(config)) as on_line:
            learner.prepare()
            weights, ema = train(
                learner,
                config,
                node,
                strategy,
                folder,
                start=start,
                checkpoint_every=checkpoint_every,
                on_step=on_step,
                on_line=on_line,
            )
        if folder is None or strategy.rank:
            source = MemorySource(weights, f"{learner.base.ref} fine-tuned on {learner.name}")
            source.linearized_at = learner.linearized_at
            return Checkpoint(LinearForm.of(source), learner.base.architecture)
        folder.finish(
            weights,
            ema,
            model=portable(learner.base.ref),
            **learner.reading,
            samples=config.steps * node.batch_size(config.batch_size),
            communication_seconds=strategy.seconds,
            device=str(learner.device),
            **({LINEARIZED: learner.linearized_at} if learner.linearized_at else {}),
        )
    return folder.weights()


def _check_linearized(learner: Learner, config: TrainingConfig, *, sharded: bool) -> None:
    """Refuse a model that is linearised where the recipe isn't for one, or the other way round."""
    if config.linearized and sharded:
        raise OptionError("a linearised model isn't sharded", hint="leave out fsdp=True")
    if config.linearized and learner.linearized_at is None:
        raise OptionError(
            f"the recipe is for a linearised model, and {learner.base.ref} isn't",
            hint="finetune(..., config) linearises a CLIP model",
        )
    if learner.linearized_at is not None and not config.linearized:
        raise OptionError(
            f"{learner.base.ref} is linearised at {learner.linearized_at['ref']}, and the recipe "
            "isn't for a linearised model",
            hint="linearized=True goes on with it, or start from an ordinary model",
        )


@contextmanager
def _held_folder(folder: RunFolder | None) -> Iterator[None]:
    """Hold the folder for this run, and remove it after an error if nothing was written to it."""
    with held(folder.path) if folder else nullcontext():
        try:
            yield
        except BaseException:
            if folder is not None:
                with suppress(OSError):  # it isn't empty
                    folder.path.rmdir()
            raise


def _run_folder(path: Path, learner: Learner, config: TrainingConfig, node: Node) -> RunFolder:
    identity = {
        "config": asdict(config),
        "base": learner.base.fingerprint,
        "task": learner.name,
        "digest": learner.digest,
        "node": asdict(node),
        "precision": learner.precision,
    }
    return RunFolder(path, identity, learner.base.architecture, config.steps, node.averages_before)


def _begin(
    folder: RunFolder | None,
    config: TrainingConfig,
    node: Node,
    strategy: OneProcess,
    resume: bool,
    overwrite: bool,
) -> tuple[int, bool]:
    """Prepare the folder, and return the step to start from and whether the run is finished."""
    start, finished = 0, False
    if folder is not None and strategy.rank == 0:
        resumable = folder.begin(resume=resume, overwrite=overwrite)
        start = strategy.agree_on_start(resumable, node, folder)
        finished = folder.finished and start == config.steps
        folder.go_back(start)
        strategy.mark_begun()
    return strategy.broadcast((start, finished))
