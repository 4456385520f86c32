"""lo-fi against its baselines (arXiv 2210.11948).

The baselines are communication in every step, single nodes, a moving average and an ensemble.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from weightops.algebra.precision import Precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import OptionError
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.language_model import LanguageModel, token_log_likelihoods
from weightops.evaluation.shift import effective_robustness, shift
from weightops.evaluation.units import ACCURACY, PERPLEXITY, unit_for
from weightops.evaluation.zero_shot import logits
from weightops.support.atomic import atomic_output
from weightops.support.json_files import write_json
from weightops.support.lazy import torch, without_gradients
from weightops.support.progress import job
from weightops.support.ranges import Range
from weightops.tasks.corrupted import CORRUPTIONS, SEVERITIES
from weightops.tasks.table import TaskLike, TaskList, as_task, as_tasks
from weightops.tasks.task import Task
from weightops.tasks.texts import TextTask
from weightops.training import lofi
from weightops.training.config import TrainingConfig, config_for
from weightops.training.finetune import fit, learner_for
from weightops.training.learners import Learner, TextLearner
from weightops.training.nodes import Node, OneProcess
from weightops.training.run_folder import CHECKPOINT_EVERY, EMA, LOG, RECORD
from weightops.training.training_loop import step_work

EMA_DECAY = 0.99
"""Decay of the moving average of a node, where the recipe has none."""
LOGITS = 1 << 26
"""Logits of a text that are in memory at once, for each of two models."""
_OTHERS = 4
"""Models that are scored besides the nodes: base, baseline, average and moving average."""
BASE, BASELINE, ALONE, ENSEMBLE = "base", "baseline", " alone", "ensemble"


def compare_with_baselines(
    task: TaskLike,
    out: str | Path,
    *,
    model: CheckpointLike = "embedded",
    training: TrainingConfig | None = None,
    strategy: OneProcess | None = None,
    nodes: Annotated[int, Range(min=1)] | None = None,
    like: Node | None = None,
    checkpoint_every: Annotated[int, Range(min=1)] = CHECKPOINT_EVERY,
    resume: bool = False,
    overwrite: bool = False,
    shifted: TaskList | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    log_to: str | None = None,
) -> dict[str, Any] | None:
    """Fine-tune with communication in every step and without, on equally many samples; score all.

    Of a text, the training part is learned, and models are scored on its test part.

    Args:
        task: what to learn: a name, a folder, the path of a text or a `Task`.
        out: folder for ``baseline``, the nodes, ``merged`` (see `lofi.run`) and
            ``comparison.json``.
        model: the model to start from.
        training: the recipe. Default: that of `config_for`.
        strategy: this process's node, from `connected`. Default: this process alone.
        nodes: number of nodes, one after another; only without torchrun.
        like: how the nodes work together.
        checkpoint_every: steps between states that a killed run can be resumed from.
        resume: continue each run from its last state.
        overwrite: replace runs that exist.
        shifted: for a text: other texts, on whose test parts all models are scored, too.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: of fine-tuning, as for `finetune`; scores are in float32.
        log_to: where the logs go as well, as for `finetune`.

    Returns:
        In the process that wrote the average, ``models`` and ``cost``; None in others. ``models``
        has, by name, accuracy on the test split, accuracy under shift, and effective robustness
        against the line through base, baseline and single nodes; for a text, its perplexity and the
        geometric mean of those of the shifted texts. ``cost`` has the seconds of training and of
        communication.

    Raises:
        OptionError: if shifted texts are named for images, or images for a text.
    """
    out, strategy, task = Path(out), strategy or OneProcess(), as_task(task)
    others = as_tasks(shifted or ())
    opened, score = _opened(model, task, others, device, precision)
    config = training or config_for(opened.base)
    config = replace(config, ema=config.ema or EMA_DECAY)
    learner = learner_for(opened, task, config)
    trained = 2 * config.steps * step_work(config)  # without communication and with
    with job("lo-fi", trained + ((nodes or 1) + _OTHERS) * _work(opened, task, others)):
        return _compare(
            learner,
            out,
            partial(score, opened.in_precision("float32"), task),
            config,
            strategy,
            nodes=nodes,
            like=like,
            checkpoint_every=checkpoint_every,
            resume=resume,
            overwrite=overwrite,
            log_to=log_to,
        )


def _compare(
    learner: Learner,
    out: Path,
    score: Callable[[Mapping[str, Checkpoint]], dict[str, dict[str, Any]]],
    config: TrainingConfig,
    strategy: OneProcess,
    *,
    nodes: int | None,
    like: Node | None,
    **how: Any,
) -> dict[str, Any] | None:
    """Train, score and record: see `compare_with_baselines`."""
    fit(learner, config, out=out / BASELINE, strategy=strategy.as_one_node(), **how)
    average = lofi.run(
        learner, out, training=config, strategy=strategy, nodes=nodes, like=like, **how
    )
    if average is None:
        return None
    folders = {name: out / Path(name).name for name in average.weights}
    first = next(iter(folders))
    models = {BASE: learner.base, BASELINE: open_checkpoint(out / BASELINE)}
    models |= {f"{name}{ALONE}": open_checkpoint(folder) for name, folder in folders.items()}
    models |= {"average": average.model, f"EMA of {first}": open_checkpoint(folders[first] / EMA)}
    lofi_cost = _cost(folders[first]) | {"communication_seconds": strategy.seconds}
    result = {
        "task": learner.name,
        "unit": PERPLEXITY.name if isinstance(learner, TextLearner) else ACCURACY.name,
        "config": asdict(config),
        "average": average.record(),
        "precision": learner.precision,
        "models": score(models),
        "cost": {"baseline": _cost(out / BASELINE), "lo-fi": lofi_cost},
    }
    with atomic_output(out / "comparison.json", overwrite=True) as temporary:
        write_json(temporary, result)
    return result


def _opened(
    model: CheckpointLike, task: Task, others: Sequence[Task], device: str, precision: Precision
) -> tuple[Any, Callable[..., dict[str, dict[str, Any]]]]:
    """Return the model, and the function that scores all models."""
    if isinstance(task, TextTask):
        unit_for([task, *others])
        opened = LanguageModel.open(model, device, precision=precision)
        texts = [text for text in others if isinstance(text, TextTask)]
        for text in (task, *texts):
            opened.blocks(text, "test")  # what is too short is told at once
        return opened, partial(scored_texts, others=texts)
    if others:
        raise OptionError(
            f"{task.name} has images, which are scored under corruptions", hint="leave shifted= out"
        )
    return ImageModel.open(model, device, learning=task, precision=precision), _scored


def _work(model: Any, task: Task, others: Sequence[Task]) -> int:
    """Return the number of samples that each model is scored on."""
    if isinstance(model, LanguageModel):
        texts = [text for text in (task, *others) if isinstance(text, TextTask)]
        return sum(len(model.blocks(text, "test")) for text in texts)
    return (len(CORRUPTIONS.names()) * len(SEVERITIES) + 1) * task.sizes["test"]


def scored_texts(
    model: LanguageModel,
    task: TextTask,
    models: Mapping[str, Checkpoint],
    *,
    others: Sequence[TextTask] = (),
) -> dict[str, dict[str, Any]]:
    """Return name -> perplexities of each model and of the ensemble of single nodes."""
    texts = {text.name: _text_losses(model, text, models) for text in (task, *others)}
    rows = {}
    for name in texts[task.name]:
        found = {text: PERPLEXITY.reading(-losses[name]) for text, losses in texts.items()}
        shifted = [found[text.name] for text in others]
        rows[name] = {
            "in_distribution": found[task.name],
            **({"under_shift": PERPLEXITY.mean(shifted)} if shifted else {}),
            "texts": found,
        }
    return rows


@without_gradients
def _text_losses(
    model: LanguageModel, task: TextTask, models: Mapping[str, Checkpoint]
) -> dict[str, float]:
    """Return name -> mean loss of a token, in nats, of each model and of the ensemble.

    The ensemble's logits are the mean of its members'. Few blocks at a time are scored by all
    models, so that the logits of few blocks are in memory.
    """
    blocks = model.blocks(task, "test")
    together = max(1, LOGITS // (blocks.shape[1] * model.vocabulary))
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in (*models, ENSEMBLE)}
    members = [name for name in models if name.endswith(ALONE)]
    for some in blocks.split(together):  # type: ignore[no-untyped-call]
        mean = torch.zeros(())
        for name, checkpoint in models.items():
            checkpoint.load_into(model.module)
            logits = torch.cat([part.cpu() for _, part in model.logits(some, 8, task.name)])
            losses[name].append(-token_log_likelihoods(logits, some))
            if name in members:
                mean = mean + logits / len(members)
        losses[ENSEMBLE].append(-token_log_likelihoods(mean, some))
    return {name: torch.cat(parts).double().mean().item() for name, parts in losses.items()}


def _scored(
    image_model: ImageModel, task: Task, models: Mapping[str, Checkpoint]
) -> dict[str, dict[str, Any]]:
    """Return name -> scores of each model and of the ensemble of single nodes."""
    score = _scorer(image_model, models)
    rows = {name: shift(partial(score, name), task) for name in [*models, ENSEMBLE]}
    points = {name: (row["in_distribution"], row["under_shift"]) for name, row in rows.items()}
    references = [points[n] for n in points if n in (BASE, BASELINE) or n.endswith(ALONE)]
    for name, row in rows.items():
        row["effective_robustness"] = effective_robustness(points[name], references)
    return rows


def _scorer(
    image_model: ImageModel, models: Mapping[str, Checkpoint]
) -> Callable[[str, Task, str], float]:
    """Return a function of a model's name, a task and a split that gives the accuracy.

    All models are scored at once, in one resident module that keeps the images.
    """

    @cache
    def accuracies(task: Task, split: str) -> dict[str, float]:
        scores = {}
        ensemble_logits = torch.zeros(())
        labels = image_model.pixels(task, split).labels
        for name, checkpoint in models.items():
            checkpoint.load_into(image_model.module)
            model_logits = torch.cat([batch.cpu() for batch in logits(image_model, task, split)])
            scores[name] = _accuracy(model_logits, labels)
            if name.endswith(ALONE):
                ensemble_logits = ensemble_logits + model_logits
        return {**scores, ENSEMBLE: _accuracy(ensemble_logits, labels)}

    return lambda name, task, split: accuracies(task, split)[name]


def _accuracy(class_logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (class_logits.argmax(1) == labels).double().mean().item()


def _cost(run: Path) -> dict[str, float]:
    """Return the seconds that a run took, and those that it spent in communication."""
    record = json.loads((run / RECORD).read_text(encoding="utf-8"))
    lines = (run / LOG).read_text(encoding="utf-8").splitlines()
    seconds = json.loads(lines[-1])["seconds"] if lines else math.nan
    return {"seconds": seconds, "communication_seconds": record["communication_seconds"]}
