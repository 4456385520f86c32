"""``weightops evaluate``."""

from __future__ import annotations

from pathlib import Path

import click

from weightops.cli import options


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--tasks", type=options.TaskNames(), default=None, help="Default: all that weightops has.")
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
    "--shift", is_flag=True, help="Also under noise, blur, contrast, rotation and inversion, 5 severities each."
)
@click.option(
    "--reference",
    "references",
    multiple=True,
    help="With --shift: models whose line tells effective robustness; two or more.",
)
@click.option("--details", is_flag=True, help="Recall of each class and the confusion matrix, in the JSON.")
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True, help="Images at a time.")
@options.device
@options.folder("A folder for a JSON file a model and task.")
@options.printing
def command(
    models: tuple[str, ...], tasks: tuple[str, ...] | None, text: Path | None, split: str, base: str | None, shift: bool, references: tuple[str, ...],
    details: bool, batch_size: int,    device: str, out: Path | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Score models on tasks, zero-shot or with their own head; the embedded model if none is named.

    The files of --out are a superset of CLIP_benchmark's: `clip_benchmark build FOLDER/*.json` makes one table of them.
    """
    from weightops.checkpoints.checkpoint import Checkpoint, open_checkpoint
    from weightops.checkpoints.likeness import open_like
    from weightops.evaluators.clip import Clip
    from weightops.evaluators.shift import effective_robustness
    from weightops.evaluators.shift import shift as under_shift
    from weightops.evaluators.zero_shot import as_tasks, record, score
    from weightops.files import check_free, whole, write_json
    from weightops.reports.table import table
    from weightops.tasks.table import TASKS

    if text is not None:
        if tasks or shift or out or base:
            raise click.UsageError("--text takes no tasks, no --base, no --shift and no --out")
        _perplexity(models, text, device, as_json)
        return
    if references and not shift:
        raise click.UsageError("--reference is for --shift")
    if out is not None:
        check_free(out, overwrite=overwrite)
    results = []
    lines: dict[str, list[tuple[float, float]]] = {}
    named = models or ("embedded",)
    start = open_checkpoint(base) if base is not None else None

    def completed(name: str) -> Checkpoint:
        return open_checkpoint(name) if start is None else Checkpoint(open_like(name, start).form, start.architecture)

    opened = [completed(name) for name in named]
    for i, checkpoint in enumerate([*map(completed, references), *opened], -len(references)):
        clip = Clip.open(checkpoint, device)
        for task in as_tasks(tasks or list(TASKS)):
            scores = score(clip, task, split, details=details, batch_size=batch_size)
            if shift:
                shifted = under_shift(clip, task, split=split)
                point = (shifted["in_distribution"], shifted["under_shift"])
                if i < 0:
                    lines.setdefault(task.name, []).append(point)
                    continue
                scores["acc1_under_shift"] = shifted["under_shift"]
                scores["effective_robustness"] = effective_robustness(point, lines.get(task.name, []))
                scores["acc1_under_corruption"] = shifted["corruptions"]
            results.append(record(clip, task, split, scores))
            clip.forget(task, split)
    if out is not None:
        with whole(out, overwrite=overwrite) as part:
            part.mkdir()
            for i, result in enumerate(results):
                write_json(part / f"{i:03}_{result['dataset']}_{split}.json", result)
    if as_json:
        options.echo_json(results)
        return
    columns = ("acc1", *(("acc1_under_shift", "effective_robustness") if shift else ("acc5", "mean_per_class_recall")))
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


def _perplexity(models: tuple[str, ...], text: Path, device: str, as_json: bool) -> None:
    from weightops.checkpoints.checkpoint import open_checkpoint
    from weightops.evaluators.perplexity import perplexity, token_blocks
    from weightops.kernels import pick_device
    from weightops.reports.table import table

    results = []
    for name in models:
        checkpoint = open_checkpoint(name)
        blocks = token_blocks(checkpoint, text)
        value = perplexity(checkpoint.model().to(pick_device(device)), blocks)
        results.append({"model": name, "text": str(text), "perplexity": value, "tokens": blocks.numel()})
    if as_json:
        options.echo_json(results)
    else:
        click.echo(
            table(
                ["model", "perplexity", "tokens"],
                [[r["model"], f"{r['perplexity']:.4g}", r["tokens"]] for r in results],
            )
        )
