"""``weightops methods``."""

from __future__ import annotations

import inspect

import click

from weightops.cli import options


@click.command()
@click.argument("method", required=False)
@options.printing
def command(method: str | None, as_json: bool) -> None:
    """List the merge methods, or tell one's formula, options and source."""
    from weightops.methods.table import METHODS
    from weightops.reports.table import table

    chosen = [METHODS[method]] if method else list(METHODS.values())
    if as_json:
        options.echo_json(
            [
                {
                    "name": m.name,
                    "on": "task vectors" if m.space == "delta" else "weights",
                    "summary": m.summary,
                    "options": {
                        n: {"type": o.type.__name__, "default": o.default, "choices": list(o.choices)}
                        for n, o in m.options.items()
                    },
                }
                for m in chosen
            ]
        )
    elif method:
        click.echo(inspect.getdoc(chosen[0].function))
    else:
        rows = [
            [m.name, "task vectors" if m.space == "delta" else "weights", ", ".join(m.options) or "-"] for m in chosen
        ]
        click.echo(table(["method", "works on", "options"], rows))
