"""The outcome of an experiment: a table, a picture and one line that sums it up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightops.errors import MissingExtraError
from weightops.reports.frontier import INK, new_figure, save_figure, svg_of
from weightops.reports.page import Page, Section, Table, facts
from weightops.reports.table import table
from weightops.support.atomic import atomic_output
from weightops.support.invocation import versions
from weightops.support.json_files import write_json
from weightops.support.text import portable

log = logging.getLogger("weightops")


@dataclass
class Outcome:
    """The result of an experiment.

    Attributes:
        title: one line that sums up the result.
        header: the titles of the table's columns.
        rows: the rows of the table; floats are fractions, shown as percentages.
        draw: draws the picture on given axes of matplotlib.
        more: other facts to record.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    draw: Callable[[Any], None]
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Return the title and the table."""
        return f"{self.title}\n\n{table(self.header, self.rows)}"

    @property
    def record(self) -> dict[str, Any]:
        """Return the title, rows and other facts for JSON."""
        return {
            "title": self.title,
            "rows": [dict(zip(self.header, row, strict=True)) for row in self.rows],
            **self.more,
        }

    def write(self, out: Path, about: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Write ``report.html``, ``table.txt``, ``results.json`` and the figure to a folder.

        Args:
            out: the folder, which appears when it is complete.
            about: facts to add to ``results.json``.
            overwrite: replace an existing folder.
        """
        with atomic_output(out, overwrite=overwrite) as folder:
            folder.mkdir()
            (folder / "table.txt").write_text(f"{self.text}\n", encoding="utf-8")
            write_json(
                folder / "results.json", portable({**self.record, **about, "versions": versions()})
            )
            drawing = ""
            try:
                figure, axes = new_figure()
                self.draw(axes)
                axes.set_title(self.title, loc="left", fontsize=9, color=INK, wrap=True)
                save_figure(figure, folder / "figure")
                axes.set_title("", loc="left")  # the page has it as its heading
                drawing = svg_of(figure)
            except MissingExtraError as error:
                log.warning("the picture is left out: %s", error)
            self.page(about, drawing).write(folder / "report.html")

    def page(self, about: Mapping[str, Any], drawing: str = "") -> Page:
        """Return the page of the result.

        Args:
            about: facts for its last table.
            drawing: the picture as SVG.
        """
        tables = [Table("Shares and their differences in %", self.header, self.rows)]
        more = {name: value for name, value in self.more.items() if isinstance(value, (str, int))}
        last = facts({**portable({**more, **about}), "versions": versions()})
        results = Section("Results", tables=tables, drawing=drawing)
        return Page(self.title, [], [results, last])
