"""Provenance of linear forms: the sources with fingerprints, coefficients and rules."""

from __future__ import annotations

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.source import record_fingerprint


def fingerprint(form: LinearForm) -> str:
    """Return the fingerprint of the weights if they are one source's, else of the expression."""
    if len(form.terms) == 1:
        factor, coefficient = next(iter(form.terms.items()))
        if coefficient == 1.0 and not factor.rules:
            return factor.source.fingerprint
    return record_fingerprint(provenance(form))


def as_written(form: LinearForm) -> str:
    """Return a form as people write it, such as ``0.6 pre + 0.4 finetuned``."""
    text = ""
    for factor, coefficient in form.terms.items():
        size = "" if abs(coefficient) == 1 else f"{abs(coefficient):.6g} "
        rules = " by name" if factor.rules else ""
        text += f" {'-' if coefficient < 0 else '+'} {size}{factor.source.ref}{rules}"
    return text.removeprefix(" + ").strip() or "0"


def provenance(form: LinearForm) -> dict[str, object]:
    """Return the sources of a form with fingerprints, coefficients and rules, for metadata."""
    return {
        "space": form.space,
        "base": form.base.describe() if form.base else None,
        "terms": [
            {
                **factor.source.describe(),
                "coefficient": coefficient,
                "rules": [dict(rules.items) for rules in factor.rules],
            }
            for factor, coefficient in form.terms.items()
        ],
    }
