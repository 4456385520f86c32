"""``weightops lofi``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from weightops.cli import options


@click.group(invoke_without_command=True)
@options.learning
@options.model
@options.training
@options.seed
@options.device
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder for node0, node1, ..., and merged."
)
@click.option(
    "--nodes", type=click.IntRange(1), help="How many, one after another; only without torchrun."
)
@click.option(
    "--node-size", type=click.IntRange(1), help="Processes in a node. Default: those of a machine."
)
@click.option(
    "--fsdp",
    is_flag=True,
    help="Shard what is trained over the processes of a node (FSDP2), not copy it.",
)
@options.node_data
@click.option(
    "--average-every", type=click.IntRange(0), default=0, help="Also average every so many steps."
)
@click.option(
    "--only",
    multiple=True,
    help="Average only tensors of these names (*, ?); others are the first node's.",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Also train with communication in every step, and compare all under shift.",
)
@click.option(
    "--patience",
    type=float,
    default=1800.0,
    show_default=True,
    help="Seconds to wait for other nodes.",
)
@options.checkpoints
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@options.writing
@options.printing
@click.pass_context
def command(
    ctx: click.Context,
    /,
    task: str | None,
    text: Path | None,
    model: str,
    out: Path | None,
    nodes: int | None,
    node_size: int | None,
    fsdp: bool,
    node_data: str,
    average_every: int,
    only: tuple[str, ...],
    compare: bool,
    patience: float,
    checkpoint_every: int,
    resume: bool,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    device: str,
    **training: Any,
) -> None:
    """Fine-tune on nodes that don't communicate, and average their weights (arXiv 2210.11948).

    \b
    torchrun --nnodes 4 --nproc-per-node 8 -m weightops lofi --task mnist -o DIR
    weightops lofi merge DIR/node* -o DIR/merged
    """
    if ctx.invoked_subcommand:
        return
    if out is None:
        raise click.UsageError("lofi needs --task (or --text) and --out, or the verb merge")
    options.one_of(task, text)
    if nodes and node_size:
        raise click.UsageError(
            "--nodes is for one process, which trains them in turn, and --node-size for torchrun"
        )
    if compare and task is None:
        raise click.UsageError("--compare scores images under shift, and takes a --task")
    import os

    if int(os.environ.get("RANK", 0)):
        os.environ["TQDM_DISABLE"] = "1"  # one bar is enough
    from weightops.checkpoints.opening import open_checkpoint
    from weightops.training.config import config_for
    from weightops.training.learners import TextLearner
    from weightops.training.lofi import run
    from weightops.training.nodes import Node, connected

    checkpoint = open_checkpoint(model)
    config = config_for(checkpoint, **training)
    like = Node(data=node_data, every=average_every, only=only or ("*",))  # type: ignore[arg-type]
    if dry_run:
        world = int(os.environ.get("WORLD_SIZE", 1))
        count = nodes or world // (node_size or int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        samples = {
            f"node{i}": config.steps
            * replace(like, index=i, count=count).batch_size(config.batch_size)
            for i in range(count)
        }
        recipe = {"model": checkpoint.ref, "task": task or str(text), **asdict(config)}
        options.echo_plan({**recipe, "samples": samples, "output": str(out)}, as_json)
        return
    with connected(node_size, patience, fsdp=fsdp) as strategy:
        if strategy.rank:
            options.quieten()
        given: dict[str, Any] = {
            "model": checkpoint,
            "config": config,
            "strategy": strategy,
            "nodes": nodes,
            "like": like,
            "checkpoint_every": checkpoint_every,
            "resume": resume or strategy.begun,
            "overwrite": overwrite,
            "device": device,
        }
        if compare:
            from weightops.training.lofi_baselines import compare_with_baselines as comparison

            assert task is not None
            compared = comparison(task, out, **given)
            if compared is not None:
                _tell_comparison(compared, as_json)
            return
        what = task or TextLearner(checkpoint, text, device=device)  # type: ignore[arg-type]
        merged = run(what, out, **given)
    if merged is not None:
        _tell(
            out / "merged", {**merged.record(), "communication_seconds": strategy.seconds}, as_json
        )


@command.command()
@click.argument("nodes", nargs=-1, required=True, metavar="NODE...")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="A folder for the average."
)
@click.option(
    "--only",
    multiple=True,
    help="Average only tensors of these names (*, ?); others are the first node's.",
)
@options.batchnorm
@options.writing
@options.printing
def merge(
    nodes: tuple[str, ...],
    out: Path,
    only: tuple[str, ...],
    batchnorm: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Average the checkpoints of nodes that belong together, weighted by the samples they saw."""
    from weightops.support.atomic import check_free
    from weightops.training.lofi import survey

    check_free(out, overwrite=overwrite)
    average = survey(nodes, only=only or "*")
    if batchnorm:
        from weightops.evaluation.batchnorm import recompute_batchnorm

        average = replace(average, model=recompute_batchnorm(average.model, batchnorm))
    average.save(out, overwrite=overwrite)
    _tell(out, average.record(), as_json)


def _tell(out: Path, record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        options.echo_json({"output": str(out), **record})
        return
    lines = [f"  {name}: {node['coefficient']:.4g}" for name, node in record["nodes"].items()]
    lines += [f"  {name}: left out, {reason}" for name, reason in record["left_out"].items()]
    click.echo(
        "\n".join(
            [f"{out}: the average of {len(record['nodes'])} nodes ({record['means']})", *lines]
        )
    )


def _tell_comparison(compared: dict[str, Any], as_json: bool) -> None:
    if as_json:
        options.echo_json(compared)
        return
    from weightops.reports.table import table

    columns = ("in_distribution", "under_shift", "effective_robustness")
    rows = [
        [name, *(float(row[column]) for column in columns)]
        for name, row in compared["models"].items()
    ]
    click.echo(table([compared["task"], *columns], rows))
    for name, cost in compared["cost"].items():
        click.echo(
            f"{name}: {cost['communication_seconds']:.1f} of {cost['seconds']:.1f} seconds in communication"
        )
