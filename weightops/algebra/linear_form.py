"""Lazy expressions over named tensors: sources, and linear forms of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, NamedTuple

import torch

from weightops.algebra.dtypes import is_editable, is_unfit, name_of
from weightops.algebra.names import (
    NameRules,
    check_per_tensor,
    depths,
    escape,
    finite,
    mismatch,
    value_at,
)
from weightops.algebra.source import Source, Space, Spec
from weightops.errors import MismatchError, OptionError, SpaceError
from weightops.support.text import first_few

Alpha = float | Mapping[str, Any] | Sequence[float]
"""A coefficient for every tensor, one by name pattern (see `NameRules`), or numbers over the depth of the layers (see `Setting`)."""


class Factor(NamedTuple):
    """One term of a linear form without its coefficient: a source, and rules its coefficient is multiplied by."""

    source: Source
    rules: tuple[NameRules, ...] = ()

    def applies(self, name: str) -> float:
        """The product of the rules at ``name``; 0 where the source has no such tensor."""
        if name not in self.source.specs:
            return 0.0
        product = 1.0
        for rule in self.rules:
            product *= rule(name)
        return product


@dataclass(frozen=True, eq=False)
class LinearForm:
    r"""A linear combination of sources, :math:`\sum_i c_i x_i`, tensor by tensor. Computes nothing itself.

    Attributes:
        space: "weights" if the coefficients of weights sum to 1, "delta" if to 0.
        specs: the tensors that it has. A delta has only tensors that can be edited.
        terms: coefficient of each factor; none is 0.
        base: for weights, the source that also supplies what isn't edited; None for a delta.
    """

    space: Space
    specs: Mapping[str, Spec]
    terms: Mapping[Factor, float]
    base: Source | None = None

    @classmethod
    def of(cls, source: Source) -> LinearForm:
        """The form that is just one source."""
        return cls(
            source.space,
            source.specs,
            {Factor(source): 1.0},
            source if source.space == "weights" else None,
        )

    @classmethod
    def difference(
        cls, minuend: LinearForm, subtrahend: LinearForm, *, strict: bool = True
    ) -> tuple[LinearForm, list[str]]:
        """``minuend - subtrahend`` of two weights: a delta, and the names left out because one of them lacks them.

        Raises:
            MismatchError: if shapes or dtypes differ, or names do and ``strict`` is True.
        """
        left_out = check_match(subtrahend, minuend, strict=strict)
        specs = {
            n: s for n, s in subtrahend.specs.items() if is_editable(s.dtype) and n in minuend.specs
        }
        form = cls("delta", specs, _add(minuend.terms, subtrahend.terms, -1.0))
        return (form._only(specs) if left_out else form), left_out

    @property
    def sources(self) -> list[Source]:
        """The distinct sources, the base first."""
        found = ([self.base] if self.base else []) + [factor.source for factor in self.terms]
        return list(dict.fromkeys(found))

    @property
    def leaves(self) -> list[Source]:
        """The distinct places that are read from."""
        return list(dict.fromkeys(leaf for source in self.sources for leaf in source.leaves))

    def coefficients(self, name: str) -> dict[Source, float]:
        """Source -> coefficient at one tensor, without zeros."""
        spec = self.specs[name]
        if self.base is not None and not is_editable(spec.dtype):
            return {self.base: 1.0}
        totals: dict[Source, float] = {}
        for factor, coefficient in self.terms.items():
            value = coefficient * factor.applies(name)
            if value:
                totals[factor.source] = totals.get(factor.source, 0.0) + value
        return {source: value for source, value in totals.items() if value}

    def plus(self, other: LinearForm) -> LinearForm:
        """The sum of two deltas, or of weights and a delta (which must not have tensors that the weights lack).

        Raises:
            SpaceError: if both are weights.
            MismatchError: if shapes differ or the delta has tensors that the weights lack.
        """
        if other.space == "weights":
            if self.space == "weights":
                raise SpaceError(
                    "weights can't be added to weights; average or interpolate them, or add a task vector"
                )
            return other.plus(self)
        both = [n for n in other.specs if n in self.specs]
        shapes = [
            f"{n} {tuple(self.specs[n].shape)} / {tuple(other.specs[n].shape)}"
            for n in both
            if self.specs[n].shape != other.specs[n].shape
        ]
        extra = [n for n in other.specs if n not in self.specs] if self.space == "weights" else []
        fixed = [n for n in both if not is_editable(self.specs[n].dtype) and other.coefficients(n)]
        if fixed:
            raise MismatchError(
                f"{describe(self)} holds {len(fixed)} {name_of(self.specs[fixed[0]].dtype)} tensors, which can't be edited: "
                f"{first_few(fixed)}; convert them to bfloat16 or wider first"
            )
        if shapes or extra:
            what = f"{describe(self)} and {describe(other)}"
            raise mismatch(
                what,
                {"of other shape": shapes, "only in the second": extra},
                "both must come from one architecture",
            )
        return replace(
            self, specs={**other.specs, **self.specs}, terms=_add(self.terms, other.terms, 1.0)
        )

    def times(self, alpha: Alpha) -> LinearForm:
        """The delta multiplied by a number, or by numbers by name pattern or depth.

        Raises:
            SpaceError: for weights.
            UnknownNameError: if a pattern matches no tensor.
        """
        if self.space != "delta":
            raise SpaceError(
                "weights can't be multiplied by a number; interpolate them, or multiply a task vector"
            )
        if not isinstance(alpha, (Mapping, list, tuple)):
            factor = finite(alpha)  # type: ignore[arg-type]
            return replace(self, terms={f: c * factor for f, c in self.terms.items() if c * factor})
        if isinstance(alpha, Mapping) and not any(
            isinstance(v, (Mapping, list, tuple)) for v in alpha.values()
        ):
            rules = NameRules.of(alpha)
            rules.check(self.specs)
        else:
            check_per_tensor(alpha, self.specs, "alpha")
            depth = depths(self.specs)
            rules = NameRules.of(
                {escape(name): value_at(alpha, name, depth[name], 0.0) for name in self.specs}
            )
        return replace(
            self, terms={Factor(f.source, (*f.rules, rules)): c for f, c in self.terms.items()}
        )

    def select(self, patterns: str | Iterable[str]) -> LinearForm:
        """Only the tensors whose names match one of the patterns; the delta is zero elsewhere."""
        chosen = NameRules.of(
            dict.fromkeys([patterns] if isinstance(patterns, str) else patterns, 1.0)
        )
        kept = {name: spec for name, spec in self.specs.items() if chosen(name)}
        chosen.check(self.specs)
        return self._only(kept)

    def _only(self, specs: Mapping[str, Spec]) -> LinearForm:
        """The delta restricted to some names: it is zero elsewhere, also in sums."""
        rule = NameRules.exactly(specs)
        return replace(
            self,
            specs=specs,
            terms={Factor(f.source, (*f.rules, rule)): c for f, c in self.terms.items()},
        )

    def part(self, names: Iterable[str]) -> LinearForm:
        """The same form, evaluated at some of its tensors only."""
        return replace(self, specs={name: self.specs[name] for name in names})

    def to(self, dtype: torch.dtype) -> LinearForm:
        """The same form with the tensors that can be edited in another dtype.

        Raises:
            OptionError: if weights can't be edited in that dtype.
        """
        if not is_editable(dtype):
            raise OptionError(
                f"weights can be cast to float64, float32, bfloat16 or float16, not to {name_of(dtype)}"
            )
        return replace(
            self,
            specs={
                n: Spec(s.shape, dtype) if is_editable(s.dtype) else s
                for n, s in self.specs.items()
            },
        )


def _add(
    left: Mapping[Factor, float], right: Mapping[Factor, float], sign: float
) -> dict[Factor, float]:
    terms = dict(left)
    for factor, coefficient in right.items():
        twin = _twin(factor, terms)
        terms[twin] = terms.get(twin, 0.0) + sign * coefficient
    return {factor: coefficient for factor, coefficient in terms.items() if coefficient}


def _twin(factor: Factor, terms: Mapping[Factor, float]) -> Factor:
    """The factor of ``terms`` with the same rules and source, so that coefficients cancel exactly."""
    if factor in terms or factor.source.identity is None:
        return factor
    same = (f for f in terms if f.rules == factor.rules and f.source.space == factor.source.space)
    return next((f for f in same if f.source.identity == factor.source.identity), factor)


def tied_names(form: LinearForm) -> dict[str, str]:
    """Alias -> the name it is tied to in the result: same coefficients, and tied in every source that takes part."""
    candidates = {
        alias: name for source in reversed(form.sources) for alias, name in source.ties.items()
    }
    found: dict[str, str] = {}
    for alias, name in candidates.items():
        if alias in form.specs and name in form.specs:
            mine, other = form.coefficients(alias), form.coefficients(name)
            if mine == other and all(
                s.ties.get(alias, alias) == s.ties.get(name, name) for s in mine
            ):
                found[alias] = found.get(name, name)
    return found


def check_match(a: LinearForm, b: LinearForm, *, strict: bool = True) -> list[str]:
    """Check that two forms have the same tensors; the names that only one of them has.

    Raises:
        MismatchError: if shapes or dtypes differ, or names do and ``strict`` is True.
    """
    for form in (a, b):
        unfit = [n for n, s in form.specs.items() if is_unfit(n, s.dtype)]
        if unfit:
            raise MismatchError(
                f"{describe(form)} holds {len(unfit)} quantised or {name_of(form.specs[unfit[0]].dtype)} tensors, "
                f"in which differences would be wrong: {first_few(unfit)}; convert them to bfloat16 or wider first"
            )
    only_a = [n for n in a.specs if n not in b.specs]
    only_b = [n for n in b.specs if n not in a.specs]
    shapes, dtypes = [], []
    for name in a.specs:
        x, y = a.specs[name], b.specs.get(name)
        if y is not None and x.shape != y.shape:
            shapes.append(f"{name} {tuple(x.shape)} / {tuple(y.shape)}")
        elif y is not None and x.dtype != y.dtype:
            dtypes.append(f"{name} {name_of(x.dtype)} / {name_of(y.dtype)}")
    nothing = len(only_a) == len(a.specs) and bool(only_a)
    if shapes or dtypes or nothing or ((only_a or only_b) and strict):
        remedy = "both must come from one architecture"
        if not shapes and dtypes:
            remedy = "bring one to the other's dtype: open_checkpoint(...).to(torch.float32), or weightops merge MODEL --out-dtype"
        elif not shapes:
            common = len(a.specs) - len(only_a)
            remedy = (
                f"strict=False edits only the {common} common tensors"
                if common
                else "they have no tensor name in common"
            )
        differences = {
            "only in the first": only_a,
            "only in the second": only_b,
            "of other shape": shapes,
            "of other dtype": dtypes,
        }
        raise mismatch(f"{describe(a)} and {describe(b)}", differences, remedy)
    return only_a + only_b


def describe(form: LinearForm) -> str:
    """The sources of a form, for a message."""
    return first_few([source.ref for source in form.sources])


def fingerprint(form: LinearForm) -> str:
    """The fingerprint of a form's weights where they are one source's, else of the expression itself."""
    if len(form.terms) == 1:
        [(factor, coefficient)] = form.terms.items()
        if coefficient == 1.0 and not factor.rules:
            return factor.source.fingerprint
    return sha256(json.dumps(provenance(form), sort_keys=True).encode()).hexdigest()[:16]


def provenance(form: LinearForm) -> dict[str, object]:
    """What a form is made of, for metadata: sources with fingerprints, their coefficients, and the rules on these."""
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
