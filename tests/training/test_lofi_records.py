"""Records of nodes: which nodes don't belong together, and what is only warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lofi_jobs import recorded_node

from weightops.errors import MismatchError
from weightops.training import lofi

ONES = {"w": torch.ones(2)}
SECOND = {"index": 1}


@pytest.mark.parametrize(
    ("state", "changes", "message"),
    [
        (ONES, {"base": "beef"}, "number 1 started from another base .beef. than number 0 .f00d."),
        (
            ONES,
            {"config": {"lr": 0.2}},
            "number 1 was made by another recipe than number 0: lr 0.2 / 0.1",
        ),
        (ONES, {"task": "u"}, "task u / t"),
        (ONES, {"node": SECOND | {"data": "shard"}}, "data shard / shuffle"),
        (
            ONES,
            {"node": {"index": 0}},
            "number 1 saw the same images in the same order as number 0",
        ),
        ({"w": torch.ones(3)}, {}, r"(?s)of other shape: w \(2,\) / \(3,\)"),
        ({"v": torch.ones(2)}, {}, "no tensor name in common"),
    ],
)
def test_refuses_what_does_not_belong(
    state: dict[str, torch.Tensor], changes: dict[str, Any], message: str
) -> None:
    other = recorded_node(state, **{"node": SECOND, **changes})
    with pytest.raises(MismatchError, match=message):
        lofi.average([recorded_node(ONES), other])


def test_refuses_a_model_that_is_no_node(separate: Path) -> None:
    with pytest.raises(MismatchError, match="say that they are nodes, and embedded doesn't"):
        lofi.average([separate / "node0", "embedded"])


def test_seeds_may_differ_but_for_shards() -> None:
    assert len(lofi.average([recorded_node(ONES), recorded_node(ONES, node=SECOND)])) == 1
    assert len(lofi.average([recorded_node(ONES), recorded_node(ONES, config={"seed": 1})])) == 1
    shards = [
        recorded_node(ONES, node={"data": "shard"}),
        recorded_node(ONES, config={"seed": 1}, node=SECOND | {"data": "shard"}),
    ]
    with pytest.raises(MismatchError, match="seed"):
        lofi.average(shards)


def test_warns_of_missing_nodes(caplog: pytest.LogCaptureFixture) -> None:
    nodes = [recorded_node(ONES, node={"index": index, "count": 3}) for index in (0, 2)]
    lofi.average(nodes)
    assert "of 3 nodes, these are missing: node 1" in caplog.text


def test_warns_of_nodes_without_records(caplog: pytest.LogCaptureFixture) -> None:
    lofi.average([ONES, {"w": torch.zeros(2)}])
    assert "nothing says how these were made" in caplog.text
    caplog.clear()
    # Anyone may have written a record.
    damaged = [recorded_node(ONES, samples="many"), recorded_node(ONES, node={"index": None})]
    assert len(lofi.average(damaged)) == 1
    assert "nothing says how these were made" in caplog.text
