"""Verify an output: compute it again from its inputs, and compare it tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.provenance import provenance
from weightops.algebra.source import Spec
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.packed import PackedSource
from weightops.checkpoints.matching import convert_to, match_names
from weightops.checkpoints.opening import open_any, open_ref
from weightops.checkpoints.recorded_recipe import is_sum, recipe_of
from weightops.checkpoints.statistic_record import record_of
from weightops.engine.compare import Difference, compare
from weightops.errors import OptionError, UnverifiedError, WeightopsError
from weightops.merging.recipe import Recipe
from weightops.merging.recipe_merge import RecipeMerge
from weightops.merging.recorded_inputs import RecordedInputs, fingerprints_in, form_of_terms
from weightops.support.result_files import RECIPE
from weightops.support.text import first_few

RECIPES = (RECIPE, "mergekit_config.yml", "mergekit_config.yaml")
"""Files of a merged folder that say how it was made."""

_DECOMPOSED = 1e-4
"""How far singular value decompositions may be apart, relative to what they are of."""


@dataclass(frozen=True)
class Verification:
    """The comparison of an output with what its recipe gives now.

    Attributes:
        output: the output.
        made_by: how it was made, in a few words.
        exact: whether the same bits are asked for. Of what others made, or was made of a vector
            that was rounded since, a difference that rounding can make is none.
        differences: name -> difference, for each tensor that both have.
        missing: the tensors that the output lacks.
        extra: the tensors that only the output has.
        reshaped: the tensors that have another shape or dtype, each with both.
        error: the relative difference of a tensor that is none, either, as that of decompositions.
    """

    output: str
    made_by: str
    exact: bool
    differences: Mapping[str, Difference]
    missing: Sequence[str] = ()
    extra: Sequence[str] = ()
    reshaped: Mapping[str, str] = field(default_factory=dict)
    error: float = 0.0

    @property
    def differing(self) -> dict[str, Difference]:
        """The tensors that aren't what they should be."""
        return {
            name: found
            for name, found in self.differences.items()
            if found.other
            and (self.exact or not (found.is_rounding or found.relative <= self.error))
        }

    @property
    def holds(self) -> bool:
        """Whether the output is what it should be."""
        return not (self.differing or self.missing or self.extra or self.reshaped)

    @property
    def scales(self) -> dict[str, float]:
        """Name -> the coefficient of the change in the output, for each tensor that changes."""
        scales = {name: found.scale for name, found in self.differences.items()}
        return {name: scale for name, scale in scales.items() if scale is not None}

    @property
    def scale(self) -> float | None:
        """The coefficient of the whole change in the output; None if nothing changes."""
        change = sum(found.change for found in self.differences.values())
        along = sum(found.along_change for found in self.differences.values())
        return 1.0 + along / change if change else None


def verify(
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    base: str | None = None,
    adapters: Sequence[str] = (),
    inputs: Sequence[str | Path] = (),
    device: str = "cpu",
) -> Verification:
    """Compute an output again from its recorded recipe and inputs, and compare each tensor.

    Nothing is written, and no more than a few tensors are in memory at once. Inputs are looked for
    where the recipe says, in the output's folder, beside it, and in ``inputs``; the recorded
    fingerprints say which are the right ones.

    Args:
        output: the merged folder or file.
        recipe: the recipe, weightops' own or mergekit's. Default: the one that the output records,
            or that lies in its folder.
        base: with ``adapters``, the base that they should be merged into, by whatever tool.
        adapters: an adapter, or saved task vector, that should be in the output; several can be.
        inputs: a folder in which to look for inputs that have moved; several can be given.
        device: where models are run, if the recipe needs images.

    Raises:
        UnverifiedError: if the output can't be checked: nothing says how it was made, or an input
            is gone, or is another one now.
        OptionError: for arguments that don't go together.

    >>> import tempfile, torch
    >>> from weightops import Recipe, open_checkpoint
    >>> place = Path(tempfile.mkdtemp())
    >>> for name, value in (("a", 1.0), ("b", 2.0)):
    ...     _ = open_checkpoint({"w": torch.full((4,), value)}).save(place / name)
    >>> _ = Recipe((f"{place}/a", f"{place}/b")).merge().save(place / "merged")
    >>> verify(place / "merged").holds
    True
    """
    if bool(base) != bool(adapters) or (base and recipe):
        raise OptionError(
            "base and adapters belong together, without a recipe",
            hint="base=..., adapters=...; or recipe=...; or neither, for what the output records",
        )
    try:
        actual = open_ref(output)
        with ExitStack() as stack:
            made = _Made.of(output, actual, recipe, base, adapters, inputs, device, stack)
            return _compared(str(output), actual, made)
    except (UnverifiedError, OptionError):
        raise
    except (WeightopsError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        fact = error.fact if isinstance(error, WeightopsError) else f"{error}"
        hint = error.hint if isinstance(error, WeightopsError) else ""
        raise UnverifiedError(f"{output} can't be checked: {fact}", hint=hint) from error


@dataclass(frozen=True)
class _Made:
    """An output as it should be."""

    model: Checkpoint
    base: Checkpoint | None
    by: str
    exact: bool
    error: float = 0.0

    @classmethod
    def of(
        cls,
        output: str | Path,
        actual: Checkpoint,
        recipe: str | Path | None,
        base: str | None,
        adapters: Sequence[str],
        inputs: Sequence[str | Path],
        device: str,
        stack: ExitStack,
    ) -> _Made:
        """Compute an output again, lazily; what it needs on the disk is there for the stack."""
        record = dict(actual.form.sources[0].made_from)
        given = recipe or base
        if isinstance(actual.form.sources[0], PackedSource) and not given:
            raise UnverifiedError(
                f"{output} can't be checked: it is one of several models that share a file, and as "
                "near to its own as that allows",
                hint="`weightops compare` tells how near",
            )
        recorded = set() if given else fingerprints_in(record)
        files = [file.path for file in actual.form.files]
        where = RecordedInputs(Path(output), files, recorded, inputs)
        if base:
            found = Recipe(tuple(adapters), "task_arithmetic", base=base)
            name = f"{base} with {first_few(adapters)} merged in"
        else:
            stated = _recipe_of(Path(output), record, recipe)
            if stated is None:
                _refuse_measured(output, actual, record["terms"])
                form, start = form_of_terms(record, where)
                where.check(fingerprints_in(provenance(form)))
                return cls(Checkpoint(form, start.architecture), start, _summed(record), True)
            found, name = stated, _named(stated)
        merge = RecipeMerge(found, device=device, open_ref=open_any if base else where.open)
        merged = merge.run()
        exact = "terms" in record and "verb" not in (record.get("recipe") or {}) and not given
        if exact:
            where.check(fingerprints_in(provenance(merged.form)))
        if found.rank is not None:
            place = Path(stack.enter_context(TemporaryDirectory())) / "adapter"
            return cls(open_ref(merged.save(place)), None, name, False, _DECOMPOSED)
        return cls(merged, merge.open(found.base) if found.base else None, name, exact)


def _recipe_of(output: Path, record: Mapping[str, Any], given: str | Path | None) -> Recipe | None:
    """Return the recipe of an output; None if its record says in another way how it was made."""
    if given:
        return Recipe.read(given)
    stated = record.get("recipe")
    if isinstance(stated, Mapping) and "verb" not in stated:
        return Recipe.of(stated)
    if stated is None and is_sum(record):
        return None
    derived = recipe_of(record) if stated is None else None
    if derived is not None:
        return Recipe.of(derived)
    folder = output if output.is_dir() else output.parent
    file = next((folder / name for name in RECIPES if (folder / name).is_file()), None)
    if file and output.is_dir():
        return Recipe.read(file)
    raise UnverifiedError(
        f"{output} doesn't say how it was made",
        hint="recipe=... names its recipe; base=... and adapters=... what should be merged in it",
    )


def _refuse_measured(
    output: str | Path, actual: Checkpoint, terms: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse what a model was run for: no arithmetic on inputs gives it again.

    Raises:
        UnverifiedError: for a statistic, and for a vector with a mask that was learned.
    """
    statistic = record_of(actual)
    if statistic:
        raise UnverifiedError(
            f"{output} can't be checked: it is a {statistic.get('kind')} statistic, which comes "
            "from running a model and not from arithmetic on inputs",
            hint="`weightops statistics` makes it again",
        )
    for term in terms:
        mask = term.get("localized")
        if isinstance(mask, Mapping):
            raise UnverifiedError(
                f"{output} can't be checked: its mask was learned from images of "
                f"{mask.get('task')} and doesn't come from arithmetic on inputs",
                hint="`weightops vector --localize` makes it again",
            )


def _named(recipe: Recipe) -> str:
    """Return a recipe in a few words."""
    method = "mixture" if recipe.mixture else recipe.method
    base = f", base {recipe.base}" if recipe.base else ""
    return f"{method} of {first_few(dict.fromkeys(recipe.models), 4)}{base}"


def _summed(record: Mapping[str, Any]) -> str:
    """Return a sum of inputs in a few words."""
    terms = [f"{term['coefficient']:+g} x {term['ref']}" for term in record["terms"]]
    return " ".join(terms[:6]) + (" ..." if len(terms) > 6 else "")


def _compared(output: str, actual: Checkpoint, made: _Made) -> Verification:
    """Compare an output with what it should be."""
    model = made.model
    own, wanted = model.architecture, actual.architecture
    if own and wanted and own.library != wanted.library:
        model = convert_to(model, wanted.library)
    expected = match_names(model, actual)
    aliases = [tied_names(form).keys() for form in (expected, actual.form)]
    specs, reshaped = {}, {}
    for name, spec in expected.specs.items():
        has = actual.specs.get(name, spec)
        alike = has.dtype_name == spec.dtype_name or (has.is_editable and spec.is_editable)
        if has.shape == spec.shape and alike:
            specs[name] = has
        else:
            reshaped[name] = f"{_described(has)}, and should be {_described(spec)}"
    start = made.base and match_names(made.base, actual)
    return Verification(
        output,
        made.by,
        made.exact,
        compare(
            replace(expected, specs=specs),
            actual.form.part([name for name in actual.specs if name in specs]),
            start if isinstance(start, LinearForm) and start.space == "weights" else None,
        ),
        missing=[n for n in expected.specs if n not in actual.specs and n not in aliases[0]],
        extra=[n for n in actual.specs if n not in expected.specs and n not in aliases[1]],
        reshaped=reshaped,
        error=made.error,
    )


def _described(spec: Spec) -> str:
    return f"{spec.dtype_name} {spec.shape}"
