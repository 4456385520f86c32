"""Model cards, as the Hub expects them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

Relation = Literal["merge", "finetune", "adapter"]
"""What a model is to its base, in the Hub's words."""


def merge_card(method: str, models: Sequence[str], base: str | None, recipe: str) -> str:
    """The card of a merge: what it was made from, and the recipe that makes it again."""
    how = f"`weightops merge` with this recipe, and the same options for the output, gives the same bytes:\n\n```yaml\n{recipe.strip()}\n```"
    return _card(
        f"{method} of {_several(models)}", [*([base] if base else []), *models], how, "merge"
    )


def edit_title(base: str, vectors: Sequence[tuple[str, float]]) -> str:
    """What an edit is the sum of.

    >>> edit_title("base", [("vector", -1)])
    'base -1 x vector'
    """
    return " ".join([base, *(f"{alpha:+g} x {ref}" for ref, alpha in vectors)])


def edit_card(base: str, vectors: Sequence[tuple[str, float]]) -> str:
    """The card of a base edited by task vectors, from their refs and coefficients."""
    alphas = "".join(f" --alpha {alpha:g}" for _, alpha in vectors)
    command = f"weightops apply {' '.join(ref for ref, _ in vectors)} --base {base}{alphas}"
    how = f"```sh\n{command}\n```\n\nThe coefficients were given, not chosen on data."
    return _card(edit_title(base, vectors), [base, *(ref for ref, _ in vectors)], how, "merge")


def training_card(record: Mapping[str, Any]) -> str:
    """The card of a fine-tuned model, from the record of its run."""
    node = record["node"]
    recipe = {**record["config"], **({"node": node} if node["count"] > 1 else {})}
    how = f"The images: {record['source']}. The base's fingerprint is `{record['base']}`.\n\n```yaml\n{_yaml(recipe)}\n```"
    return _card(
        f"{record['model']} fine-tuned on {record['task']}", [record["model"]], how, "finetune"
    )


def average_card(coefficients: Mapping[str, float], left_out: Mapping[str, str]) -> str:
    """The card of an average of nodes (arXiv 2210.11948), by what share each has in it."""
    shares = "\n".join(f"* {name}: {share:.4g}" for name, share in coefficients.items())
    without = "".join(f"\n* without {name}: {reason}" for name, reason in left_out.items())
    how = f"Nodes that were fine-tuned without communication (lo-fi, arXiv 2210.11948), averaged by these shares:\n\n{shares}{without}"
    return _card(f"The average of {_several([*coefficients])}", [*coefficients], how, "merge")


def adapter_card(base: str | None, rank: int, relative_error: float) -> str:
    """The card of a LoRA that stands for a task vector."""
    how = f"The LoRA of rank {rank} that is nearest to a task vector: it lacks {relative_error:.3g} of its norm."
    return _card(
        f"A LoRA of {base or 'a base that is not known'}", [base] if base else [], how, "adapter"
    )


def base_model(refs: Sequence[str], relation: Relation) -> dict[str, Any]:
    """What the Hub calls the models that these refs name, if they name any there."""
    found = (
        re.fullmatch(r"([\w.-]+/[\w.-]+)(@[^:]+)?(:.+)?", ref)
        for ref in refs
        if not Path(ref).exists()
    )
    named = list(dict.fromkeys(match[1] for match in found if match))
    return {"base_model": named, "base_model_relation": relation} if named else {}


def _card(title: str, refs: Sequence[str], how: str, relation: Relation) -> str:
    front = {
        **base_model(refs, relation),
        "tags": [*(["merge"] if relation == "merge" else []), "weightops"],
    }
    sources = "\n".join(f"* `{ref}`" for ref in dict.fromkeys(refs))
    return f"""---
{_yaml(front)}
---

# {title}

{sources}

{how}

Nothing was measured on it.
"""


def _yaml(content: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(content), sort_keys=False)).strip()


def _several(models: Sequence[str]) -> str:
    return f"{len(models)} checkpoint{'s' * (len(models) > 1)}"
