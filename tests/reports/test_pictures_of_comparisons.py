"""The picture of a comparison: layers in their order, whole names, and no empty place."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")

from weightops import TaskVector, compare
from weightops.reports.vector_comparison import draw_comparison

NAMES = (
    "visual.ln_post.weight",
    "visual.ln_pre.weight",
    "visual.positional_embedding",
    "visual.proj",
    "visual.transformer.resblocks.10.w",
    "visual.transformer.resblocks.2.w",
)


def test_layers_come_in_the_order_of_the_model() -> None:
    torch.manual_seed(0)
    base = {name: torch.zeros(4, 4) for name in NAMES}
    vectors = [TaskVector(base, {n: torch.randn(4, 4) for n in NAMES}) for _ in range(3)]
    figure = draw_comparison(replace(compare(vectors), names=["a", "b", "c"]))
    matrix, _, norms, *_, last = figure.axes
    assert [label.get_text() for label in norms.get_xticklabels()] == [
        "…positional_embedding",
        "visual.ln_pre",
        "…transformer.resblocks.2",
        "…resblocks.10",
        "visual.ln_post",
        "visual.proj",
    ]
    line = norms.lines[0]
    joined = [not math.isnan(y) for y in line.get_ydata()]
    assert joined == [True, False, True, False, True, True, False, True, False, True]
    assert last.get_subplotspec().colspan == range(2)
    assert len(figure.axes) == 5
    assert matrix.get_xticklabels()[0].get_rotation() == 0
