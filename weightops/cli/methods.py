"""``weightops methods``."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING

import click

from weightops.cli import options

if TYPE_CHECKING:
    from weightops.merging.methods.method import Method


@click.command()
@click.argument("method", required=False)
@options.printing
def command(method: str | None, as_json: bool) -> None:
    """List the merge methods, or tell one's formula, options and source."""
    from weightops.merging.methods.table import METHODS
    from weightops.reports.table import table

    chosen = [METHODS[method]] if method else list(METHODS.values())
    if as_json:
        options.echo_json(
            [
                {
                    "name": m.name,
                    "on": _on(m),
                    "summary": m.summary,
                    "options": {
                        n: {
                            "type": o.type.__name__,
                            "default": o.default,
                            "choices": list(o.choices),
                        }
                        for n, o in m.options.items()
                    },
                }
                for m in chosen
            ]
        )
    elif method:
        click.echo(_page(chosen[0]))
    else:
        click.echo(
            table(
                ["method", "works on", "options"],
                [[m.name, _on(m), ", ".join(m.options) or "-"] for m in chosen],
            )
        )


def _on(method: Method) -> str:
    return "task vectors" if method.space == "delta" else "weights"


def _page(method: Method) -> str:
    """What its docstring says, for people at a terminal: of the arguments, the options, with defaults and choices."""
    text, _, rest = (inspect.getdoc(method.function) or "").partition("\n\nArgs:\n")
    text = re.sub(r":math:`([^`]*)`", r"\1", text).replace("`", "")
    said = dict(re.findall(r"^    (\w+): ((?:.|\n {8})*)", rest.partition("\n\n")[0], re.MULTILINE))
    lines = [f"{text}\n\nWorks on {_on(method)}."]
    for name, option in method.options.items():
        choices = "|".join(map(str, option.choices)) or option.type.__name__
        lines.append(f"\n  --{name.replace('_', '-')} {choices}, by default {option.default}")
        lines.append("      " + " ".join(said.get(name, "").replace("`", "").split()))
    return "\n".join(lines)
