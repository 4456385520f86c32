"""The recipe that a provenance record amounts to, for weights that no recipe made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Content = dict[str, Any]


def is_sum(record: Mapping[str, Any]) -> bool:
    """Return whether all terms of a record are inputs, none of them computed by a method."""
    terms = record.get("terms")
    return isinstance(terms, list) and bool(terms) and all(map(_is_input, terms))


def recipe_of(record: Mapping[str, Any]) -> Content | None:
    """Return the content of a recipe that gives the same weights; None if none is known.

    Args:
        record: what `provenance` returns of weights.

    >>> term = {"fingerprint": "0", "rules": []}
    >>> terms = [{**term, "ref": "pre", "coefficient": 1}, {**term, "ref": "v", "coefficient": 0.5}]
    >>> recipe_of({"space": "weights", "base": terms[0], "terms": terms})["models"]
    [{'model': 'v', 'weight': 0.5}]
    """
    base, terms = record.get("base"), record.get("terms")
    if record.get("space") != "weights" or not isinstance(terms, list) or not base:
        return None
    if is_sum(record):
        models = [_weighted(term) for term in terms if term["ref"] != base["ref"]]
        if not models or None in models:
            return None
        return {"method": "task_arithmetic", "base": base["ref"], "models": models}
    computed = [term for term in terms if "method" in term]
    if len(computed) != 1 or computed[0].get("rules") or "statistics" in computed[0]:
        return None
    return _of_method(computed[0], base.get("ref"))


def _is_input(term: object) -> bool:
    return isinstance(term, Mapping) and {"ref", "fingerprint"} <= term.keys()


def _weighted(term: Mapping[str, Any]) -> Content | None:
    """Return the entry of an input whose coefficients are one number, or numbers by pattern."""
    rules, coefficient = term["rules"], term["coefficient"]
    if len(rules) > 1:
        return None
    by_name = {pattern: coefficient * value for pattern, value in rules[0].items()} if rules else {}
    return {"model": term["ref"], "weight": by_name or coefficient}


def _of_method(term: Mapping[str, Any], base: str | None) -> Content | None:
    """Return the recipe of a method, whose inputs are models or their changes from a base."""
    models, spaces = [], {part["space"] for part in term["inputs"]}
    for part, weight in zip(term["inputs"], term["weights"], strict=True):
        own = [t for t in part["terms"] if t.get("ref") != base or spaces == {"weights"}]
        if len(own) != 1 or not _is_input(own[0]) or own[0]["coefficient"] != 1 or own[0]["rules"]:
            return None
        models.append({"model": own[0]["ref"], "weight": weight})
    if any(isinstance(value, (list, tuple, dict)) for value in term["options"].values()):
        return None
    content = {
        "method": term["method"],
        "models": models,
        "options": dict(term["options"]),
        "seed": term["seed"],
    }
    return (
        content
        if spaces == {"weights"}
        else {**content, "base": base, "alpha": term["coefficient"]}
    )
