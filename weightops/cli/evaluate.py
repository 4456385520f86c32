"""``weightops evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightops.cli.borrowing import taken
from weightops.cli.from_signature import Borrowed, command
from weightops.cli.printing import echo, echo_json
from weightops.cli.signatures import names_in

if TYPE_CHECKING:
    from weightops.checkpoints.checkpoint import Checkpoint
    from weightops.evaluation.table import Evaluator
    from weightops.tasks.table import TaskList
    from weightops.tasks.task import Task

_SCORING = ("batch_size", "details")
_RUNNING = ("device", "precision")
_EVALUATOR = click.Option(
    ["--evaluator"],
    metavar=f"[{'|'.join(names_in('weightops.evaluation.table:EVALUATORS'))}]",
    default="zero_shot",
    show_default=True,
    help="How models are scored: see the text above.",
)
_TEXT = click.Option(
    ["--text"],
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Perplexity of language models on a text, instead of tasks.",
)


@command(
    Borrowed("weightops.evaluation.table:evaluate", only=("split", *_RUNNING, *_SCORING)),
    arguments=[_EVALUATOR, _TEXT],
)
def evaluate(
    models: tuple[str, ...] = ("embedded",),
    *,
    tasks: TaskList | None = None,
    base: str | None = None,
    strict: bool = False,
    reference: tuple[str, ...] = (),
    out: Path | None = None,
    overwrite: bool = False,
    json_: bool = False,
    **given: Any,
) -> None:
    """Score models on tasks; the embedded model if none is named.

        zero_shot     accuracy with the head that class names and prompts make, or with a
                      classifier's own
        shift         also under noise, blur, contrast, rotation and inversion, 5 severities each
        linear_probe  accuracy of a linear classifier trained on the model's features
        retrieval     images found by their captions, and captions by their images

    Of two models or more, each is also compared with the first on the same images (zero_shot): the
    difference of the accuracies with a 95 % interval, the exact McNemar test, and which images were
    fixed or broken, which --json and --out list.

    The files of --out are a superset of CLIP_benchmark's: `clip_benchmark build FOLDER/*.json`
    makes one table of them.

    Args:
        models: the models to score.
        tasks: the tasks. Default: all that weightops has.
        base: what weights are completed from, configuration included, and what task vectors and
            adapters are applied to.
        strict: refuse models that are configured differently from the base, and vectors that were
            made from another base, instead of warning.
        reference: with --evaluator shift: models whose line shows effective robustness; two or
            more.
        out: a folder for a JSON file a model and task.
        overwrite: replace an output that exists; it stays until the new one is complete.
    """
    from weightops.evaluation.table import EVALUATORS
    from weightops.support.atomic import reserved
    from weightops.tasks.table import EVALUATED, as_tasks
    from weightops.tasks.texts import refuse_texts

    if "text" in given:
        _check_text(given, tasks, base, out)
        _print_perplexity(models, given["text"], json_, **taken(given, _RUNNING))
        return
    name = given.get("evaluator", "zero_shot")
    evaluator = EVALUATORS[name]
    if reference and name != "shift":
        raise click.UsageError("--reference is for --evaluator shift")
    if len(reference) == 1:
        raise click.UsageError("a line needs two models or more after --reference")
    with reserved(out, overwrite=overwrite) if out is not None else nullcontext():
        opened = _open_models((*reference, *models), base, strict=strict)
        listed = as_tasks(tasks or EVALUATED)
        refuse_texts(listed, "evaluators score images", "--text scores language models")
        scoring = taken(given, _SCORING)
        split = given.get("split", "test")
        how = taken(given, _RUNNING)
        records = _score(opened, listed, evaluator, split, how, **scoring)
        columns = evaluator.columns_of(records[0]["metrics"])
        if reference:
            from weightops.evaluation.shift import add_robustness

            count = len(reference) * len(listed)
            records = add_robustness(records[count:], records[:count])
            columns.append("effective_robustness")
        if out is not None:
            _write(records, out, split, overwrite=overwrite)
    if json_:
        echo_json(records)
    else:
        _print(records, columns, show_models=len(models) > 1)
        _print_changes(records)


def _check_text(given: dict[str, Any], tasks: Any, base: str | None, out: Path | None) -> None:
    """Refuse options that aren't for language models."""
    if tasks or out or base or given.get("evaluator", "zero_shot") != "zero_shot":
        raise click.UsageError("--text takes no tasks, no --base, no --evaluator and no --out")
    source = click.get_current_context().get_parameter_source("models")
    if source is click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--text is for language models: name one")


def _open_models(names: Sequence[str], base: str | None, *, strict: bool) -> list[Checkpoint]:
    """Open models, completed from the base if there is one."""
    from weightops.checkpoints.checkpoint import Checkpoint
    from weightops.checkpoints.matching import open_matched
    from weightops.checkpoints.opening import open_checkpoint

    if base is None:
        return [open_checkpoint(name) for name in names]
    start = open_checkpoint(base)
    matched = [open_matched(name, start, strict=strict) for name in names]
    # An adapter of one end of a tied pair gives a model that isn't tied.
    return [
        Checkpoint(
            m.form, start.architecture if m.specs.keys() <= start.specs.keys() else m.architecture
        )
        for m in matched
    ]


def _score(
    models: Sequence[Checkpoint],
    tasks: Sequence[Task],
    evaluator: Evaluator,
    split: str,
    how: Mapping[str, Any],
    **scoring: Any,
) -> list[dict[str, Any]]:
    """Score each model on each task: one record for both, with its change from the first model."""
    from weightops.evaluation.image_model import ImageModel
    from weightops.evaluation.paired import Comparison
    from weightops.evaluation.table import evaluating
    from weightops.evaluation.zero_shot import record, zero_shot

    paired = len(models) > 1 and evaluator.function is zero_shot
    comparison = Comparison(tasks, split) if paired else None
    records: list[dict[str, Any]] = []
    with evaluating(evaluator, tasks, split, len(models)) as done:
        for checkpoint in models:
            model = ImageModel.open(checkpoint, **how)
            rows = []
            for task in tasks:
                if comparison:
                    scores = comparison.score(model, task, **scoring)
                else:
                    scores = evaluator.score(model, task, split, **scoring)
                rows.append(record(model, task, split, scores, kind=evaluator.kind))
                model.forget(task)
                done(task)
            records += comparison.add_changes(model, rows) if comparison else rows
    return records


def _write(records: Sequence[dict[str, Any]], out: Path, split: str, *, overwrite: bool) -> None:
    from weightops.support.atomic import atomic_output
    from weightops.support.json_files import write_json
    from weightops.support.text import portable

    with atomic_output(out, overwrite=overwrite) as folder:
        folder.mkdir()
        for i, record in enumerate(records):
            write_json(folder / f"{i:03}_{record['dataset']}_{split}.json", portable(record))


def _print(records: Sequence[dict[str, Any]], columns: Sequence[str], *, show_models: bool) -> None:
    from weightops.reports.table import table

    scored = [record for record in records if "source" in record]  # a mean has none
    rows = [
        [
            record["dataset"],
            *([record["model"]] if show_models else []),
            *(record["metrics"][column] for column in columns),
            record["metrics"]["n"],
            record["source"],
        ]
        for record in scored
    ]
    header = ["task", *(["model"] if show_models else []), *columns, "images", "source"]
    echo(table(header, rows))


def _print_changes(records: Sequence[dict[str, Any]]) -> None:
    """Print how each model differs from the first one on the same images."""
    from weightops.reports.table import table

    changed = [record for record in records if "change" in record]
    header = ["task", "difference", "95 % interval", "p (McNemar)", "fixed", "broken", "images"]
    for model in dict.fromkeys(record["model"] for record in changed):
        rows = [
            [
                record["dataset"],
                f"{100 * change['difference']:+.2f}",
                "{:+.2f} to {:+.2f}".format(*(100 * end for end in change["interval"])),
                f"{change['p_value']:.3g}",
                change["fixed"],
                change["broken"],
                change["n"],
            ]
            for record in changed
            if record["model"] == model
            for change in [record["change"]]
        ]
        first = next(record["change"]["from"] for record in changed if record["model"] == model)
        echo(f"\n{model} against {first}, in points of accuracy on the same images")
        echo(table(header, rows))
        for record in changed:
            if record["model"] == model:
                _print_images(record["dataset"], record["change"]["images"])


def _print_images(task: str, images: Sequence[Mapping[str, Any]]) -> None:
    """Print the first images that were fixed and broken."""
    from weightops.support.text import first_few

    for what, end in (("fixed", "after"), ("broken", "before")):
        names = [str(image["image"]) for image in images if image[end] == image["label"]]
        if names:
            echo(f"{what} of {task}: {first_few(names, 8)}")


def _print_perplexity(
    models: Sequence[str], text: Path, as_json: bool, device: str = "auto", precision: Any = "auto"
) -> None:
    from weightops.checkpoints.opening import open_checkpoint
    from weightops.evaluation.language_model import LanguageModel
    from weightops.evaluation.perplexity import perplexity, token_blocks
    from weightops.reports.table import table
    from weightops.support.progress import job

    opened = [open_checkpoint(name) for name in models]
    read = [token_blocks(checkpoint, text) for checkpoint in opened]
    results: list[dict[str, Any]] = []
    with job("evaluating", sum(map(len, read))):
        for name, checkpoint, blocks in zip(models, opened, read, strict=True):
            model = LanguageModel.open(checkpoint, device, precision=precision)
            value = perplexity(model.module, blocks, precision=precision)
            told = {"perplexity": value, "tokens": blocks.numel(), "precision": model.precision}
            results.append({"model": name, "text": str(text), **told})
    if as_json:
        echo_json(results)
        return
    rows = [[r["model"], f"{r['perplexity']:.4g}", r["tokens"]] for r in results]
    echo(table(["model", "perplexity", "tokens"], rows))
