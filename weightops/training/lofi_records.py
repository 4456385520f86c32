"""The training records of nodes, and whether the nodes belong together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from weightops.algebra.linear_form import check_match
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.training_record import training_record
from weightops.errors import MismatchError
from weightops.support.text import first_few

log = logging.getLogger("weightops")

Record = Mapping[str, Any]


def check_belong_together(nodes: Mapping[str, Checkpoint]) -> dict[str, float]:
    """Check that nodes belong together, and return node -> samples that it saw.

    Nodes without records count as having seen one sample each.

    Raises:
        MismatchError: naming the first node that doesn't belong to the others.
    """
    records = _records(nodes)
    models = list(nodes.values())
    for other in models[1:]:
        check_match(models[0].form, other.form)
    first = next(iter(records), "")
    seen: dict[tuple[int, int], str] = {}
    for name, record in records.items():
        _check_same_training(name, record, first, records[first])
        order = (record["config"]["seed"], record["node"]["index"])
        if order in seen:
            raise MismatchError(
                f"{name} saw the same images in the same order as {seen[order]}: it is the same run"
            )
        seen[order] = name
    _warn_of_missing(records)
    return {name: float(records[name]["samples"]) if records else 1.0 for name in nodes}


def _records(nodes: Mapping[str, Checkpoint]) -> dict[str, Record]:
    """Return node -> training record; empty, with a warning, if no node has one."""
    records: dict[str, Record] = {}
    for name, checkpoint in nodes.items():
        if record := training_record(checkpoint):
            records[name] = record
    without = [name for name in nodes if name not in records]
    if without and records:
        raise MismatchError(
            f"{first_few(records)} say that they are nodes, and {first_few(without)} doesn't",
            hint="merge averages any models",
        )
    if without:
        message = "nothing says how these were made, so only their names and shapes are checked: %s"
        log.warning(message, first_few(without))
    return records


def _check_same_training(name: str, record: Record, first: str, reference: Record) -> None:
    if record["base"] != reference["base"]:
        raise MismatchError(
            f"{name} started from another base ({record['base']}) than {first} "
            f"({reference['base']})",
            hint="only nodes that start from the same weights can be averaged",
        )
    ours, theirs = _recipe(record), _recipe(reference)
    differences = [
        f"{key} {ours.get(key)} / {theirs.get(key)}"
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key)
    ]
    if differences:
        raise MismatchError(
            f"{name} was made by another recipe than {first}: {first_few(differences)}",
            hint="fine-tune both alike",
        )


def _recipe(record: Record) -> dict[str, Any]:
    """Return what nodes must share besides the base: all but the order of their samples."""
    config, node = dict(record["config"]), dict(record["node"])
    del node["index"]
    seed = config.pop("seed")
    if node["data"] == "shard":  # shards with other seeds overlap
        node["seed"] = seed
    data = {"task": record["task"], "digest of the data": record.get("digest")}
    return {**data, **config, **node}


def _warn_of_missing(records: Mapping[str, Record]) -> None:
    """Warn of nodes that are missing, if all nodes have one seed."""
    if len({record["config"]["seed"] for record in records.values()}) != 1:
        return
    count = max(record["node"]["count"] for record in records.values())
    missing = sorted(set(range(count)) - {record["node"]["index"] for record in records.values()})
    if missing:
        names = first_few(f"node {index}" for index in missing)
        log.warning("of %d nodes, these are missing: %s", count, names)
