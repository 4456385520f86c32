"""The record of its model and data that a statistic carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weightops.errors import SpaceError

if TYPE_CHECKING:
    from weightops.checkpoints.checkpoint import Checkpoint

RECORD = "statistic"
"""The key of the record in the provenance of a statistic."""


def record_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the record of a statistic; an empty one for other tensors."""
    if checkpoint.form.base is None:
        return {}
    source = checkpoint.form.base
    made_from = source.made_from.get("base") or source.describe()
    record = made_from.get(RECORD) if isinstance(made_from, Mapping) else None
    return record if isinstance(record, Mapping) else {}


def in_words(record: Mapping[str, Any]) -> str:
    """Return what a record says of a statistic: its kind, model and data."""
    kind, count, model = record["kind"], record["count"], record["model"]
    where = record.get("text")
    data = f"blocks of {where}" if where else f"{record['split']} images of {record['task']}"
    after = ", after merged layers" if "merged_before" in record else ""
    return f"{kind} of {model['ref']} ({model['fingerprint']}), by {count} {data}{after}"


def refuse_statistic(checkpoint: Checkpoint, needed: str = "weights") -> None:
    """Refuse a statistic where weights, or something else, are needed.

    Raises:
        SpaceError: if it is one.
    """
    record = record_of(checkpoint)
    if record:
        raise SpaceError(
            f"{checkpoint.ref} holds a {record.get('kind')} statistic, not {needed}",
            hint="`weightops merge --statistics` takes it, beside the model that it is of",
        )
