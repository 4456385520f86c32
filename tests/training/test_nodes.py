"""Nodes: which samples they see, and from which steps they resume together."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightops.errors import OptionError
from weightops.training.nodes import Node, OneProcess, common_start
from weightops.training.run_folder import RunFolder, states_in
from weightops.training.training_loop import batch_indices


@pytest.mark.parametrize("data", ["shuffle", "shard"])
def test_nodes_see_together_what_one_run_sees(data: str) -> None:
    nodes = [Node(index, 4, data) for index in range(4)]  # type: ignore[arg-type]
    batches = [[batch_indices(100, 10, step, 0, node) for step in range(10)] for node in nodes]
    assert [sum(map(len, batch)) for batch in batches] == [20, 30, 20, 30]
    assert len({tuple(np.concatenate(batch)[:20]) for batch in batches}) == 4
    if data == "shard":
        seen = [set(np.concatenate(batch)) for batch in batches]
        assert sum(map(len, seen)) == len(set().union(*seen))


def test_shards_are_disjoint_and_cover_all() -> None:
    shards = [Node(index, 3, "shard").samples(10, 7) for index in range(3)]
    assert sorted(np.concatenate(shards)) == list(range(10))


def test_the_only_node_sees_all() -> None:
    assert np.array_equal(batch_indices(100, 10, 3, 0, Node()), batch_indices(100, 10, 3, 0))


def test_nodes_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="numbered 0 to 3"):
        Node(4, 4)
    with pytest.raises(OptionError, match="every is -1"):
        Node(every=-1)
    with pytest.raises(OptionError, match="among 4 nodes"):
        Node(0, 4).batch_size(3)
    with pytest.raises(OptionError, match="among the 1 processes"):
        OneProcess().local_slice(0)


@given(st.integers(0, 5), st.integers(1, 7), st.lists(st.integers(0, 2), max_size=60))
@settings(max_examples=60, deadline=None)
def test_killed_nodes_have_states_to_resume_from_together(
    every: int, keep_every: int, turns: list[int]
) -> None:
    """Whatever their speed, one of each node's last two states is between the same averages."""
    node, steps, at = Node(0, 3, every=every), 20, [0, 0, 0]
    with tempfile.TemporaryDirectory() as place:
        paths = [Path(place) / f"node{index}" for index in range(3)]
        folders = [RunFolder(path, {}, None, steps, node.averages_before) for path in paths]
        for folder in folders:
            folder.begin(resume=False, overwrite=False)
        for index in turns:
            step = at[index] + 1
            averages = node.averages_before(step) > node.averages_before(at[index])
            all_are_there = min(at) + 1 >= step  # an average ends when all nodes have come to it
            if step < steps and (not averages or all_are_there):
                at[index] = step
                if step % keep_every == 0:
                    folders[index].keep({}, step)
        held = {i: folder.begin(resume=True, overwrite=False) for i, folder in enumerate(folders)}
        plan = common_start(held, steps, node.averages_before)
        assert all(len(states_in(folder.path)) <= 2 for folder in folders)
        assert len({node.averages_before(step) for step in plan.values()}) == 1
        assert all(step in held[index] for index, step in plan.items())
        assert every or [*plan.values()] == [max(row) for row in held.values()]
