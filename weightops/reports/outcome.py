"""The outcome of an experiment: a table, a picture and one line that says it."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from weightops.errors import MissingExtraError
from weightops.reports.frontier import INK, new_figure, save_figure
from weightops.reports.table import table
from weightops.support.atomic import atomic_output
from weightops.support.json_files import write_json

log = logging.getLogger("weightops")


@dataclass
class Outcome:
    """What an experiment found.

    Attributes:
        title: one line that says it.
        header: of the table.
        rows: of the table; floats are fractions, shown as percentages.
        draw: draws the picture on given axes.
        more: what else to write down.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    draw: Callable[[Any], None]
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The title and the table."""
        return f"{self.title}\n\n{table(self.header, self.rows)}"

    @property
    def record(self) -> dict[str, Any]:
        """For machines."""
        return {
            "title": self.title,
            "rows": [dict(zip(self.header, row, strict=True)) for row in self.rows],
            **self.more,
        }

    def write(self, out: Path, about: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Write ``table.txt``, ``results.json`` and ``figure.png`` and ``.svg`` to a folder, which appears whole."""
        with atomic_output(out, overwrite=overwrite) as part:
            part.mkdir()
            (part / "table.txt").write_text(f"{self.text}\n", encoding="utf-8")
            write_json(part / "results.json", {**self.record, **about, "versions": versions()})
            try:
                figure, axes = new_figure()
                self.draw(axes)
                axes.set_title(self.title, loc="left", fontsize=9, color=INK, wrap=True)
                save_figure(figure, part / "figure")
            except MissingExtraError as error:
                log.warning("the picture is left out: %s", error)


def versions() -> dict[str, str]:
    """Versions of what numbers may depend on."""
    packages = ("weightops", "torch", "open_clip_torch", "torchvision", "pillow", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
