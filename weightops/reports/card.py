"""The model card of an edited model and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.open_clip import OpenClipArchitecture
from weightops.hub.cards import base_model
from weightops.reports.table import cell


def card(summary: Mapping[str, Any], word: str, architecture: Architecture | None = None) -> str:
    """The card of an edited model, from its ``summary.json``.

    Args:
        summary: its content.
        word: what the edited model is called in it.
        architecture: the model's.
    """
    tasks = summary["tasks"]
    library, pipeline, use = (architecture or OpenClipArchitecture).card_facts
    results = [
        {
            "task": {"type": pipeline},
            "dataset": {"name": name, "type": name, "split": "test"},
            "metrics": [{"type": "accuracy", "value": round(float(task[word]["acc1"]), 6)}],
        }
        for name, task in tasks.items()
        if word in task
    ]
    name = Path(str(summary["output"])).name
    front = {
        "library_name": library,
        "pipeline_tag": pipeline,
        **base_model([summary["model"]["ref"]], "merge"),
        "tags": ["merge", "task-arithmetic", "weightops"],
        "model-index": [{"name": name, "results": results}],
    }
    models = list(
        dict.fromkeys(
            which for t in tasks.values() for which, m in t.items() if isinstance(m, Mapping)
        )
    )
    models = [*(which for which in models if which != word), word]
    header = " | ".join(
        ["task", "role", *("fine-tuned" if which == "finetuned" else which for which in models)]
    )
    rows = "\n".join(
        f"| {name} | {task['role']} | "
        + " | ".join(cell(float(task[which]["acc1"])) if which in task else "-" for which in models)
        + " |"
        for name, task in tasks.items()
    )
    sources = "\n".join(f"* {name}: {task['source']}" for name, task in tasks.items())
    edited = [name for name, task in tasks.items() if task["role"] not in ("supported", "control")]
    alpha = summary["alpha"]
    shown = (
        f"{alpha:g}"
        if isinstance(alpha, float)
        else ", ".join(f"{a:g} ({name})" for name, a in alpha.items())
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {summary["model"]["ref"]}, {word}: {", ".join(edited)}

{summary["method"]}, with alpha = {shown}.
The base's fingerprint is `{summary["model"]["fingerprint"]}`.

Alpha was chosen on {summary["chosen_on"]}: {summary["why"]}.
The test splits were used once, after that choice:

| {header} |
|{"---|" * (len(models) + 2)}
{rows}

Top-1 accuracy in percent. Where the images come from:

{sources}

## Use

{use.format(folder=summary["output"])}

## Limits

What isn't in the table wasn't measured: other abilities of the base may have changed more than the supported tasks show.
"""
