"""Pictures of how task vectors lie to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from weightops.errors import missing_extra
from weightops.reports.frontier import INK

_LINES = ("#2f6db3", "#d1495b", "#3f8f5b", "#8a5ea8", "#c98a1b", "#4aa3a2", "#6b7280", "#a2465f")


def draw_geometry(
    path: Path,
    names: Sequence[str],
    cosines: torch.Tensor,
    layers: Mapping[str, Sequence[float]],
    spectra: Mapping[str, Sequence[float]],
) -> None:
    """Draw the cosines between vectors, their lengths by layer and, where there are any, their spectra, to a PNG file.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plot", "to draw the geometry") from None
    panels = 3 if spectra else 2
    figure = Figure(figsize=(4.6 * panels, 4.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    matrix, lengths, *rest = figure.subplots(1, panels)
    matrix.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    for i, row in enumerate(cosines.tolist()):
        for j, value in enumerate(row):
            color = "white" if abs(value) > 0.6 else INK
            matrix.text(
                j,
                i,
                f"{round(value, 2) + 0.0:.2f}",
                ha="center",
                va="center",
                fontsize=9,
                color=color,
            )
    matrix.set_xticks(range(len(names)), names, rotation=35, ha="right")
    matrix.set_yticks(range(len(names)), names)
    matrix.set_title("cosine between task vectors", loc="left", fontsize=11, color=INK)
    for i, name in enumerate(names):
        style = {"color": _LINES[i % len(_LINES)], "linewidth": 1.8, "label": name}
        lengths.plot([values[i] for values in layers.values()], marker="o", markersize=3.5, **style)
        for axes in rest:
            axes.plot(
                range(1, len(spectra[name]) + 1), [100 * share for share in spectra[name]], **style
            )
    lengths.set_xticks(
        range(len(layers)), [_short(layer) for layer in layers], rotation=60, ha="right", fontsize=8
    )
    lengths.set_ylim(bottom=0)
    lengths.set_title("norm by layer", loc="left", fontsize=11, color=INK)
    lengths.legend(frameon=False, fontsize=9)
    for axes in rest:
        axes.set_ylim(bottom=0)
        axes.set_xlabel("singular value")
        axes.set_title("share of the squared norm, %", loc="left", fontsize=11, color=INK)
    for axes in (lengths, *rest):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", metadata={"Software": None})


def _short(layer: str) -> str:
    return layer if len(layer) <= 24 else "…" + layer[-23:]
