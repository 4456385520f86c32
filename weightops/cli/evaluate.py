"""``weightops evaluate``."""

from __future__ import annotations

from pathlib import Path

import click

from weightops.cli import options


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--tasks", type=options.TaskNames(), default=None, help="Default: all that weightops has.")
@click.option(
    "--split",
    type=click.Choice(["test", "validation", "train"]),
    default="test",
    show_default=True,
    help="Which images.",
)
@click.option(
    "--base", default=None, help="A model whose configuration, and whatever they lack, weights are completed from."
)
@click.option("--details", is_flag=True, help="Recall of each class and the confusion matrix, in the JSON.")
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True, help="Images at a time.")
@options.device
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="A folder for a JSON file a model and task.",
)
@options.writing
@options.printing
def command(
    models: tuple[str, ...], tasks: tuple[str, ...] | None, split: str, base: str | None, details: bool, batch_size: int,
    device: str, out: Path | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Score models on tasks, zero-shot; the embedded model if none is named.

    The files of --out are a superset of CLIP_benchmark's: `clip_benchmark build FOLDER/*.json` makes one table of them.
    """
    from weightops.checkpoints.checkpoint import Checkpoint, open_checkpoint
    from weightops.checkpoints.likeness import alike, for_open_clip
    from weightops.evaluators.clip import Clip
    from weightops.evaluators.zero_shot import as_tasks, record, score
    from weightops.files import check_free, whole, write_json
    from weightops.reports.table import table
    from weightops.tasks.table import TASKS

    if out is not None:
        check_free(out, overwrite=overwrite)
    results = []
    opened = [open_checkpoint(name) for name in models or ("embedded",)]
    for checkpoint in opened:
        if base is not None:
            start = for_open_clip(open_checkpoint(base))
            checkpoint = Checkpoint(alike(checkpoint, start).form, start.architecture)
        clip = Clip.open(checkpoint, device)
        for task in as_tasks(tasks or list(TASKS)):
            results.append(record(clip, task, split, score(clip, task, split, details=details, batch_size=batch_size)))
            clip.forget(task, split)
    if out is not None:
        with whole(out, overwrite=overwrite) as part:
            part.mkdir()
            for i, result in enumerate(results):
                write_json(part / f"{i:03}_{result['dataset']}_{split}.json", result)
    if as_json:
        options.echo_json(results)
        return
    columns = ("acc1", "acc5", "mean_per_class_recall")
    rows = [
        [
            r["dataset"],
            *([r["model"]] if len(opened) > 1 else []),
            *(float(r["metrics"][c]) for c in columns),
            r["metrics"]["n"],
            r["source"],
        ]
        for r in results
    ]
    click.echo(table(["task", *(["model"] if len(opened) > 1 else []), *columns, "images", "source"], rows))
