"""Tables of what else an edit has measured, from the entries of its summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightops.evaluation.units import UNITS
from weightops.reports.page import Table
from weightops.reports.table import alpha_text
from weightops.support.text import decimal

_NAMES = {"finetuned": "fine-tuned", "random": "random vector", "ascent": "gradient ascent"}
"""Names of models in a summary that a page gives in other words."""


def model_name(model: str, summary: Mapping[str, Any]) -> str:
    """Return the name of a model in a summary as a page gives it."""
    if model == "best single" and "best_single" in summary:
        return f"{model} ({summary['best_single']})"
    return _NAMES.get(model, model)


def tables_of(summary: Mapping[str, Any]) -> list[Table]:
    """Return a table for each entry of a summary that only some edits have."""
    return [make(summary[entry]) for entry, make in _TABLES.items() if summary.get(entry)]


def _steps(steps: Sequence[Mapping[str, Any]]) -> Table:
    unit = next(unit for unit in UNITS if unit.name in steps[0])
    rows = [
        [s["model"], unit.cell(s[unit.name]), "yes" if s["accepted"] else "no", s["why"]]
        for s in steps
    ]
    what = unit.title.replace(" (%)", ", %")
    title = f"Models, the best first: mean validation {what}"
    return Table(title, ["model", "alone", "taken in", "why"], rows)


def _baselines(baselines: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        [_NAMES.get(name, name), f"{made['alpha']:g}" if "alpha" in made else "none", made["why"]]
        for name, made in baselines.items()
    ]
    title = "Baselines: their own alphas, by the same rule"
    return Table(title, ["baseline", "alpha", "why"], rows, text=True)


def _rivals(rivals: Mapping[str, Mapping[str, float]]) -> Table:
    rows = [[name, alpha_text(alphas)] for name, alphas in rivals.items()]
    title = "Rivals: their alphas, searched on the same data"
    return Table(title, ["rival", "alphas"], rows, text=True)


def _normalized(shares: Mapping[str, float]) -> Table:
    mean = ("mean", sum(shares.values()) / len(shares))
    title = "Normalized test score, % of the fine-tuned model's"
    return Table(title, ["task", "normalized"], [*shares.items(), mean])


def _subsets(groups: Sequence[Mapping[str, Any]]) -> Table:
    rows = [[" + ".join(g["tasks"]), alpha_text(g["alpha"]), g["normalized"]] for g in groups]
    title = "Other sums, each with an alpha of its own"
    return Table(title, ["tasks", "alpha", "normalized, %"], rows)


def _cosines(cosines: Mapping[str, float]) -> Table:
    rows = [[pair, decimal(value, 3)] for pair, value in cosines.items()]
    return Table("Cosines of the task vectors", ["vectors", "cosine"], rows)


_TABLES: Mapping[str, Callable[[Any], Table]] = {
    "steps": _steps,
    "baselines": _baselines,
    "rivals": _rivals,
    "normalized": _normalized,
    "subsets": _subsets,
    "cosines": _cosines,
}
"""Entry of a summary -> its table."""
