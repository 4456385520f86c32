"""Draw comparisons of task vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weightops.errors import missing_extra
from weightops.reports.frontier import INK

_COLORS = ("#2f6db3", "#d1495b", "#3f8f5b", "#8a5ea8", "#c98a1b", "#4aa3a2", "#6b7280", "#a2465f")
_TITLE = {"loc": "left", "fontsize": 11, "color": INK}
_LABEL_LENGTH = 24


def draw_comparison(
    path: Path,
    names: Sequence[str],
    cosines: torch.Tensor,
    layers: Mapping[str, Sequence[float]],
    spectra: Mapping[str, Sequence[float]],
) -> None:
    """Draw task vectors' cosines, their norms by layer and, if there are any, their spectra.

    Args:
        path: the PNG file.
        names: the names of the vectors.
        cosines: shape ``(k, k)``.
        layers: layer -> norm of each vector.
        spectra: vector -> shares of the squared norm.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plot", "to draw the comparison") from None
    panels = 3 if spectra else 2
    figure = Figure(figsize=(4.6 * panels, 4.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    cosine_axes, *line_axes = figure.subplots(1, panels)
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
