"""HTML pages of results, each in one file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.errors import printable
from weightops.evaluation.units import ACCURACY, PERPLEXITY, Unit
from weightops.reports.changed_images import ALL_PICTURES, Group, figure
from weightops.reports.table import cell

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        title: what it holds, and in which unit.
        header: the titles of the columns; empty for none.
        rows: the rows, each with its name first; floats are fractions, shown as percentages.
        chosen: the index of a row that stands out, or None.
        text: whether the cells are text that may break into lines.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    chosen: int | None = None
    text: bool = False


@dataclass(frozen=True)
class Spot:
    """A point of a curve, with what was measured there.

    Attributes:
        name: the name of the point, such as its alpha.
        x: where it is to the right.
        y: where it is upwards: a score, such as accuracy as a fraction.
        tasks: task -> score.
        base: whether it is the base, which the others are compared with.
    """

    name: str
    x: float
    y: float
    tasks: Mapping[str, float] = field(default_factory=dict)
    base: bool = False


@dataclass(frozen=True)
class Curve:
    """Points that a slider, a click and the arrow keys go through.

    Attributes:
        what: what the slider moves.
        hint: one sentence on the slider.
        x: the name of the axis to the right, without its unit.
        y: the name of the axis upwards, without its unit.
        points: the points, in the slider's order.
        chosen: the index of the point where the slider starts.
        percent: whether the axis to the right is a score, too.
        line: whether a line joins the points.
        estimates: points that are drawn hollow, and that the slider doesn't stop at.
        labels: the index of a point, a text beside it, and "chosen" or another kind.
        extra: titles of further columns of the table, and their cells for each point.
        unit: what scores are.
    """

    what: str
    hint: str
    x: str
    y: str
    points: Sequence[Spot]
    chosen: int
    percent: bool = True
    line: bool = True
    estimates: Sequence[Spot] = ()
    labels: Sequence[tuple[int, str, str]] = ()
    extra: tuple[Sequence[str], Sequence[Sequence[object]]] = ((), ())
    unit: Unit = ACCURACY

    @property
    def name(self) -> str:
        """The name of the picture."""
        return f"{self.y} against {self.x}"

    @property
    def table(self) -> Table:
        """The points as a table."""
        tasks = list(dict.fromkeys(task for point in self.points for task in point.tasks))
        titles, cells = self.extra
        own = [self.x] if self.percent else []
        header = [self.what, *titles, self.y, *own, *tasks]
        rows = [
            [
                f"{point.name} (chosen)" if i == self.chosen else point.name,
                *(cells[i] if cells else ()),
                *map(
                    self.unit.cell,
                    [
                        point.y,
                        *([point.x] if own else []),
                        *(point.tasks.get(task, float("nan")) for task in tasks),
                    ],
                ),
            ]
            for i, point in enumerate(self.points)
        ]
        return Table(f"All points, {self.unit.plural}", header, rows, self.chosen)

    @property
    def data(self) -> str:
        """The points as JSON that can stand in a page."""
        value = {
            "points": [vars(point) for point in self.points],
            "estimates": [vars(point) for point in self.estimates],
            "chosen": self.chosen,
            "axes": {
                "x": f"{self.x}, {self.unit.sign}" if self.percent else self.x,
                "y": f"{self.y}, {self.unit.sign}",
                "factor": self.unit.factor,
                "log": self.unit is PERPLEXITY,
                "samples": self.unit.samples,
                "percent": self.percent,
                "line": self.line,
                "whole": not self.percent and all(point.x % 1 == 0 for point in self.points),
            },
            "labels": [
                {"index": index, "text": text, "kind": kind} for index, text, kind in self.labels
            ],
        }
        return json_in_page(value)


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        heading: its heading.
        notes: paragraphs.
        tables: tables.
        drawing: a picture as SVG, or "".
        curve: points with a slider; one section of a page at most has it.
        groups: pictures of a task, by what the edit did to them.
    """

    heading: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    drawing: str = ""
    curve: Curve | None = None
    groups: Sequence[Group] = ()


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: one line that sums up the result.
        lead: paragraphs under the title.
        sections: the parts.
    """

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]

    all_pictures = ALL_PICTURES

    @cached_property
    def html(self) -> str:
        """The page as HTML."""
        return template("page.html").render(
            page=self, cell=cell, picture=figure, style=part("page.css"), script=part("curve.js")
        )

    def write(self, path: Path) -> None:
        """Write the page to a file."""
        path.write_text(self.html, encoding="utf-8")


def json_in_page(value: Any) -> str:
    """Return JSON that no mark in it ends the script element of."""
    return json.dumps(value).replace("<", "\\u003c")


def facts(rows: Mapping[str, Any]) -> Section:
    """Return a section with names and values, those that are empty left out."""
    listed = [(name, text_of(value)) for name, value in rows.items() if value not in (None, "", {})]
    return Section(
        "Provenance", tables=[Table("Where the numbers come from", (), listed, text=True)]
    )


def text_of(value: Any) -> str:
    """Return a value of a record in words.

    >>> text_of({"batch_size": 8, "lr": 0.1})
    'batch size 8, lr 0.1'
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {text_of(one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text_of, value))
    return str(value)


def part(name: str) -> str:
    """Return the text of a part of the pages."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8").strip()


def template(name: str) -> Template:
    """Return a template of a page."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, finalize=_shown)
    return environment.from_string(part(name))


def _shown(value: Any) -> Any:
    """Return a value without control characters, line breaks aside."""
    if type(value) is not str:
        return value
    return "\n".join(map(printable, value.split("\n")))
