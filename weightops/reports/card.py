"""Model cards, as the Hub expects them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from weightops.reports.table import cell


def card(summary: Mapping[str, Any], word: str) -> str:
    """The card of an edited model, from its ``summary.json``.

    Args:
        summary: its content.
        word: what the edited model is called in it.
    """
    tasks = summary["tasks"]
    results = [
        {
            "task": {"type": "zero-shot-image-classification"},
            "dataset": {"name": name, "type": name, "split": "test"},
            "metrics": [{"type": "accuracy", "value": round(float(task[word]["acc1"]), 6)}],
        }
        for name, task in tasks.items()
        if word in task
    ]
    name = Path(str(summary["output"])).name
    front = {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        **_base_model([summary["model"]["ref"]]),
        "tags": ["merge", "task-arithmetic", "weightops"],
        "model-index": [{"name": name, "results": results}],
    }
    models = list(dict.fromkeys(which for t in tasks.values() for which, m in t.items() if isinstance(m, Mapping)))
    models = [*(which for which in models if which != word), word]
    header = " | ".join(["task", "role", *("fine-tuned" if which == "finetuned" else which for which in models)])
    rows = "\n".join(
        f"| {name} | {task['role']} | "
        + " | ".join(cell(float(task[which]["acc1"])) if which in task else "-" for which in models)
        + " |"
        for name, task in tasks.items()
    )
    sources = "\n".join(f"* {name}: {task['source']}" for name, task in tasks.items())
    edited = [name for name, task in tasks.items() if task["role"] not in ("supported", "control")]
    alpha = summary["alpha"]
    shown = f"{alpha:g}" if isinstance(alpha, float) else ", ".join(f"{a:g} ({name})" for name, a in alpha.items())
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

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{summary["output"]}")
tokenizer = open_clip.get_tokenizer("local-dir:{summary["output"]}")
```

If the folder is moved and its configuration names a `bpe_path`, set that path to where `merges.txt.gz` now is; weightops finds it by itself.

## Limits

What isn't in the table wasn't measured: other abilities of the base may have changed more than the supported tasks show.
"""


def merge_card(method: str, models: Sequence[str], base: str | None, recipe: str) -> str:
    """The card of a merge: what it was made from, and the recipe that makes it again."""
    how = f"`weightops merge` with this recipe, and the same options for the output, gives the same bytes:\n\n```yaml\n{recipe.strip()}\n```"
    return _made_card(
        f"{method} of {len(models)} checkpoint{'s' * (len(models) > 1)}", [*([base] if base else []), *models], how
    )


def edit_card(base: str, vectors: Sequence[tuple[str, float]]) -> str:
    """The card of a base edited by task vectors, from their refs and coefficients."""
    title = " ".join([base, *(f"{alpha:+g} x {ref}" for ref, alpha in vectors)])
    alphas = "".join(f" --alpha {alpha:g}" for _, alpha in vectors)
    command = f"weightops apply {' '.join(ref for ref, _ in vectors)} --base {base}{alphas}"
    how = f"```sh\n{command}\n```\n\nThe coefficients were given, not chosen on data."
    return _made_card(title, [base, *(ref for ref, _ in vectors)], how)


def _made_card(title: str, refs: Sequence[str], how: str) -> str:
    front = {**_base_model(refs), "tags": ["merge", "weightops"]}
    sources = "\n".join(f"* `{ref}`" for ref in dict.fromkeys(refs))
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {title}

{sources}

{how}

Nothing was measured on it.
"""


def _base_model(refs: Sequence[str]) -> dict[str, Any]:
    """What the Hub calls the models that these refs name, if they name any there."""
    found = (re.fullmatch(r"([\w.-]+/[\w.-]+)(@[^:]+)?(:.+)?", ref) for ref in refs if not Path(ref).exists())
    named = list(dict.fromkeys(match[1] for match in found if match))
    return {"base_model": named, "base_model_relation": "merge"} if named else {}
