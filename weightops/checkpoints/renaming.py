"""Rename the tensors of a form to match another form.

The names may differ in prefixes of wrappers, in the library of a CLIP model, and in ties.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.names import layer_of
from weightops.algebra.same_bits import copy_of
from weightops.algebra.source import Spec
from weightops.checkpoints.clip_names import COUNTERS, mappings, unwrapped
from weightops.checkpoints.conversion import TensorMapping
from weightops.checkpoints.libraries.memory_names import MemoryNames
from weightops.checkpoints.renamed import renamed

_SIZE_BUFFERS = (
    "position_ids",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
    "masked_bias",
    "inv_freq",
    *("cos_cached", "sin_cached", "freqs_cis"),
    *("relative_position_index", "relative_coords_table"),
    "num_batches_tracked",
)
"""Buffers that only state a size of the model, or a count, and that some libraries lack."""


def rename_to_match(
    form: LinearForm, base: LinearForm, names: MemoryNames | None = None
) -> LinearForm:
    """Return a form in the names of a base, or the form itself where it can't be renamed.

    A form is renamed if each of its names has a counterpart in the base, or belongs to a buffer
    that only states a size. Of names that are tied in the base, the result has all.

    Args:
        form: the form.
        base: the form with the wanted names.
        names: the names in memory of the model that both are of, if they are known.
    """
    return _with_aliases(matched_names(form, base, names), tied_names(base))


def match_ties(form: LinearForm, base: LinearForm) -> LinearForm:
    """Return a form with the tied names that a base has, where one of them stores a copy.

    A file may store a tied matrix once, or a second time under its other name, such as
    ``lm_head.weight`` beside the embeddings: both are the same model. Only matrices outside of the
    numbered layers are tied.
    """
    extra = [name for name in form.specs if name not in base.specs]
    missing = [name for name in base.specs if name not in form.specs and not layer_of(name)]
    common = [name for name in form.specs if name in base.specs and not layer_of(name)]
    if extra and all(not layer_of(name) and _copied(form, name, common) for name in extra):
        form = form.part([name for name in form.specs if name in base.specs])
    tied, ties = tied_names(form), tied_names(base)
    copies = {
        alias: name
        for alias, name in ties.items()
        if alias in form.specs
        and name in form.specs
        and tied.get(alias, alias) != tied.get(name, name)
        and _copied(form, alias, [name])
    }
    if copies:
        form = renamed(form, {n: TensorMapping("copy", (copies.get(n, n),)) for n in form.specs})
    return _with_aliases(form, {n: other for n in missing if (other := _copied(base, n, common))})


def _copied(form: LinearForm, name: str, names: Iterable[str]) -> str | None:
    """Return the name of the matrix that a form holds another time under a name, or None."""
    sources = [source for source in form.sources if name in source.specs]
    if len(form.specs[name].shape) < 2 or not sources:
        return None
    found = {copy_of(source, name, names) for source in sources}
    other = found.pop() if len(found) == 1 else None
    if other is None or form.coefficients(name) != form.coefficients(other):
        return None  # what is added to one of the two makes them two
    return other


def _with_aliases(form: LinearForm, ties: Mapping[str, str]) -> LinearForm:
    """Return a form with further names of its tensors, of which some pairs have one."""
    aliases = {
        name: other
        for pair in ties.items()
        for name, other in (pair, pair[::-1])
        if other in form.specs
        and name not in form.specs
        and not any(name in source.specs for source in form.sources)
    }
    if not aliases:
        return form
    every = (*form.specs, *aliases)
    return renamed(
        form, {name: TensorMapping("copy", (aliases.get(name, name),)) for name in every}
    )


def matched_names(
    form: LinearForm, base: LinearForm, names: MemoryNames | None = None
) -> LinearForm:
    """Return a form in the names of a base, as `rename_to_match`, but without regard to ties."""
    if set(form.specs) <= set(base.specs):
        return form
    through = _through_memory(form, base, names) if names else None
    if through is not None:
        return through
    mapped = mappings(form.specs, base.specs, partly=form.space == "delta")
    return renamed(form, mapped) if mapped and not _unmapped(form, mapped) else form


def _through_memory(form: LinearForm, base: LinearForm, names: MemoryNames) -> LinearForm | None:
    """Return a form in the names of a base, by way of their model's names in memory, or None."""
    mine, theirs = _plain_names(form, base, names), _plain_names(base, form, names)
    if mine is None or theirs is None:
        return None
    loading = _loading(form, mine, names)
    in_memory = renamed(form, {**loading, **_same(form, base, loading)})
    enough = any if form.space == "delta" else all
    saving = {
        theirs[name]: mapping
        for name, mapping in names.saving({n: base.specs[old] for n, old in theirs.items()}).items()
        if enough(old in in_memory.specs for old in mapping.names)
    }
    saving |= _same(in_memory, base, saving)
    return None if _unmapped(in_memory, saving) else renamed(in_memory, saving)


def _plain_names(form: LinearForm, other: LinearForm, names: MemoryNames) -> dict[str, str] | None:
    """Return name -> a form's name, with or without wrappers' prefixes; None if some are lost.

    Names that the other form has, too, aren't lost: they are of another part of the folder.
    """
    for originals in ({name: name for name in form.specs}, unwrapped(form.specs)):
        mapped = _loading(form, originals, names)
        lost = [name for name in _unmapped(form, mapped) if name not in other.specs]
        if all(names.is_ignored(name) for name in lost):
            return originals
    return None


def _loading(
    form: LinearForm, originals: Mapping[str, str], names: MemoryNames
) -> dict[str, TensorMapping]:
    """Return name in memory -> how its tensor is obtained from a form's tensors."""
    specs = {name: form.specs[old] for name, old in originals.items()}
    mapped = {}
    for name, mapping in names.loading(specs).items():
        olds = tuple(originals[old] for old in mapping.names)
        conversion = mapping.conversion and replace(mapping.conversion, inputs=olds)
        mapped[name] = mapping._replace(names=olds, conversion=conversion)
    return mapped


def _same(
    form: LinearForm, base: LinearForm, mapped: Mapping[str, TensorMapping]
) -> dict[str, TensorMapping]:
    """Return mappings of tensors that aren't mapped and have the same name in the base."""
    return {
        name: TensorMapping("copy", (name,))
        for name in _unmapped(form, mapped)
        if name in base.specs and name not in mapped
    }


def states_a_size(name: str, spec: Spec) -> bool:
    """Return whether a tensor is a buffer that only states a size of the model."""
    leaf = name.rpartition(".")[2]
    is_gpt2_mask = leaf == "bias" and len(spec.shape) == 4 and spec.shape[:2] == (1, 1)
    return leaf in _SIZE_BUFFERS or name in COUNTERS or is_gpt2_mask


def _unmapped(form: LinearForm, mapped: Mapping[str, TensorMapping]) -> list[str]:
    """Return the names of tensors that would be lost if only mapped tensors were kept."""
    tied = tied_names(form)
    used = {tied.get(old, old) for mapping in mapped.values() for old in mapping.names}
    return [
        name
        for name, spec in form.specs.items()
        if tied.get(name, name) not in used and not states_a_size(name, spec)
    ]
