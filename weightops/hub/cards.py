"""Model cards in the form that the Hugging Face Hub reads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from weightops.errors import printable
from weightops.hub.fetch import repository_of
from weightops.hub.push import front_matter
from weightops.support.invocation import how_it_was_made
from weightops.support.result_files import CARD
from weightops.support.text import counted, portable

Relation = Literal["merge", "finetune", "adapter"]
"""The relation of a model to its base, in the Hub's words."""


class CardFacts(NamedTuple):
    """The facts about a library that the model card of a saved folder states.

    Attributes:
        library_name: its name on the Hugging Face Hub; "other" for none.
        pipeline_tag: the kind of task that the model is for, as the Hub names it; "other" for none.
        usage: Markdown that shows how to load the model, with ``{folder}`` for its folder; "" for
            none.
    """

    library_name: str = "other"
    pipeline_tag: str = "other"
    usage: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        """The Hub's metadata."""
        stated = {"library_name": self.library_name, "pipeline_tag": self.pipeline_tag}
        return {key: value for key, value in stated.items() if value != "other"}


@dataclass(frozen=True)
class Card:
    """The model card of a folder.

    Attributes:
        title: what the weights are.
        refs: the refs of all that they were made from, the base first.
        origin: Markdown that says how.
        relation: the relation to the base.
        results: what was measured on it.
        python: the lines of Python that make it, with ``{folder}`` for the folder, where neither a
            command nor a call of one function does.
    """

    title: str
    refs: Sequence[str]
    origin: str
    relation: Relation
    results: str = "Nothing was measured on it."
    python: str = ""

    def text(
        self, facts: CardFacts, device: str, *, name: str = "", inputs: Mapping[str, Path] = {}
    ) -> str:
        """Return the card, with what only the one who writes the folder knows.

        Args:
            facts: the library that the folder loads in.
            device: where the weights were computed.
            name: the name of the folder.
            inputs: the refs of what was read, with the revision of each -> its folder.
        """
        folder = printable(json.dumps(name, ensure_ascii=False)[1:-1])
        tags = ["merge", "weightops"] if self.relation == "merge" else ["weightops"]
        refs = with_revisions(self.refs, inputs)
        metadata = {
            **facts.metadata,
            **license_of([*inputs.values()] or self.refs),
            **base_model(refs, self.relation),
            "tags": tags,
        }
        sources = "\n".join(f"* `{_inline(ref)}`" for ref in dict.fromkeys(portable(refs)))
        parts = [
            f"---\n{_yaml(metadata)}\n---",
            f"# {_inline(self.title)}",
            sources,
            self.origin,
            how_it_was_made(device, self.python.replace("{folder}", folder)),
            self.results,
            f"## Use\n\n{facts.usage.format(folder=name)}" if facts.usage else "",
        ]
        return "\n\n".join(filter(None, parts)) + "\n"


def with_revisions(refs: Sequence[str], inputs: Iterable[str]) -> list[str]:
    """Return refs with the revisions of the Hub's repositories that were read."""
    read = {ref.partition("@")[0]: ref for ref in inputs if "@" in ref}
    return [read.get(ref, ref) for ref in refs]


_PYTHON = """from weightops import Recipe

Recipe.read("{folder}/recipe.yaml").merge().save("again")"""


def merge_card(
    method: str,
    models: Sequence[str],
    base: str | None,
    recipe: str,
    options: Mapping[str, Any] | None = None,
) -> Card:
    """Return the card of a merge, with the recipe that repeats it, and all options."""
    stated = ", ".join(f"{name} {value}" for name, value in (options or {}).items())
    told = f"The options of {method}: {stated}.\n\n" if stated else ""
    origin = told + (
        "`weightops merge` with this recipe, and the same options for the output, gives the same "
        f"bytes:\n\n```yaml\n{recipe.strip()}\n```"
    )
    refs = [*([base] if base else []), *models]
    title = f"{method} of {counted(len(models), 'checkpoint')}"
    return Card(title, refs, origin, "merge", python=_PYTHON)


def edit_title(base: str, vectors: Sequence[tuple[str, float]]) -> str:
    """Return the title of a base edited by task vectors, from their refs and coefficients.

    >>> edit_title("base", [("vector", -1)])
    'base -1 x vector'
    """
    return " ".join([base, *(f"{alpha:+g} x {ref}" for ref, alpha in vectors)])


def edit_card(base: str, vectors: Sequence[tuple[str, float]]) -> Card:
    """Return the card of a base edited by task vectors, from their refs and coefficients."""
    refs = [ref for ref, _ in vectors]
    alphas = "".join(f" --alpha {alpha:g}" for _, alpha in vectors)
    named = [shlex.quote(ref) for ref in portable([*refs, base])]
    command = printable(f"weightops apply {' '.join(named[:-1])} --base {named[-1]}{alphas}")
    origin = f"```sh\n{command}\n```\n\nThe coefficients were given, not chosen on data."
    title = edit_title(portable(base), [(portable(ref), alpha) for ref, alpha in vectors])
    return Card(title, [base, *refs], origin, "merge")


def training_card(record: Mapping[str, Any]) -> Card:
    """Return the card of a fine-tuned model, from the record of its run."""
    node = record["node"]
    config = {**record["config"], **({"node": node} if node["count"] > 1 else {})}
    origin = (
        f"The data: {record['source']}. The base's fingerprint is `{record['base']}`.\n\n"
        f"```yaml\n{_yaml(config)}\n```"
    )
    title = f"{portable(record['model'])} fine-tuned on {record['task']}"
    return Card(title, [record["model"]], origin, "finetune")


def average_card(coefficients: Mapping[str, float], left_out: Mapping[str, str]) -> Card:
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
    return Card(f"The average of {counted(len(nodes), 'checkpoint')}", nodes, origin, "merge")


def adapter_card(base: str | None, rank: int, relative_error: float) -> Card:
    """Return the card of a LoRA that approximates a task vector."""
    origin = (
        f"The LoRA of rank {rank} that is nearest to a task vector: it lacks "
        f"{relative_error:.3g} of its norm."
    )
    title = f"A LoRA of {portable(base) or 'a base that is not known'}"
    return Card(title, [base] if base else [], origin, "adapter")


def base_model(refs: Sequence[str], relation: Relation) -> dict[str, Any]:
    """Return the Hub's metadata for the refs that name its repositories; empty if none does.

    >>> base_model(["org/base@1a2b", "org/other"], "merge")["base_model_revision"]
    {'org/base': '1a2b'}
    """
    repos = dict(filter(None, map(repository_of, refs)))
    if not repos:
        return {}
    pinned = {repo: revision for repo, revision in repos.items() if revision}
    revisions = {"base_model_revision": pinned} if pinned else {}
    return {"base_model": list(repos), **revisions, "base_model_relation": relation}


def license_of(places: Sequence[str | Path]) -> dict[str, str]:
    """Return the Hub's metadata for the license that the cards of folders state, or none.

    The first folder's must state one, and no other may state another.
    """
    found = []
    for place in map(Path, places):
        card = place.with_name(CARD) if place.is_file() else place / CARD
        stated = front_matter(card.read_text(encoding="utf-8")) if card.is_file() else {}
        found.append(stated.get("license"))
    license = found[0] if found else None
    known = isinstance(license, str) and {*found} <= {license, None}
    return {"license": str(license)} if known else {}


def _inline(text: str) -> str:
    """Return a text from somewhere else for one line of Markdown, which it can't leave."""
    return printable(text).replace("`", "'").replace("<", "&lt;")


def _yaml(content: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(content), sort_keys=False)).strip()
