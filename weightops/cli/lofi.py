"""``weightops lofi``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightops.cli import from_signature
from weightops.cli.borrowing import TRAINING, taken, training_config
from weightops.cli.config_files import write_run_file
from weightops.cli.from_signature import Borrowed
from weightops.cli.learning import NODE, TASK, TEXT, check_one
from weightops.cli.printing import echo, echo_json, echo_plan, quieten

if TYPE_CHECKING:
    from weightops.checkpoints.checkpoint import Checkpoint
    from weightops.tasks.table import TaskLike
    from weightops.training.config import TrainingConfig
    from weightops.training.nodes import Node


@from_signature.command(
    TRAINING,
    Borrowed(
        "weightops.training.lofi:run",
        only=("nodes", "checkpoint_every", "resume", "overwrite", "device", "precision", "log_to"),
    ),
    Borrowed("weightops.training.lofi_baselines:compare_with_baselines", only=("shifted",)),
    Borrowed("weightops.training.process_groups:connected", only=("node_size", "patience", "fsdp")),
    NODE,
    arguments=[TASK, TEXT],
)
def lofi(
    *,
    model: str = "embedded",
    out: Path | None = None,
    compare: bool = False,
    dry_run: bool = False,
    json_: bool = False,
    **given: Any,
) -> None:
    """Fine-tune on nodes that don't communicate, and average their weights (arXiv 2210.11948).

        torchrun --nnodes 4 --nproc-per-node 8 -m weightops lofi --task mnist -o DIR
        weightops lofi merge DIR/node* -o DIR/merged

    Args:
        model: a path to a model with its configuration, or a ref.
        out: the folder for node0, node1, ..., and merged.
        compare: also train with communication in every step, and compare all under shift: of
            images under corruptions, of a text on the other texts of --shifted.
        dry_run: say what would be done, and do nothing.
    """
    if out is None:
        raise click.UsageError("lofi needs --task (or --text) and --out, or the verb merge")
    check_one(given)
    if "nodes" in given and "node_size" in given:
        raise click.UsageError(
            "--nodes is for one process, which trains them in turn, and --node-size for torchrun"
        )
    if "shifted" in given and not compare:
        raise click.UsageError("--shifted is for --compare")
    if int(os.environ.get("RANK", 0)):
        os.environ["TQDM_DISABLE"] = "1"  # one bar is enough
    from weightops.checkpoints.opening import open_checkpoint
    from weightops.training.nodes import Node

    checkpoint = open_checkpoint(model)
    config = training_config(checkpoint, given)
    names = {"node_data": "data", "average_every": "every", "only": "only"}
    like = Node(**{names[name]: value for name, value in taken(given, [*names]).items()})
    if dry_run:
        _print_plan(checkpoint, config, like, given, out, json_)
        return
    _train(checkpoint, config, like, given, out, compare, json_)


def _print_plan(
    checkpoint: Checkpoint,
    config: TrainingConfig,
    like: Node,
    given: Mapping[str, Any],
    out: Path,
    as_json: bool,
) -> None:
    """Print the recipe, and how many samples each node would see."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    node_size = given.get("node_size") or int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    count = given.get("nodes") or processes // node_size
    nodes = [replace(like, index=index, count=count) for index in range(count)]
    samples = {
        f"node{node.index}": config.steps * node.batch_size(config.batch_size) for node in nodes
    }
    learned = str(given.get("task") or given["text"])
    recipe = {"model": checkpoint.ref, "task": learned, **asdict(config)}
    echo_plan({**recipe, "samples": samples, "output": str(out)}, as_json)


def _train(
    checkpoint: Checkpoint,
    config: TrainingConfig,
    like: Node,
    given: dict[str, Any],
    out: Path,
    compare: bool,
    as_json: bool,
) -> None:
    """Train this process's node, or all nodes in turn, and print the average or comparison."""
    from weightops.training.learners import TextLearner
    from weightops.training.lofi import run
    from weightops.training.lofi_baselines import compare_with_baselines
    from weightops.training.process_groups import connected

    task, text = given.pop("task", None), given.pop("text", None)
    with connected(**taken(given, ("node_size", "patience", "fsdp"))) as strategy:
        if strategy.rank:
            quieten()
        given["resume"] = given.get("resume", False) or strategy.restarted
        how = {"model": checkpoint, "training": config, "strategy": strategy, "like": like, **given}
        if compare:
            comparison = compare_with_baselines(task or str(text), out, **how)
            if comparison is not None:
                write_run_file(out)
                _write_page(comparison, checkpoint, out)
                _print_comparison(comparison, as_json)
            return
        where = {name: given[name] for name in ("device", "precision") if name in given}
        learned = task or TextLearner(checkpoint, text, **where)
        average = run(learned, out, **how)
    if average is not None:
        write_run_file(out)
        record = {**average.record(), "communication_seconds": strategy.seconds}
        _print_average(out / "merged", record, as_json)


@from_signature.command(metavar="NODE...")
def merge(
    nodes: tuple[str, ...],
    *,
    out: Path,
    only: tuple[str, ...] = (),
    batchnorm: TaskLike | None = None,
    overwrite: bool = False,
    json_: bool = False,
) -> None:
    """Average the checkpoints of nodes that belong together, weighted by the samples they saw.

    Args:
        nodes: the nodes' folders.
        out: a folder for the average.
        only: average only tensors of these names (*, ?); others are the first node's.
        batchnorm: recompute running statistics on the images of a task.
        overwrite: replace an output that exists; it stays until the new one is complete.
    """
    from weightops.support.atomic import check_free
    from weightops.training.lofi import survey

    check_free(out, overwrite=overwrite)
    average = survey(nodes, only=only or "*")
    if batchnorm:
        from weightops.evaluation.batchnorm import recompute_batchnorm

        average = replace(average, model=recompute_batchnorm(average.model, batchnorm))
    average.save(out, overwrite=overwrite)
    _print_average(out, average.record(), json_)


def _print_average(out: Path, record: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        echo_json({"output": str(out), **record})
        return
    echo(f"{out}: the average of {len(record['nodes'])} nodes ({record['means']})")
    for name, node in record["nodes"].items():
        echo(f"  {name}: {node['coefficient']:.4g}")
    for name, reason in record["left_out"].items():
        echo(f"  {name}: left out, {reason}")


def _write_page(comparison: Mapping[str, Any], checkpoint: Checkpoint, out: Path) -> None:
    """Write the page of a comparison beside its record."""
    from weightops.reports.lofi_page import lofi_page
    from weightops.support.atomic import atomic_output
    from weightops.support.invocation import command_line

    about = {"command": command_line(), "model": checkpoint.ref}
    with atomic_output(out / "report.html", overwrite=True) as file:
        lofi_page(comparison, about).write(file)


def _print_comparison(comparison: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        echo_json(comparison)
        return
    from weightops.evaluation.units import PERPLEXITY
    from weightops.reports.table import cell, table

    columns = ("in_distribution", "under_shift", "effective_robustness")
    models, unit = comparison["models"], comparison["unit"]
    known = [c for c in columns if all(c in row for row in models.values())]
    show: Any = PERPLEXITY.cell if unit == PERPLEXITY.name else cell
    rows = [[name, *(show(float(row[c])) for c in known)] for name, row in models.items()]
    echo(table([f"{comparison['task']}, {unit}", *known], rows))
    for name, cost in comparison["cost"].items():
        seconds, communication = cost["seconds"], cost["communication_seconds"]
        echo(f"{name}: {communication:.1f} of {seconds:.1f} seconds in communication")


def _unless_subcommand(callback: Any) -> Any:
    def run(**values: Any) -> None:
        if click.get_current_context().invoked_subcommand is None:
            callback(**values)

    return run


command = click.Group(
    "lofi",
    params=lofi.params,
    callback=_unless_subcommand(lofi.callback),
    help=lofi.help,
    commands={"merge": merge},
    invoke_without_command=True,
)
