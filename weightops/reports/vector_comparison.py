"""Draw comparisons of task vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from weightops.errors import missing_extra
from weightops.reports.frontier import INK
from weightops.support.lazy import torch

_COLORS = ("#2f6db3", "#d1495b", "#3f8f5b", "#8a5ea8", "#c98a1b", "#4aa3a2", "#6b7280", "#a2465f")
_TITLE = {"loc": "left", "fontsize": 11, "color": INK}
_LABEL_LENGTH = 24


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


def draw_comparison(
    path: Path,
    names: Sequence[str],
    cosines: torch.Tensor,
    layers: Mapping[str, Sequence[float]],
    spectra: Mapping[str, Sequence[float]],
    errors: ErrorMap | None = None,
) -> None:
    """Draw task vectors' cosines, their norms by layer and, if there are any, what else is known.

    Args:
        path: the PNG file.
        names: the names of the vectors.
        cosines: shape ``(k, k)``.
        layers: layer -> norm of each vector.
        spectra: vector -> shares of the squared norm.
        errors: the disentanglement error of two vectors.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plot", "to draw the comparison") from None
    panels = 2 + bool(spectra) + (errors is not None)
    figure = Figure(figsize=(4.6 * panels, 4.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    cosine_axes, *line_axes = figure.subplots(1, panels)
    if errors is not None:
        _draw_errors(figure, line_axes.pop(), errors)
    _draw_cosines(cosine_axes, names, cosines.tolist())
    norms = {name: [values[i] for values in layers.values()] for i, name in enumerate(names)}
    _draw_norms(line_axes[0], norms, list(layers))
    if spectra:
        _draw_spectra(line_axes[1], {name: spectra[name] for name in names})
    for axes in line_axes:
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_cosines(axes: Any, names: Sequence[str], cosines: list[list[float]]) -> None:
    axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    for i, row in enumerate(cosines):
        for j, value in enumerate(row):
            color = "white" if abs(value) > 0.6 else INK
            text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0 writes -0.00 as 0.00
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color=color)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("cosine between task vectors", **_TITLE)


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


def _draw_norms(axes: Any, norms: Mapping[str, Sequence[float]], layers: Sequence[str]) -> None:
    for i, (name, values) in enumerate(norms.items()):
        axes.plot(values, marker="o", markersize=3.5, **_line(i, name))
    labels = [
        layer if len(layer) <= _LABEL_LENGTH else "…" + layer[1 - _LABEL_LENGTH :]
        for layer in layers
    ]
    axes.set_xticks(range(len(layers)), labels, rotation=60, ha="right", fontsize=8)
    axes.set_title("norm by layer", **_TITLE)
    axes.legend(frameon=False, fontsize=9)


def _draw_spectra(axes: Any, spectra: Mapping[str, Sequence[float]]) -> None:
    for i, (name, shares) in enumerate(spectra.items()):
        axes.plot(range(1, len(shares) + 1), [100 * share for share in shares], **_line(i, name))
    axes.set_xlabel("singular value")
    axes.set_title("share of the squared norm, %", **_TITLE)


def _line(index: int, name: str) -> dict[str, Any]:
    return {"color": _COLORS[index % len(_COLORS)], "linewidth": 1.8, "label": name}
