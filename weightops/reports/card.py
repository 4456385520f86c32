"""Model cards, as the Hub expects them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from weightops.reports.table import cell


def patch_card(summary: Mapping[str, Any]) -> str:
    """The card of a patched model, from its ``summary.json``."""
    tasks = summary["tasks"]
    [patching] = [name for name, task in tasks.items() if task["role"] == "patching"]
    front = {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["merge", "task-arithmetic", "weightops"],
    }
    rows = "\n".join(
        f"| {name} | {task['role']} | "
        + " | ".join(cell(float(task[which]["acc1"])) for which in ("base", "finetuned", "patched"))
        + " |"
        for name, task in tasks.items()
    )
    sources = "\n".join(f"* {name}: {task['source']}" for name, task in tasks.items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {summary["model"]["ref"]}, patched on {patching}

The weights are `(1 - alpha) * base + alpha * finetuned` with alpha = {summary["alpha"]:g} (PAINT, arXiv 2208.05592).
The base's fingerprint is `{summary["model"]["fingerprint"]}`.

Alpha was chosen on {summary["chosen_on"]}: {summary["why"]}.
The test splits were used once, after that choice:

| task | role | base | fine-tuned | patched |
|---|---|---|---|---|
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
