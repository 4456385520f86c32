"""The page of lo-fi against its baselines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightops.evaluation.units import PERPLEXITY
from weightops.reports.page import Curve, Page, Section, Spot, Table, facts
from weightops.reports.table import change
from weightops.support.invocation import versions
from weightops.support.text import counted, portable

_CHOSEN, _BASE = "average", "base"


def lofi_page(comparison: Mapping[str, Any], about: Mapping[str, Any]) -> Page:
    """Return the page of a comparison of lo-fi with its baselines.

    Args:
        comparison: the result of `compare_with_baselines`.
        about: facts for the last table.
    """
    if comparison["unit"] == PERPLEXITY.name:
        return _text_page(comparison, about)
    models, task = comparison["models"], comparison["task"]
    average, baseline = models[_CHOSEN], models["baseline"]
    gains = [change(average[key] - baseline[key]) for key in ("in_distribution", "under_shift")]
    title = (
        f"lo-fi on {task}: average of {counted(len(comparison['average']['nodes']), 'node')} "
        f"against communication in every step: {gains[0]} points, {gains[1]} under shift"
    )
    rows = [
        [name, row["in_distribution"], row["under_shift"], change(row["effective_robustness"])]
        for name, row in models.items()
    ]
    header = ["model", "in distribution", "under shift", "effective robustness, points"]
    chosen = list(models).index(_CHOSEN)
    scores = Table(f"Test accuracy on {task}, %", header, rows, chosen)
    kinds = list(average["corruptions"])
    by_kind = [[name, *_by_kind(row).values()] for name, row in models.items()]
    title_of_kinds = "Test accuracy by kind of shift, mean over severities, %"
    shifts = Table(title_of_kinds, ["model", *kinds], by_kind, chosen)
    sections = [
        Section("Accuracy", tables=[scores], curve=_curve(models)),
        Section("More results", tables=[shifts, *_costs(comparison)]),
        _facts(comparison, about),
    ]
    lead = [
        "Effective robustness is the accuracy under shift beyond what the line through the base, "
        "the baseline and the single nodes predicts (arXiv 2007.00644)."
    ]
    return Page(title, lead, sections)


def _text_page(comparison: Mapping[str, Any], about: Mapping[str, Any]) -> Page:
    """Return the page of a comparison on a text."""
    models, task = comparison["models"], comparison["task"]
    ours, theirs = (models[name]["in_distribution"] for name in (_CHOSEN, "baseline"))
    title = (
        f"lo-fi on {task}: perplexity {PERPLEXITY.cell(ours)} of the average of "
        f"{counted(len(comparison['average']['nodes']), 'node')}, {PERPLEXITY.cell(theirs)} with "
        "communication in every step"
    )
    texts = list(models[_CHOSEN]["texts"])
    rows = [
        [name, *(PERPLEXITY.cell(row["texts"][text]) for text in texts)]
        for name, row in models.items()
    ]
    header = ["model", *texts]
    scores = Table("Test perplexity of each text", header, rows, list(models).index(_CHOSEN))
    sections = [
        Section("Perplexity", tables=[scores]),
        Section("More results", tables=_costs(comparison)),
        _facts(comparison, about),
    ]
    return Page(title, ["Perplexities are of the texts' test parts: lower is better."], sections)


def _costs(comparison: Mapping[str, Any]) -> list[Table]:
    """Return the tables of what training cost, and of what the average is made of."""
    costs = [
        [name, f"{cost['seconds']:.1f}", f"{cost['communication_seconds']:.1f}"]
        for name, cost in comparison["cost"].items()
    ]
    cost = Table("Cost of training", ["training", "seconds", "of them in communication"], costs)
    nodes = comparison["average"]["nodes"].items()
    shares = [[name, f"{node['coefficient']:.4g}"] for name, node in nodes]
    left_out = [[f"{name}: {why}", "0"] for name, why in comparison["average"]["left_out"].items()]
    average_of = Table("What the average is made of", ["node", "coefficient"], [*shares, *left_out])
    return [cost, average_of]


def _facts(comparison: Mapping[str, Any], about: Mapping[str, Any]) -> Section:
    return facts(
        {
            **portable(dict(about)),
            "fine-tuned": comparison["config"],
            "precision": comparison["precision"],
            "versions": versions(),
        }
    )


def _by_kind(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the accuracy of a model under each kind of shift, the mean over severities."""
    return {kind: sum(s.values()) / len(s) for kind, s in row["corruptions"].items()}


def _curve(models: Mapping[str, Any]) -> Curve:
    """Return the models as points, in order of their accuracy in distribution."""
    ordered = sorted(models.items(), key=lambda item: item[1]["in_distribution"])
    names = [name for name, _ in ordered]
    spots = [
        Spot(
            name,
            row["in_distribution"],
            row["under_shift"],
            {"in distribution": row["in_distribution"], **_by_kind(row)},
            base=name == _BASE,
        )
        for name, row in ordered
    ]
    labels = [(names.index(_CHOSEN), _CHOSEN, "chosen")]
    labels += [(i, name, "") for i, name in enumerate(names) if name != _CHOSEN]
    return Curve(
        what="model",
        hint="The slider goes through the models; the line on each bar marks the base.",
        x="accuracy in distribution",
        y="accuracy under shift",
        points=spots,
        chosen=names.index(_CHOSEN),
        line=False,
        labels=labels,
    )
