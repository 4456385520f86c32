"""Model cards in the form that the Hugging Face Hub reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from weightops.errors import printable
from weightops.hub.push import front_matter
from weightops.support.text import portable

Relation = Literal["merge", "finetune", "adapter"]
"""The relation of a model to its base, in the Hub's words."""


def merge_card(method: str, models: Sequence[str], base: str | None, recipe: str) -> str:
    """Return the card of a merge, with the recipe that repeats it."""
    origin = (
        "`weightops merge` with this recipe, and the same options for the output, gives the same "
        f"bytes:\n\n```yaml\n{recipe.strip()}\n```"
    )
    refs = [*([base] if base else []), *models]
    return _card(f"{method} of {_count(models)}", refs, origin, "merge")


def edit_title(base: str, vectors: Sequence[tuple[str, float]]) -> str:
    """Return the title of a base edited by task vectors, from their refs and coefficients.

    >>> edit_title("base", [("vector", -1)])
    'base -1 x vector'
    """
    return " ".join([base, *(f"{alpha:+g} x {ref}" for ref, alpha in vectors)])


def edit_card(base: str, vectors: Sequence[tuple[str, float]]) -> str:
    """Return the card of a base edited by task vectors, from their refs and coefficients."""
    refs = [ref for ref, _ in vectors]
    alphas = "".join(f" --alpha {alpha:g}" for _, alpha in vectors)
    named = [shlex.quote(ref) for ref in portable([*refs, base])]
    command = printable(f"weightops apply {' '.join(named[:-1])} --base {named[-1]}{alphas}")
    origin = f"```sh\n{command}\n```\n\nThe coefficients were given, not chosen on data."
    title = edit_title(portable(base), [(portable(ref), alpha) for ref, alpha in vectors])
    return _card(title, [base, *refs], origin, "merge")


def training_card(record: Mapping[str, Any]) -> str:
    """Return the card of a fine-tuned model, from the record of its run."""
    node = record["node"]
    config = {**record["config"], **({"node": node} if node["count"] > 1 else {})}
    origin = (
        f"The data: {record['source']}. The base's fingerprint is `{record['base']}`.\n\n"
        f"```yaml\n{_yaml(config)}\n```"
    )
    title = f"{portable(record['model'])} fine-tuned on {record['task']}"
    return _card(title, [record["model"]], origin, "finetune")


def average_card(coefficients: Mapping[str, float], left_out: Mapping[str, str]) -> str:
    """Return the card of an average of nodes (lo-fi, arXiv 2210.11948).

    Args:
        coefficients: node -> its share in the average.
        left_out: node -> the reason why it isn't in the average.
    """
    shares = "\n".join(f"* {portable(name)}: {share:.4g}" for name, share in coefficients.items())
    without = "".join(
        f"\n* without {portable(name)}: {reason}" for name, reason in left_out.items()
    )
    origin = (
        "Nodes that were fine-tuned without communication (lo-fi, arXiv 2210.11948), averaged by "
        f"these shares:\n\n{shares}{without}"
    )
    nodes = list(coefficients)
    return _card(f"The average of {_count(nodes)}", nodes, origin, "merge")


def adapter_card(base: str | None, rank: int, relative_error: float) -> str:
    """Return the card of a LoRA that approximates a task vector."""
    origin = (
        f"The LoRA of rank {rank} that is nearest to a task vector: it lacks "
        f"{relative_error:.3g} of its norm."
    )
    title = f"A LoRA of {portable(base) or 'a base that is not known'}"
    return _card(title, [base] if base else [], origin, "adapter")


def base_model(refs: Sequence[str], relation: Relation) -> dict[str, Any]:
    """Return the Hub's metadata for the refs that name its repositories; empty if none does."""
    matches = (
        re.fullmatch(r"([\w.-]+/[\w.-]+)(@[^:]+)?(:.+)?", ref)
        for ref in refs
        if not Path(ref).exists()
    )
    repos = list(dict.fromkeys(match[1] for match in matches if match))
    return {"base_model": repos, "base_model_relation": relation} if repos else {}


def license_of(refs: Sequence[str]) -> dict[str, str]:
    """Return the Hub's metadata for the license that the cards of all folders state, or none."""
    cards = [
        Path(ref).with_name("README.md") if Path(ref).is_file() else Path(ref, "README.md")
        for ref in refs
    ]
    found = {
        front_matter(card.read_text(encoding="utf-8")).get("license") if card.is_file() else None
        for card in cards
    }
    license = found.pop() if len(found) == 1 else None
    return {"license": license} if isinstance(license, str) else {}


def _card(title: str, refs: Sequence[str], origin: str, relation: Relation) -> str:
    tags = ["merge", "weightops"] if relation == "merge" else ["weightops"]
    metadata = {**base_model(refs, relation), **license_of(refs), "tags": tags}
    sources = "\n".join(f"* `{_inline(ref)}`" for ref in dict.fromkeys(portable(refs)))
    return (
        f"---\n{_yaml(metadata)}\n---\n\n# {_inline(title)}\n\n{sources}\n\n{origin}\n\n"
        "Nothing was measured on it.\n"
    )


def _inline(text: str) -> str:
    """Return a text from somewhere else for one line of Markdown, which it can't leave."""
    return printable(text).replace("`", "'").replace("<", "&lt;")


def _yaml(content: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(content), sort_keys=False)).strip()


def _count(models: Sequence[str]) -> str:
    return f"{len(models)} checkpoint{'s' * (len(models) > 1)}"
