"""Linear forms of sources: lazy expressions that are evaluated tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from weightops.algebra.codes import REMEDY, differing_codes, is_packed
from weightops.algebra.dtypes import is_editable, name_of
from weightops.algebra.names import (
    NameRules,
    check_per_tensor,
    depths,
    escape,
    finite,
    hint_of_part,
    mismatch,
    value_at,
)
from weightops.algebra.source import Factors, Source, Space, Spec
from weightops.errors import MismatchError, OptionError, SpaceError
from weightops.support.input_files import InputFile
from weightops.support.lazy import torch
from weightops.support.text import first_few

log = logging.getLogger("weightops")

Alpha = float | Mapping[str, Any] | Sequence[float]
"""A coefficient: one number, or numbers by name pattern or by depth (see `PerTensor`)."""


class Factor(NamedTuple):
    """A source in a linear form, and the rules that multiply its coefficient."""

    source: Source
    rules: tuple[NameRules, ...] = ()

    def multiplier(self, name: str) -> float:
        """Return the product of the rules at ``name``; 0 if the source has no such tensor."""
        if name not in self.source.specs:
            return 0.0
        product = 1.0
        for rule in self.rules:
            product *= rule(name)
        return product


@dataclass(frozen=True, eq=False)
class LinearForm:
    """A linear combination of sources, ``sum_i c_i x_i``, at each tensor. It computes nothing.

    Attributes:
        space: "weights" if the coefficients of weights sum to 1, "delta" if they sum to 0.
        specs: name -> shape and dtype. A delta has only tensors that can be edited.
        terms: factor -> coefficient, never 0.
        base: for weights, the source of the tensors that can't be edited; None for a delta.
    """

    space: Space
    specs: Mapping[str, Spec]
    terms: Mapping[Factor, float]
    base: Source | None = None

    @classmethod
    def of(cls, source: Source) -> LinearForm:
        """Return the form of one source."""
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
        """Return the delta ``minuend - subtrahend`` of weights, and the names that only one has.

        Raises:
            MismatchError: if shapes or dtypes differ, or names do and ``strict`` is True.
        """
        left_out = check_match(subtrahend, minuend, strict=strict)
        specs = {n: s for n, s in subtrahend.specs.items() if s.is_editable and n in minuend.specs}
        form = cls("delta", specs, _add(minuend.terms, subtrahend.terms, -1.0))
        return (form.only(specs) if left_out else form), left_out

    @property
    def sources(self) -> list[Source]:
        """The distinct sources, the base first."""
        in_terms = [factor.source for factor in self.terms]
        return list(dict.fromkeys([self.base, *in_terms] if self.base else in_terms))

    @property
    def leaves(self) -> list[Source]:
        """The distinct places that are read."""
        return list(dict.fromkeys(leaf for source in self.sources for leaf in source.leaves))

    @property
    def files(self) -> list[InputFile]:
        """The distinct files that are read, in the state in which they were opened."""
        return list(dict.fromkeys(file for leaf in self.leaves for file in leaf.files))

    def coefficients(self, name: str) -> dict[Source, float]:
        """Return source -> coefficient at one tensor, without zeros."""
        spec = self.specs[name]
        if self.base is not None and not spec.is_editable:
            return {self.base: 1.0}
        totals: dict[Source, float] = {}
        for factor, coefficient in self.terms.items():
            value = coefficient * factor.multiplier(name)
            if value:
                totals[factor.source] = totals.get(factor.source, 0.0) + value
        cancelled = 0.0 in totals.values()
        return {s: value for s, value in totals.items() if value} if cancelled else totals

    def rank(self, name: str) -> int | None:
        """Return the columns of the `factors` of a matrix, or None if its sources keep none."""
        if len(self.specs[name].shape) != 2:
            return None
        ranks = [source.rank(name) for source in self.coefficients(name)]
        return None if None in ranks else sum(rank or 0 for rank in ranks)

    def factors(self, name: str) -> Factors:
        """Return ``[c_1 B_1, c_2 B_2, ...]`` and ``[A_1; A_2; ...]`` of a matrix with a `rank`."""
        height, width = self.specs[name].shape
        lefts, rights = [torch.zeros(height, 0)], [torch.zeros(0, width)]
        for source, coefficient in self.coefficients(name).items():
            left, right = source.factors(name)
            lefts.append(left * coefficient)
            rights.append(right)
        return torch.cat(lefts, 1), torch.cat(rights)

    def plus(self, other: LinearForm) -> LinearForm:
        """Return the sum of two deltas, or of weights and a delta.

        Raises:
            SpaceError: if both are weights.
            MismatchError: if shapes differ, or the delta has tensors that the weights lack or that
                can't be edited.
        """
        if other.space == "weights":
            if self.space == "weights":
                raise SpaceError(
                    "weights can't be added to weights",
                    hint="average or interpolate them, or add a task vector",
                )
            return other.plus(self)
        common = [n for n in other.specs if n in self.specs]
        shapes = [
            f"{n} {tuple(self.specs[n].shape)} / {tuple(other.specs[n].shape)}"
            for n in common
            if self.specs[n].shape != other.specs[n].shape
        ]
        extra = [n for n in other.specs if n not in self.specs] if self.space == "weights" else []
        fixed = [n for n in common if not self.specs[n].is_editable and other.coefficients(n)]
        if fixed:
            kind = self.specs[fixed[0]].dtype_name
            raise MismatchError(
                f"{describe(self)} holds {len(fixed)} {kind} tensors, which can't be edited: "
                f"{first_few(fixed)}",
                hint=REMEDY,
            )
        if shapes or extra:
            raise mismatch(
                f"{describe(self)} and {describe(other)}",
                {"of other shape": shapes, "only in the second": extra},
                hint="both must come from one architecture",
            )
        specs = {**other.specs, **self.specs}
        return replace(self, specs=specs, terms=_add(self.terms, other.terms, 1.0))

    def times(self, alpha: Alpha) -> LinearForm:
        """Return the delta multiplied by a number, or by numbers by name pattern or depth.

        Raises:
            SpaceError: for weights.
            UnknownNameError: if a pattern matches no tensor.
            OptionError: if a number isn't finite.
        """
        if self.space != "delta":
            raise SpaceError(
                "weights can't be multiplied by a number",
                hint="interpolate them, or multiply a task vector",
            )
        if not isinstance(alpha, (Mapping, list, tuple)):
            number = finite(alpha)
            return replace(self, terms={f: c * number for f, c in self.terms.items() if c * number})
        if isinstance(alpha, Mapping) and not any(
            isinstance(value, (Mapping, list, tuple)) for value in alpha.values()
        ):
            rules = NameRules.of(alpha)
            rules.check(self.specs)
        else:
            check_per_tensor(alpha, self.specs, "alpha")
            depth = depths(self.specs)
            rules = NameRules.of(
                {escape(name): value_at(alpha, name, depth[name], 0.0) for name in self.specs}
            )
        return self._with_rules(rules)

    def select(self, patterns: str | Iterable[str]) -> LinearForm:
        """Return the delta at the tensors whose names match a pattern; it is zero elsewhere.

        Raises:
            UnknownNameError: if a pattern matches no tensor.
        """
        patterns = [patterns] if isinstance(patterns, str) else patterns
        selected = NameRules.of(dict.fromkeys(patterns, 1.0))
        selected.check(self.specs)
        return self.only({name: spec for name, spec in self.specs.items() if selected(name)})

    def only(self, specs: Mapping[str, Spec]) -> LinearForm:
        """Return the delta restricted to some names: it is zero elsewhere, also in sums."""
        return replace(self._with_rules(NameRules.exactly(specs)), specs=specs)

    def _with_rules(self, rules: NameRules) -> LinearForm:
        """Return the form with all coefficients multiplied by rules."""
        terms = {Factor(f.source, (*f.rules, rules)): c for f, c in self.terms.items()}
        return replace(self, terms=terms)

    def part(self, names: Iterable[str]) -> LinearForm:
        """Return the form restricted to some of its tensors."""
        return replace(self, specs={name: self.specs[name] for name in names})

    def to(self, dtype: torch.dtype | str) -> LinearForm:
        """Return the form with another dtype for the tensors that can be edited.

        Raises:
            OptionError: if weights can't be edited in that dtype.
        """
        if not is_editable(dtype):
            raise OptionError(
                f"weights can't be cast to {name_of(dtype)}",
                hint="float64, float32, bfloat16 and float16 are possible",
            )
        return replace(
            self,
            specs={
                name: Spec(spec.shape, dtype) if spec.is_editable else spec
                for name, spec in self.specs.items()
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
    """Return the factor of ``terms`` with equal rules and source, so that coefficients cancel."""
    if factor in terms or factor.source.identity is None:
        return factor
    alike = (f for f in terms if f.rules == factor.rules and f.source.space == factor.source.space)
    return next((f for f in alike if f.source.identity == factor.source.identity), factor)


def tied_names(form: LinearForm) -> dict[str, str]:
    """Return alias -> the name whose tensor it shares in the result.

    Two names are tied if they have equal coefficients and are tied in every source with one. Of
    tied names the first is the one that has the tensor, as sources may name different ones.
    """
    candidates = {n for source in form.sources for pair in source.ties.items() for n in pair}
    owners: dict[object, str] = {}
    tied: dict[str, str] = {}
    for name in form.specs if candidates else ():
        if name in candidates:
            coefficients = form.coefficients(name) or dict.fromkeys(form.sources, 0.0)
            key = frozenset((s, s.ties.get(name, name), c) for s, c in coefficients.items())
            owner = owners.setdefault(key, name)
            if owner != name:
                tied[name] = owner
    return tied


def check_match(a: LinearForm, b: LinearForm, *, strict: bool = True) -> list[str]:
    """Check that two forms have the same tensors; return the names that only one of them has.

    Floating-point tensors may be wider in one than in the other, which is warned of.

    Raises:
        MismatchError: if shapes or kinds of dtypes differ, or names do and ``strict`` is True, or
            they have no name in common, or tensors differ that arithmetic can't combine.
    """
    only_a = [n for n in a.specs if n not in b.specs]
    only_b = [n for n in b.specs if n not in a.specs]
    shapes, dtypes, rounded = list[str](), list[str](), list[str]()
    for name in a.specs:
        x, y = a.specs[name], b.specs.get(name)
        if y is not None and x.shape != y.shape:
            shapes.append(f"{name} {tuple(x.shape)} / {tuple(y.shape)}")
        elif y is not None and x.dtype_name != y.dtype_name:
            places = rounded if x.is_editable and y.is_editable else dtypes
            places.append(f"{name} {x.dtype_name} / {y.dtype_name}")
    common = len(a.specs) - len(only_a)
    if not (shapes or dtypes or (only_a and not common) or (strict and (only_a or only_b))):
        _check_fixed(a, b)
        if rounded:
            what = f"{describe(a)} and {describe(b)} have other dtypes: {first_few(rounded)}"
            log.warning("%s. What one rounded counts as changed; the first's dtype is kept", what)
        return only_a + only_b
    unlike = {*only_a, *only_b, *(text.split(" ")[0] for text in (*shapes, *dtypes))}
    if any(is_packed(f.specs[n]) for f in (a, b) for n in unlike if n in f.specs):
        hint = REMEDY
    elif shapes:
        hint = "both must come from one architecture"
    elif dtypes:
        hint = "they mean different things: both must come from one program"
    elif common:
        hint = f"a task vector can be of the {common} common tensors only"
    else:
        hint = "they have no tensor name in common, and must come from one architecture"
        hint = hint_of_part(a.specs, b.specs) or hint_of_part(b.specs, a.specs) or hint
    differences = {
        "only in the first": only_a,
        "only in the second": only_b,
        "of other shape": shapes,
        "of other dtype": dtypes,
    }
    raise mismatch(f"{describe(a)} and {describe(b)}", differences, hint)


def _check_fixed(a: LinearForm, b: LinearForm) -> None:
    """Refuse tensors that can't be edited and differ: the other tensors don't mean the same."""
    if a.base is None or b.base is None or a.base is b.base:
        return
    differing = differing_codes(a.specs, a.base, b.base)
    if differing:
        kinds = ", ".join(dict.fromkeys(a.specs[name].dtype_name for name in differing))
        is_complex = kinds.startswith("complex")
        remedy = "torch.view_as_real makes real tensors of complex ones" if is_complex else REMEDY
        raise MismatchError(
            f"{describe(a)} and {describe(b)} differ in {len(differing)} {kinds} tensors, which "
            f"can't be averaged or subtracted: {first_few(differing)}",
            hint=f"{remedy}; codes and indices must be the same in both",
        )


def describe(form: LinearForm) -> str:
    """Return the first sources of a form, for a message."""
    return first_few([source.ref for source in form.sources])
