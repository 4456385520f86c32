"""``weightops compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightops.cli.borrowing import taken
from weightops.cli.from_signature import Borrowed, command
from weightops.cli.printing import echo, echo_json
from weightops.support.text import decimal

if TYPE_CHECKING:
    import torch

    from weightops.tasks.table import TaskList
    from weightops.vector_comparison import Comparison
    from weightops.workflows.disentanglement import Disentanglement


@command(
    Borrowed("weightops.vector_comparison:compare", leave_out=("models",)),
    Borrowed("weightops.workflows.disentanglement:disentanglement", only=("images",)),
    metavar="A B [C ...]",
)
def compare(
    models: tuple[str, ...],
    *,
    per_tensor: bool = False,
    tasks: TaskList | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    json_: bool = False,
    **given: Any,
) -> None:
    """Compare task vectors: lengths, angles, conflicts of sign, by layer and whole.

    Args:
        models: task vectors, or fine-tuned weights. Without --base, A is the base of the weights.
        per_tensor: norms and cosines of each tensor, not only of each layer.
        tasks: for two vectors, the task of each: on their validation images, how often one vector
            changes what the model predicts for the other's task (the disentanglement error).
        out: a file for the picture (.png, .svg, .pdf), or for a page with all of it (.html).
        overwrite: replace an output that exists; it stays until the new one is complete.
    """
    from weightops import vector_comparison
    from weightops.checkpoints.opening import open_ref
    from weightops.support.atomic import reserved
    from weightops.support.invocation import command_line

    if out is not None:
        _kind_of(out)
    with reserved(out, overwrite=overwrite) if out is not None else nullcontext():
        others = list(models)
        if given.get("base") is None and open_ref(others[0]).form.space == "weights":
            given["base"] = others.pop(0)
        measured = taken(given, ("images",))
        if measured and not tasks:
            raise click.UsageError("--images is for --tasks")
        comparison = vector_comparison.compare(others, **given)
        apart = None
        if tasks:
            apart = _disentanglement(given.get("base"), others, tasks, **measured)
        if out is not None:
            told = {"command": command_line(), "base": given.get("base"), "compared": others}
            _draw(comparison, apart, told, out, overwrite=overwrite)
    if json_:
        echo_json(_record(comparison, apart, given.get("base"), per_tensor))
    else:
        _print(comparison, per_tensor)
        if apart is not None:
            alphas = f"alphas from {apart.alphas[0]:g} to {apart.alphas[-1]:g}"
            echo(f"\ndisentanglement error, mean over {alphas}: {apart.mean:.3f}")


def _disentanglement(
    base: str | None, vectors: Sequence[str], tasks: TaskList, **measured: Any
) -> Disentanglement:
    """Measure the disentanglement error of two vectors of a base."""
    from weightops.workflows.disentanglement import disentanglement

    if base is None:
        raise click.UsageError("--tasks needs the model that the vectors are of: --base")
    return disentanglement(base, vectors, tasks, **measured)


def _norms(gram: torch.Tensor) -> list[float]:
    norms: list[float] = gram.diagonal().sqrt().tolist()
    return norms


def _draw(
    comparison: Comparison,
    apart: Disentanglement | None,
    about: Mapping[str, Any],
    out: Path,
    *,
    overwrite: bool,
) -> None:
    """Write the picture of a comparison, or its page."""
    from weightops.reports.frontier import write_figure
    from weightops.reports.vector_comparison import ErrorMap, comparison_page, draw_comparison
    from weightops.support.atomic import atomic_output
    from weightops.support.invocation import versions
    from weightops.support.text import portable

    errors = None
    if apart is not None:
        errors = ErrorMap(apart.tasks, apart.alphas, apart.errors.tolist())
    with atomic_output(out, overwrite=overwrite) as file:
        if _kind_of(out) == "html":
            about = {**portable(dict(about)), "versions": versions()}
            comparison_page(comparison, about, errors).write(file)
        else:
            write_figure(draw_comparison(comparison, errors), file, _kind_of(out))


def _kind_of(out: Path) -> str:
    """Return the kind of a file by its suffix; without one it is a PNG file."""
    kind = out.suffix.lower().removeprefix(".") or "png"
    if kind not in ("png", "svg", "pdf", "html"):
        raise click.UsageError(f"{out} is no .png, .svg, .pdf or .html")
    return kind


def _record(
    comparison: Comparison, apart: Disentanglement | None, base: str | None, per_tensor: bool
) -> dict[str, Any]:
    parts = (comparison if per_tensor else comparison.by_layer).parts
    overlaps = comparison.overlaps
    return {
        "names": comparison.names,
        "base": base,
        "norms": comparison.norms,
        "cosines": comparison.cosines.tolist(),
        "unchanged": _unchanged(comparison),
        "conflicts": comparison.conflicts.tolist(),
        "overlaps": overlaps.tolist() if overlaps is not None else None,
        "spectra": comparison.spectra,
        "disentanglement": apart
        and {"tasks": apart.tasks, "alphas": apart.alphas, "errors": apart.errors.tolist()},
        "tensors" if per_tensor else "layers": {
            name: {
                "norms": _norms(gram),
                "cosines": angles.tolist(),
                "conflicts": conflicts.tolist(),
            }
            for name, (gram, angles, conflicts) in parts.items()
        },
    }


def _unchanged(comparison: Comparison) -> list[str]:
    return [name for name, gram in comparison.grams.items() if not bool(gram.any())]


def _print(comparison: Comparison, per_tensor: bool) -> None:
    """Print norms and cosines by layer or tensor, then a matrix for each measure."""
    from weightops.reports.table import table
    from weightops.support.text import first_few

    names = comparison.names
    parts = (comparison if per_tensor else comparison.by_layer).parts
    rows = [
        [part, *(f"{norm:.4g}" for norm in _norms(gram)), *_upper(angles.tolist())]
        for part, (gram, angles, _) in parts.items()
    ]
    pairs = [f"{a}/{b}" for i, a in enumerate(names) for b in names[i + 1 :]]
    norms = [f"{norm:.4g}" for norm in comparison.norms]
    rows.append(["all", *norms, *_upper(comparison.cosines.tolist())])
    echo(table(["norm, then cosine", *names, *pairs], rows))
    if unchanged := _unchanged(comparison):
        echo(f"unchanged by all: {first_few(unchanged)}")
    _print_matrix("cosine", names, comparison.cosines)
    _print_matrix("signs in conflict", names, comparison.conflicts)
    if comparison.overlaps is not None:
        _print_matrix("overlap of subspaces", names, comparison.overlaps)


def _print_matrix(title: str, names: tuple[str, ...], values: torch.Tensor) -> None:
    from weightops.reports.table import table

    rows = [
        [name, *(decimal(value, 3) for value in row)]
        for name, row in zip(names, values.tolist(), strict=True)
    ]
    echo("\n" + table([title, *names], rows))


def _upper(values: list[list[float]]) -> list[str]:
    """Return the entries above the diagonal."""
    return [decimal(value, 3) for i, row in enumerate(values) for value in row[i + 1 :]]
