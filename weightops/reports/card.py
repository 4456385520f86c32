"""The model card of an edited model and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.open_clip import OpenClipArchitecture
from weightops.checkpoints.libraries.transformers import LANGUAGE_MODEL
from weightops.evaluation.units import ACCURACY, PERPLEXITY, SCORE, unit_of
from weightops.hub.cards import base_model, license_of
from weightops.reports.table import alpha_text, models_of


def card(summary: Mapping[str, Any], word: str, architecture: Architecture | None = None) -> str:
    """Return the model card of an edited model.

    Args:
        summary: the content of ``summary.json``.
        word: the name of the edited model in the summary, such as "patched".
        architecture: the architecture of the model; by default a model of open_clip.
    """
    tasks, base = summary["tasks"], summary["model"]
    unit = unit_of(next(iter(tasks.values()))[word])
    of_library = (architecture or OpenClipArchitecture).card_facts
    facts = LANGUAGE_MODEL if unit is PERPLEXITY else of_library
    front = {
        "library_name": facts.library_name,
        "pipeline_tag": facts.pipeline_tag,
        **base_model([base["ref"]], "merge"),
        **(license_of([str(architecture.folder)]) if architecture else {}),
        "tags": ["merge", "task-arithmetic", "weightops"],
        "model-index": [_model_index(summary, word, facts.pipeline_tag)],
    }
    edited = [name for name, task in tasks.items() if task["role"] not in ("supported", "control")]
    sources = "\n".join(f"* {name}: {task['source']}" for name, task in tasks.items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {base["ref"]}, {word}: {", ".join(edited)}

{summary["method"]}, with alpha = {alpha_text(summary["alpha"])}.
The options of `weightops {summary["verb"]}` are {_options(summary["options"])}.
The fingerprint of the base is `{base["fingerprint"]}`.

Alpha was chosen on {summary["chosen_on"]}: {summary["why"]}.
The test splits were used once, after that choice:

{_score_table(tasks, word)}

The numbers are {_NUMBERS[unit]}. The {unit.samples} come from:

{sources}

## Use

{facts.usage.format(folder=summary["output"])}

## Limits

Only the tasks in the table were measured. Other abilities of the base may have changed more than
the supported tasks show.
"""


_NUMBERS = {
    ACCURACY: "top-1 accuracies in percent",
    PERPLEXITY: "perplexities",
    SCORE: "a program's",
}


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in options.items())


def _model_index(summary: Mapping[str, Any], word: str, pipeline: str) -> dict[str, Any]:
    """Return the scores of the edited model in the Hub's form."""
    results = [
        {
            "task": {"type": pipeline},
            "dataset": {"name": name, "type": name, "split": "test"},
            "metrics": [_metric(task[word])],
        }
        for name, task in summary["tasks"].items()
        if word in task
    ]
    return {"name": Path(str(summary["output"])).name, "results": results}


def _metric(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return the main score of a task in the Hub's form."""
    unit = unit_of(scores)
    return {"type": unit.name, "value": round(unit.of(scores), 6)}


def _score_table(tasks: Mapping[str, Mapping[str, Any]], word: str) -> str:
    """Return a Markdown table of scores, the edited model's in the last column."""
    models = [*(model for model in models_of(tasks) if model != word), word]
    titles = ["fine-tuned" if model == "finetuned" else model for model in models]
    lines = [f"| task | role | {' | '.join(titles)} |", f"|{'---|' * (len(models) + 2)}"]
    for name, task in tasks.items():
        scores = [unit_of(task[m]).in_cell(task[m]) if m in task else "-" for m in models]
        lines.append(f"| {name} | {task['role']} | {' | '.join(scores)} |")
    return "\n".join(lines)
