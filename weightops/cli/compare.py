"""``weightops compare``."""

from __future__ import annotations

from pathlib import Path

import click

from weightops.cli import options
from weightops.support.text import first_few


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="A B [C ...]")
@click.option(
    "--base",
    default=None,
    help="What the weights are fine-tuned from; without it, A is the base, unless task vectors are compared.",
)
@click.option(
    "--per-tensor", is_flag=True, help="Norms and cosines of each tensor, not only of each layer."
)
@click.option("--spectra", is_flag=True, help="Singular values and principal angles, too: slower.")
@options.folder("A PNG file for the picture.")
@options.printing
def command(
    models: tuple[str, ...],
    base: str | None,
    per_tensor: bool,
    spectra: bool,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compare task vectors: lengths, angles, conflicts of sign, by layer and whole."""
    from weightops.checkpoints.opening import open_ref
    from weightops.reports.table import table
    from weightops.reports.vector_comparison import draw_geometry
    from weightops.support.atomic import atomic_output, check_free
    from weightops.vector_comparison import compare, cosines

    if out is not None:
        check_free(out, overwrite=overwrite)
    if base is None and open_ref(models[0]).form.space == "weights":
        base, *models = models  # type: ignore[assignment]
    found = compare(models, base=base, spectra=spectra)
    parts = found.grams if per_tensor else found.layers()
    parts = {name: g for name, g in parts.items() if bool(g.any())}
    norms = {name: g.diagonal().sqrt().tolist() for name, g in parts.items()}
    if out is not None:
        with atomic_output(out, overwrite=overwrite) as part:
            layers = {
                name: g.diagonal().sqrt().tolist()
                for name, g in found.layers().items()
                if bool(g.any())
            }
            draw_geometry(part, found.names, found.cosines, layers, found.spectra)
    if as_json:
        options.echo_json(
            {
                "names": found.names,
                "base": base,
                "norms": found.norms,
                "cosines": found.cosines.tolist(),
                "unchanged": [name for name, g in found.grams.items() if not bool(g.any())],
                "conflicts": found.conflicts.tolist(),
                "overlaps": found.overlaps.tolist() if found.overlaps is not None else None,
                "spectra": found.spectra,
                "tensors" if per_tensor else "layers": {
                    name: {"norms": norms[name], "cosines": cosines(g).tolist()}
                    for name, g in parts.items()
                },
            }
        )
        return

    def matrix(title: str, values: list[list[float]]) -> None:
        rows = [
            [name, *(f"{value:.3f}" for value in row)]
            for name, row in zip(found.names, values, strict=True)
        ]
        click.echo("\n" + table([title, *found.names], rows))

    rows = [
        [name, *(f"{n:.4g}" for n in norms[name]), *_angles(cosines(g).tolist())]
        for name, g in parts.items()
    ]
    pairs = [f"{a}/{b}" for i, a in enumerate(found.names) for b in found.names[i + 1 :]]
    rows.append(["all", *(f"{n:.4g}" for n in found.norms), *_angles(found.cosines.tolist())])
    click.echo(table(["norm, then cosine", *found.names, *pairs], rows))
    if unchanged := [name for name, g in found.grams.items() if not bool(g.any())]:
        click.echo(f"unchanged by all: {first_few(unchanged)}")
    matrix("cosine", found.cosines.tolist())
    matrix("signs in conflict", found.conflicts.tolist())
    if found.overlaps is not None:
        matrix("overlap of subspaces", found.overlaps.tolist())


def _angles(values: list[list[float]]) -> list[str]:
    return [f"{value:.3f}" for i, row in enumerate(values) for value in row[i + 1 :]]
