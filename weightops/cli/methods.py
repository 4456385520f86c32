"""``weightops methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightops.cli.from_signature import command
from weightops.cli.printing import echo, echo_json
from weightops.support import docstrings

if TYPE_CHECKING:
    from weightops.merging.methods.method import Method, Option


@command()
def methods(method: str = "", *, markdown: bool = False, json_: bool = False) -> None:
    """List the merge methods, or show the formula, options and source of one.

    Args:
        method: the name of one method.
        markdown: print all that is known of all methods, as a page.
    """
    from weightops.merging.methods.table import METHODS
    from weightops.reports.table import table

    chosen = [METHODS[method]] if method else list(METHODS.values())
    if json_:
        echo_json([_record(m) for m in chosen])
    elif markdown:
        echo("\n".join(_section(m) for m in chosen), nl=False)
    elif method:
        echo(_page(chosen[0]))
    else:
        rows = [[m.name, _space(m), ", ".join(m.options) or "-"] for m in chosen]
        echo(table(["method", "works on", "options"], rows))


def _record(method: Method) -> dict[str, Any]:
    options = {
        name: {"type": o.type.__name__, "default": o.default, "choices": list(o.choices)}
        for name, o in method.options.items()
    }
    return {
        "name": method.name,
        "on": _space(method),
        "statistics": method.statistics,
        "summary": method.summary,
        "options": options,
    }


def _space(method: Method) -> str:
    return "task vectors" if method.space == "delta" else "weights"


def _needs(method: Method) -> str:
    """Return what a method works on, as a sentence."""
    kinds = " and ".join(method.statistics)
    return f"Works on {_space(method)}{f', and takes the {kinds} of each model' if kinds else ''}."


def _values(option: Option) -> str:
    return "|".join(map(str, option.choices)) or option.type.__name__


def _page(method: Method) -> str:
    """Return the docstring for people at a terminal: of the arguments, the options."""
    parsed = docstrings.parse(method.function.__doc__)
    lines = [f"{docstrings.plain(parsed.text)}\n\n{_needs(method)}"]
    for name, option in method.options.items():
        flag = f"--{name.replace('_', '-')}"
        lines.append(f"\n  {flag} {_values(option)}, by default {option.default}")
        lines.append("      " + docstrings.plain(parsed.arguments.get(name, "")))
    return "\n".join(lines)


def _section(method: Method) -> str:
    """Return the docstring as a section of a page in Markdown."""
    parsed = docstrings.parse(method.function.__doc__)
    text = parsed.text.replace("``", "`")
    lines = [f"## {method.name}\n\n{text}\n\n{_needs(method)}\n"]
    if method.options:
        lines.append("| option | values | default | meaning |\n|---|---|---|---|")
    for name, option in method.options.items():
        values = _values(option).replace("|", ", ")
        meaning = parsed.arguments.get(name, "").replace("``", "`")
        lines.append(f"| `{name}` | {values} | {option.default} | {meaning} |")
    return "\n".join(lines) + "\n"
