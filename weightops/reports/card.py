"""The model card of an edited model and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.open_clip import OpenClipArchitecture
from weightops.evaluation.units import unit_of
from weightops.hub.cards import base_model, license_of, with_revisions
from weightops.reports.table import alpha_text, models_of
from weightops.support.invocation import how_it_was_made


def card(
    summary: Mapping[str, Any],
    word: str,
    architecture: Architecture | None = None,
    inputs: Mapping[str, Path] | None = None,
) -> str:
    """Return the model card of an edited model.

    Args:
        summary: the content of ``summary.json``.
        word: the name of the edited model in the summary, such as "patched".
        architecture: the architecture of the model; by default a model of open_clip.
        inputs: the refs of what was read, with the revision of each -> its folder.
    """
    tasks, base = summary["tasks"], summary["model"]
    unit = unit_of(next(iter(tasks.values()))[word])
    facts = architecture.card_facts if architecture else OpenClipArchitecture.card_facts
    front = {
        **facts.metadata,
        **license_of([architecture.folder] if architecture else []),
        **base_model(_made_from(summary, inputs or {}), "merge"),
        "tags": ["merge", "task-arithmetic", "weightops"],
    }
    edited = [name for name, task in tasks.items() if task["role"] not in ("supported", "control")]
    of, origin = base["ref"], f"The fingerprint of the base is `{base['fingerprint']}`."
    if summary["compared_with"] != "base":  # there are several models, none of which is the base
        models = summary["finetuned"]
        of, origin = f"{len(models)} models", f"The models are {', '.join(models)}."
    sources = "\n".join(f"* {name}: {task['source']}" for name, task in tasks.items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {of}, {word}: {", ".join(edited)}

{summary["method"]}, with alpha = {alpha_text(summary["alpha"])}.
The options of `weightops {summary["verb"]}` are {_options(summary["options"])}.
{origin}

Alpha was chosen on {summary["chosen_on"]}: {summary["why"]}.
The test splits were used once, after that choice:

{_score_table(tasks, word)}

The numbers are {unit.numbers}. The {unit.samples} come from:

{sources}

## How it was made

{how_it_was_made(summary["device"])}

## Use

{facts.usage.format(folder=summary["output"])}

## Limits

Only the tasks in the table were measured. Other abilities of the base may have changed more than
the supported tasks show.
"""


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in options.items())


def _made_from(summary: Mapping[str, Any], inputs: Mapping[str, Path]) -> list[str]:
    """Return the refs of the base, and of the models that were given, with their revisions."""
    given = summary["finetuned"] or []
    named = [summary["model"]["ref"], *([given] if isinstance(given, str) else given)]
    return with_revisions(list(dict.fromkeys(named)), inputs)


def _score_table(tasks: Mapping[str, Mapping[str, Any]], word: str) -> str:
    """Return a Markdown table of scores, the edited model's in the last column."""
    models = [*(model for model in models_of(tasks) if model != word), word]
    titles = ["fine-tuned" if model == "finetuned" else model for model in models]
    lines = [f"| task | role | {' | '.join(titles)} |", f"|{'---|' * (len(models) + 2)}"]
    for name, task in tasks.items():
        scores = [unit_of(task[m]).in_cell(task[m]) if m in task else "-" for m in models]
        lines.append(f"| {name} | {task['role']} | {' | '.join(scores)} |")
    return "\n".join(lines)
