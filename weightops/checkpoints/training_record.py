"""The record of its training that a model's weights carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightops.checkpoints.checkpoint import Checkpoint


def training_record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the record that a run left in its weights' metadata; None for other weights.

    A record holds config, base, task, node and samples.
    """
    sources = list(checkpoint.form.sources)
    base = sources[0].made_from.get("base") if len(sources) == 1 else None
    record = base.get("training") if isinstance(base, dict) else None
    return record if isinstance(record, dict) and _is_complete(record) else None


def _is_complete(record: Mapping[str, Any]) -> bool:
    """Return True if a record has the entries that are read from it: anyone may have written it."""
    kinds = {"config": dict, "node": dict, "base": str, "task": str, "source": str, "samples": int}
    if not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        return False
    config, node = record["config"], record["node"]
    numbers = [config.get("seed"), node.get("index"), node.get("count")]
    return (
        all(isinstance(number, int) for number in numbers)
        and "data" in node
        and record["samples"] > 0
    )
