"""Model cards, as the Hub expects them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from weightops.checkpoints.checkpoint import Checkpoint
from weightops.expression import provenance
from weightops.files import whole
from weightops.reports.table import cell

_ON_THE_HUB = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]{40}(:.+)?")
_LIBRARIES = {
    "OpenClipArchitecture": "open_clip",
    "TransformersArchitecture": "transformers",
    "TimmArchitecture": "timm",
}


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


def save_with_card(
    checkpoint: Checkpoint, out: Path, *, overwrite: bool = False, dtype: torch.dtype | None = None
) -> None:
    """As `Checkpoint.save`; a folder has a model card in it, too."""
    if out.suffix:
        checkpoint.save(out, overwrite=overwrite, dtype=dtype)
        return
    with whole(out, overwrite=overwrite) as part:
        part.mkdir()
        checkpoint.save_into(part, final=out, dtype=dtype)
        (part / "README.md").write_text(edit_card(out.name, checkpoint), encoding="utf-8")


def edit_card(title: str, checkpoint: Checkpoint) -> str:
    """The card of weights that were computed from others: from which, and how."""
    made = provenance(checkpoint.form)
    bases = dict.fromkeys(found[1] for ref in _refs(made) if (found := _ON_THE_HUB.fullmatch(ref)))
    front = {
        **({"library_name": library} if (library := _LIBRARIES.get(type(checkpoint.architecture).__name__)) else {}),
        **({"base_model": list(bases), "base_model_relation": "merge"} if bases else {}),
        "tags": ["merge", "task-arithmetic", "weightops"],
    }
    terms = made["terms"]
    rows = "\n".join(_row(term) for term in terms) if isinstance(terms, list) else ""
    base = made["base"]
    start = (
        f"\nWhat isn't edited comes from {base['ref']} (`{base['fingerprint']}`).\n"
        if isinstance(base, dict) and "ref" in base
        else ""
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {title}

The weights are a sum, tensor by tensor, accumulated in float32 and rounded once:

| coefficient | of | fingerprint or settings | only at |
|---|---|---|---|
{rows}
{start}
The whole recipe is in the metadata of the weights; `weightops inspect` prints it.

## What chose the coefficients

Whoever ran the command: no data were looked at.

## Limits

Nothing was measured. Edited models can lose abilities that nobody edited: evaluate this one on what you need it for.
"""


def _row(term: Mapping[str, Any]) -> str:
    of = term.get("ref") or f"{term.get('method')} of {', '.join(dict.fromkeys(_refs(term)))}"
    settings = (
        f"`{term['fingerprint']}`" if "fingerprint" in term else f"{term.get('options')}, weights {term.get('weights')}"
    )
    where = "; ".join(
        f"{pattern}: {value:g}" for rules in term.get("rules", []) for pattern, value in list(rules.items())[:5]
    )
    return f"| {term.get('coefficient', 1):+g} | {of} | {settings} | {where or 'all'} |"


def _refs(record: Any) -> Iterator[str]:
    """All refs that a provenance speaks of."""
    if isinstance(record, Mapping):
        if isinstance(record.get("ref"), str):
            yield record["ref"]
        for value in record.values():
            yield from _refs(value)
    elif isinstance(record, list):
        for value in record:
            yield from _refs(value)
