"""``weightops evaluate``."""

from __future__ import annotations

from pathlib import Path

import click

from weightops.cli import options


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--tasks", type=options.TaskNames(), default=None, help="Default: all that weightops has."
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Perplexity of language models on a text, instead of tasks.",
)
@click.option(
    "--split",
    type=click.Choice(["test", "validation", "train"]),
    default="test",
    show_default=True,
    help="Which images.",
)
@click.option(
    "--base",
    default=None,
    help="What weights are completed from, configuration included, and task vectors and adapters are applied to.",
)
@click.option(
    "--evaluator",
    default="zero_shot",
    show_default=True,
    help="One of those above, or of a plug-in.",
)
@click.option(
    "--reference",
    "references",
    multiple=True,
    help="With --evaluator shift: models whose line tells effective robustness; two or more.",
)
@click.option(
    "--details", is_flag=True, help="Recall of each class and the confusion matrix, in the JSON."
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=256, show_default=True, help="Images at a time."
)
@options.device
@options.folder("A folder for a JSON file a model and task.")
@options.printing
def command(
    models: tuple[str, ...],
    tasks: tuple[str, ...] | None,
    text: Path | None,
    split: str,
    base: str | None,
    evaluator: str,
    references: tuple[str, ...],
    details: bool,
    batch_size: int,
    device: str,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Score models on tasks; the embedded model if none is named.

    \b
    zero_shot     accuracy with the head that class names and prompts make, or with a classifier's own
    shift         also under noise, blur, contrast, rotation and inversion, 5 severities each
    linear_probe  accuracy of a linear classifier trained on the model's features
    retrieval     images found by their captions, and captions by their images

    The files of --out are a superset of CLIP_benchmark's: `clip_benchmark build FOLDER/*.json` makes one table of them.
    """
    from weightops.checkpoints.checkpoint import Checkpoint
    from weightops.checkpoints.matching import open_matched
    from weightops.checkpoints.opening import open_checkpoint
    from weightops.evaluation.image_model import ImageModel
    from weightops.evaluation.shift import add_robustness
    from weightops.evaluation.table import EVALUATORS
    from weightops.evaluation.zero_shot import record
    from weightops.reports.table import table
    from weightops.support.atomic import atomic_output, check_free
    from weightops.support.json_files import write_json
    from weightops.tasks.table import TASKS, as_tasks

    if text is not None:
        if tasks or out or base or evaluator != "zero_shot":
            raise click.UsageError("--text takes no tasks, no --base, no --evaluator and no --out")
        if not models:
            raise click.UsageError("--text is for language models: name one")
        _perplexity(models, text, device, as_json)
        return
    chosen = EVALUATORS[evaluator]
    if references and evaluator != "shift":
        raise click.UsageError("--reference is for --evaluator shift")
    if out is not None:
        check_free(out, overwrite=overwrite)
    start = open_checkpoint(base) if base is not None else None

    def completed(name: str) -> Checkpoint:
        return (
            open_checkpoint(name)
            if start is None
            else Checkpoint(open_matched(name, start).form, start.architecture)
        )

    results = []
    opened = [completed(name) for name in (*references, *(models or ("embedded",)))]
    for checkpoint in opened:
        clip = ImageModel.open(checkpoint, device)
        for task in as_tasks(tasks or list(TASKS)):
            scores = chosen.score(clip, task, split, batch_size=batch_size, details=details)
            results.append(record(clip, task, split, scores, kind=chosen.kind))
            clip.forget(task)
    columns = list(chosen.columns)
    if references:
        known = len(results) // len(opened) * len(references)
        results = add_robustness(results[known:], results[:known])
        columns.append("effective_robustness")
    if out is not None:
        with atomic_output(out, overwrite=overwrite) as part:
            part.mkdir()
            for i, result in enumerate(results):
                write_json(part / f"{i:03}_{result['dataset']}_{split}.json", result)
    if as_json:
        options.echo_json(results)
        return
    several = len(opened) - len(references) > 1
    rows = [
        [
            r["dataset"],
            *([r["model"]] if several else []),
            *(r["metrics"][c] for c in columns),
            r["metrics"]["n"],
            r["source"],
        ]
        for r in results
    ]
    click.echo(table(["task", *(["model"] if several else []), *columns, "images", "source"], rows))


def _perplexity(models: tuple[str, ...], text: Path, device: str, as_json: bool) -> None:
    from weightops.algebra.devices import pick_device
    from weightops.checkpoints.opening import open_checkpoint
    from weightops.evaluation.perplexity import perplexity, token_blocks
    from weightops.reports.table import table

    results = []
    for name in models:
        checkpoint = open_checkpoint(name)
        blocks = token_blocks(checkpoint, text)
        value = perplexity(checkpoint.model().to(pick_device(device)), blocks)
        results.append(
            {"model": name, "text": str(text), "perplexity": value, "tokens": blocks.numel()}
        )
    if as_json:
        options.echo_json(results)
    else:
        click.echo(
            table(
                ["model", "perplexity", "tokens"],
                [[r["model"], f"{r['perplexity']:.4g}", r["tokens"]] for r in results],
            )
        )
