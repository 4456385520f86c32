"""Draw comparisons of task vectors."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from weightops.algebra.names import layer_of
from weightops.errors import MissingExtraError, printable
from weightops.reports.frontier import INK, blank_figure, svg_of
from weightops.reports.page import Page, Section, Table, facts
from weightops.support.lazy import torch
from weightops.support.text import decimal
from weightops.vector_comparison import Comparison

log = logging.getLogger("weightops")

_COLORS = ("#2f6db3", "#d1495b", "#3f8f5b", "#8a5ea8", "#c98a1b", "#4aa3a2", "#6b7280", "#a2465f")
_TITLE = {"loc": "left", "fontsize": 11, "color": INK}
_LABEL_LENGTH, _MOST_NAMES, _MOST_LETTERS = 24, 30, 30


class ErrorMap(NamedTuple):
    """The disentanglement error of two vectors at pairs of coefficients.

    Attributes:
        tasks: the names of their tasks.
        alphas: the coefficients.
        values: the errors, the coefficient of the first vector first.
    """

    tasks: tuple[str, str]
    alphas: Sequence[float]
    values: Sequence[Sequence[float]]


def draw_comparison(comparison: Comparison, errors: ErrorMap | None = None) -> Any:
    """Return a figure of matplotlib with what a comparison of task vectors has measured.

    Its panels are the cosines and the shares of signs in conflict, whole and by layer; norms by
    layer; and spectra and disentanglement errors, where they were asked for.

    Args:
        comparison: the comparison.
        errors: the disentanglement error of two vectors.

    Raises:
        MissingExtraError: without matplotlib.
    """
    names = list(map(printable, comparison.names))
    layers = {printable(name): part for name, part in comparison.by_layer.parts.items()}
    panels: list[Callable[[Any], None]] = [
        lambda axes: _draw_matrix(axes, names, comparison.cosines, "cosine between task vectors"),
        lambda axes: _draw_norms(axes, names, layers),
    ]
    if len(names) > 1:
        angles, conflicts = ({name: part[i] for name, part in layers.items()} for i in (1, 2))
        title = "share of signs in conflict"
        panels.insert(1, lambda axes: _draw_matrix(axes, names, comparison.conflicts, title, 0))
        panels.append(lambda axes: _draw_pairs(axes, names, angles, "cosine by layer", 0))
        title_by_layer = "share of signs in conflict by layer"  # half, by chance
        panels.append(lambda axes: _draw_pairs(axes, names, conflicts, title_by_layer, 0.5))
    if comparison.spectra:
        panels.append(lambda axes: _draw_spectra(axes, comparison.spectra))
    if errors is not None:
        panels.append(lambda axes: _draw_errors(axes.figure, axes, errors))
    rows = -(-len(panels) // 2)
    figure = blank_figure(9.6, 4.4 * rows)
    grid = figure.add_gridspec(rows, 2)
    for i, draw in enumerate(panels):
        is_alone = i == len(panels) - 1 and i % 2 == 0
        draw(figure.add_subplot(grid[i // 2, :] if is_alone else grid[i // 2, i % 2]))
    return figure


def comparison_page(
    comparison: Comparison, about: Mapping[str, Any], errors: ErrorMap | None = None
) -> Page:
    """Return the page of a comparison.

    Args:
        comparison: the comparison.
        about: what was compared, for the last table.
        errors: the disentanglement error of two vectors.
    """
    names = comparison.names
    lead = [
        f"{names[i]} and {names[j]}: cosine {_plain(comparison.cosines[i, j])}, share of signs in "
        f"conflict {_plain(comparison.conflicts[i, j])}."
        for i, j in _pairs(comparison)[:3]
    ]
    if lead:
        lead.append(
            "A sign is in conflict where two vectors move an element that both change in opposite "
            "directions. Vectors that have nothing to do with each other have a cosine near 0, and "
            "half of their signs in conflict."
        )
    if errors is not None:
        mean = sum(map(sum, errors.values)) / sum(map(len, errors.values))
        lead.append(f"Disentanglement error of {' and '.join(errors.tasks)}: {mean:.3f}, the mean.")
    try:
        pictures = [Section("Pictures", drawing=svg_of(draw_comparison(comparison, errors)))]
    except MissingExtraError as error:
        log.warning("the picture is left out: %s", error)
        pictures = []
    title = f"Task vectors compared: {', '.join(names)}"
    numbers = Section("Numbers", tables=_tables(comparison))
    return Page(title, lead, [*pictures, numbers, facts(about)])


def _pairs(comparison: Comparison) -> list[tuple[int, int]]:
    return list(combinations(range(len(comparison.names)), 2))


def _tables(comparison: Comparison) -> list[Table]:
    """Return the tables of norms, cosines and conflicts, by layer and whole, and of overlaps."""
    names, pairs = comparison.names, _pairs(comparison)
    whole = (comparison.total, comparison.cosines, comparison.conflicts)
    parts = {**comparison.by_layer.parts, "all": whole}
    norms = [
        [name, *(f"{norm:.4g}" for norm in gram.diagonal().sqrt().tolist())]
        for name, (gram, _, _) in parts.items()
    ]
    tables = [Table("Norms by layer", ["layer", *names], norms)]
    header = ["layer", *(f"{names[i]}, {names[j]}" for i, j in pairs)]
    for index, title in ((1, "Cosines"), (2, "Shares of signs in conflict")):
        rows = [
            [name, *(_plain(part[index][i, j]) for i, j in pairs)] for name, part in parts.items()
        ]
        tables += [Table(f"{title} by layer", header, rows)] if pairs else []
        tables.append(_matrix(title, names, whole[index]))
    if comparison.overlaps is not None:
        tables.append(_matrix("Overlap of subspaces", names, comparison.overlaps))
    return tables


def _matrix(title: str, names: Sequence[str], values: torch.Tensor) -> Table:
    rows = [[name, *map(_plain, row)] for name, row in zip(names, values, strict=True)]
    return Table(title, ["vector", *names], rows)


def _plain(value: torch.Tensor) -> str:
    """Return a number with three decimals."""
    return decimal(float(value), 3)


def _draw_matrix(
    axes: Any, names: Sequence[str], values: torch.Tensor, title: str, least: float = -1
) -> None:
    """Draw a number for each pair of vectors, between ``least`` and 1."""
    axes.imshow(values.tolist(), cmap="RdBu_r" if least else "Blues", vmin=least, vmax=1)
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            color = "white" if abs(value) > 0.6 else INK
            text = decimal(value, 2)
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color=color)
    fits = len(names) * max(map(len, names)) <= _MOST_LETTERS
    turned: dict[str, Any] = {} if fits else {"rotation": 35, "ha": "right"}
    axes.set_xticks(range(len(names)), names, **turned)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title, **_TITLE)


def _draw_errors(figure: Any, axes: Any, errors: ErrorMap) -> None:
    """Draw the errors as a map, with the square in which the papers look for alpha."""
    low, high = min(errors.alphas), max(errors.alphas)
    half = (high - low) / max(len(errors.alphas) - 1, 1) / 2
    span = (low - half, high + half)
    image = axes.imshow(
        [list(row) for row in zip(*errors.values, strict=True)],
        origin="lower",
        extent=(*span, *span),
        cmap="Blues",
        vmin=0,
    )
    axes.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="#d1495b", linewidth=1.5)
    axes.set_xlabel(f"alpha of {errors.tasks[0]}")
    axes.set_ylabel(f"alpha of {errors.tasks[1]}")
    axes.set_title("disentanglement error", **_TITLE)
    figure.colorbar(image, ax=axes, shrink=0.8)


def _draw_norms(axes: Any, names: Sequence[str], layers: Mapping[str, Sequence[Any]]) -> None:
    norms = [gram.diagonal().sqrt().tolist() for gram, *_ in layers.values()]
    for i, name in enumerate(names):
        _draw_layers(axes, list(layers), [values[i] for values in norms], _line(i, name))
    axes.set_ylim(bottom=0)
    _name_layers(axes, list(layers), "norm by layer")


def _draw_pairs(
    axes: Any,
    names: Sequence[str],
    layers: Mapping[str, torch.Tensor],
    title: str,
    unrelated: float,
) -> None:
    """Draw a value of each pair of vectors along the layers, with that of unrelated ones."""
    for k, (i, j) in enumerate(combinations(range(len(names)), 2)):
        of_pair = [float(value[i, j]) for value in layers.values()]
        _draw_layers(axes, list(layers), of_pair, _line(k, f"{names[i]}, {names[j]}"))
    axes.axhline(unrelated, color=INK, linewidth=0.8, linestyle=":", label="unrelated vectors")
    _name_layers(axes, list(layers), title)


def _draw_layers(
    axes: Any, layers: Sequence[str], values: Sequence[float], line: Mapping[str, Any]
) -> None:
    """Draw values along the layers, with lines between the numbered layers of one stack only."""
    stacks = [layer.before if (layer := layer_of(name)) else name for name in layers]
    xs: list[float] = []
    ys: list[float] = []
    for i, value in enumerate(values):
        if i and stacks[i] != stacks[i - 1]:
            xs.append(i)
            ys.append(math.nan)  # which breaks the line
        xs.append(i)
        ys.append(value)
    axes.plot(xs, ys, marker="o", markersize=3.5, **line)


def _name_layers(axes: Any, layers: Sequence[str], title: str) -> None:
    """Name the layers under a panel, at most so many that the names have room."""
    step = -(-len(layers) // _MOST_NAMES)
    labels = [_cut(layer) for layer in layers[::step]]
    axes.set_xticks(range(0, len(layers), step), labels, rotation=60, ha="right", fontsize=7)
    axes.set_title(title, **_TITLE)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _cut(name: str) -> str:
    """Return a name without the first of its parts, as many as must go; the last part stays."""
    short = name
    while len(short) > _LABEL_LENGTH and "." in short:
        short = "…" + short.partition(".")[2]
    return short


def _draw_spectra(axes: Any, spectra: Mapping[str, Sequence[float]]) -> None:
    for i, (name, shares) in enumerate(spectra.items()):
        axes.plot(range(1, len(shares) + 1), [100 * share for share in shares], **_line(i, name))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("singular value")
    axes.set_title("share of the squared norm, %", **_TITLE)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _line(index: int, name: str) -> dict[str, Any]:
    return {"color": _COLORS[index % len(_COLORS)], "linewidth": 1.8, "label": name}
