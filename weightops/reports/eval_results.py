"""Test scores as the Hugging Face Hub reads them: ``.eval_results/*.yaml``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightops.evaluation.units import unit_of
from weightops.support.result_files import EVAL_RESULTS
from weightops.support.yaml_files import yaml_text

_ON_THE_HUB = re.compile(r"([\w.-]+/[\w.-]+)@(\w+) on the Hugging Face Hub")


def write_eval_results(folder: Path, summary: Mapping[str, Any], word: str) -> None:
    """Write the test scores of an edited model, an entry for each task.

    A task that isn't a data set on the Hub goes by its own name.

    Args:
        folder: the model's folder.
        summary: the content of ``summary.json``.
        word: the name of the edited model in the summary.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries = []
    for name, task in summary["tasks"].items():
        if word not in task:
            continue
        found, unit = _ON_THE_HUB.match(task["source"]), unit_of(task[word])
        entry = EvalResultEntry(
            dataset_id=found[1] if found else name,
            task_id=name,
            value=round(unit.of(task[word]), 6),
            dataset_revision=found[2] if found else None,
            date=summary["date"],
            notes=f"{unit.name}, on the test split of {task['source']}; as "
            f"weightops {summary['verb']} measured it ({task['role']} task)",
        )
        entries.append(entry)
    place, text = folder / EVAL_RESULTS, yaml_text(eval_result_entries_to_yaml(entries))
    place.mkdir()
    (place / "weightops.yaml").write_text(text, encoding="utf-8")
