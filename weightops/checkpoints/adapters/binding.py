"""Put adapters on a base: edit the modules that they were made on, and no others."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import replace

from weightops.algebra.linear_form import Factor, LinearForm, tied_names
from weightops.algebra.source import Source, Spec
from weightops.checkpoints.adapters.adapter import PREFIX, Adapter
from weightops.checkpoints.adapters.bare import BareAdapter
from weightops.checkpoints.adapters.bare_placing import place_bare
from weightops.checkpoints.adapters.lora import LoraSource
from weightops.checkpoints.adapters.peft_adapter import PeftAdapter
from weightops.checkpoints.adapters.placing import oriented, place, prefixed, tower
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.compressed import float_tensor
from weightops.checkpoints.renamed import Renamed, renamed
from weightops.checkpoints.skeleton import blank_copy
from weightops.checkpoints.ties import (
    architecture_of_ends,
    ends_left_out,
    with_copies,
    with_tied_names,
)
from weightops.errors import CheckpointError, MismatchError, MissingExtraError
from weightops.support.lazy import torch
from weightops.support.text import first_few

_IN_LAYER = re.compile(r"\.\d+\.")


def bind(adapter: Adapter, base: Checkpoint) -> Checkpoint:
    """Return a base that is edited by an adapter.

    Of a tensor that the base has under two names, an adapter may change one end: then the result
    has two tensors.

    Raises:
        CheckpointError: if the adapter can't be merged.
        MismatchError: if the adapter wasn't made on such a model, or where in it isn't known.
        MissingExtraError: if only peft can merge it, and isn't installed.
    """
    start = _with_all_ends(adapter, base)
    delta, whole = LinearForm("delta", {}, {}), None
    if isinstance(adapter, LoraSource):
        placed = place(adapter, start, adapter.made_on)
        if not placed.specs.keys() <= start.specs.keys():
            whole = _merged_by_other_names(adapter, start)
        if whole is None:
            form = with_copies(LinearForm.of(placed), {})
            delta = oriented(form, start, transposed=adapter.transposed)
            whole = adapter.replaced and place(adapter.replaced, start, adapter.made_on)
    elif isinstance(adapter, BareAdapter):
        delta = oriented(LinearForm.of(place_bare(adapter, start)), start, transposed=False)
    else:
        assert isinstance(adapter, PeftAdapter)
        whole = _merged(adapter, start)
    if whole is not None:
        delta = delta.plus(_change(whole, start, adapter.ref))
    delta, apart = _settle_ends(delta, start)
    if not apart:  # what the base ties is changed as one, or not at all
        added = start.specs.keys() - base.specs.keys()
        start, delta = base, _restricted(delta, delta.specs.keys() - added)
    form = start.form.plus(delta)
    return Checkpoint(form, architecture_of_ends(form, start))


def placed_term(term: LinearForm, adapter: LoraSource, base: Checkpoint) -> LinearForm:
    """Return one term of a delta, of an adapter, on the modules of a base."""
    placed = place(adapter, base, adapter.made_on)
    whole = _with_all_ends(adapter, base)
    ends = {name for pair in tied_names(whole.form).items() for name in pair}
    by_name = any(factor.rules for factor in term.terms)
    if ends & placed.specs.keys() or (by_name and not isinstance(placed, (Renamed, LoraSource))):
        raise MismatchError(
            f"{adapter.ref} changes {base.ref} otherwise than by its own names",
            hint=f"TaskVector(base, {adapter.ref!r}) is its task vector on a base",
        )
    if isinstance(placed, Renamed):
        term = renamed(term, placed.mapped)
    elif placed is not adapter:
        term = replace(LinearForm.of(placed), terms={Factor(placed): sum(term.terms.values())})
    return oriented(term, base, transposed=adapter.transposed)


def _with_all_ends(adapter: Adapter, base: Checkpoint) -> Checkpoint:
    """Return a base that has both ends of tied tensors that an adapter may change."""
    names = [name.removeprefix(PREFIX) for name in adapter.stored.specs]
    if base.architecture is None or all(_IN_LAYER.search(name) for name in names):
        return base
    may_be_tied = base.architecture.config.get("tie_word_embeddings") is not False
    if base.skeleton is None and base.architecture.library == "transformers" and may_be_tied:
        base.architecture.build()  # which says why the model's ties can't be known
    return with_tied_names(base, ends_left_out(base))


def _merged(adapter: PeftAdapter, base: Checkpoint) -> Source:
    """Return the tensors of a base that peft changes, changed, in the base's names."""
    if base.skeleton is None:
        if base.architecture:
            base.architecture.build()  # which says why it can't be built
        raise CheckpointError(
            f"{adapter.ref} {adapter.needs_base}, and {base.ref} doesn't say of what model it is",
            hint="give the base as a folder with a configuration, or as a module",
        )
    skeleton, memory = blank_copy(base.skeleton), base.memory
    part = tower(skeleton, adapter.made_on)
    inner = skeleton.get_submodule(part)
    prefix = f"{part}." if part else ""
    own = {
        name.removeprefix(prefix): spec
        for name, spec in memory.specs.items()
        if name.startswith(prefix)
    }
    merged = adapter.merged(inner, own, lambda name: float_tensor(memory.form, prefix + name))
    beside = memory.beside(dict.fromkeys(prefix + name for name in merged.specs))
    merged.add(name.removeprefix(prefix) for name in beside)
    return memory.in_files(prefixed(merged, prefix))


def _merged_by_other_names(adapter: LoraSource, base: Checkpoint) -> Source | None:
    """Return what peft makes of a LoRA in names of an older transformers; None if it can't."""
    if base.skeleton is None or not hasattr(base.skeleton, "config"):
        return None
    try:
        return _merged(PeftAdapter(adapter.config, adapter.stored, adapter.ref), base)
    except (CheckpointError, MissingExtraError):
        return None


def _change(whole: Source, base: Checkpoint, ref: str) -> LinearForm:
    """Return the delta from a base to tensors that take the place of its own."""
    extra = [name for name in whole.specs if name not in base.specs]
    if extra:
        raise MismatchError(f"{ref} brings {first_few(extra)}, which {base.ref} doesn't have")
    # Where dtypes differ, the base's is written.
    specs = {n: Spec(spec.shape, base.specs[n].dtype_name) for n, spec in whole.specs.items()}
    form = replace(LinearForm.of(whole), specs=specs)
    return LinearForm.difference(form, base.form, strict=False)[0]


def _settle_ends(delta: LinearForm, base: Checkpoint) -> tuple[LinearForm, bool]:
    """Tie the ends that a delta changes equally; return it, and whether others come apart."""
    ties = tied_names(base.form)
    ends = delta.specs.keys() & {*ties, *ties.values()}
    deltas = {end: float_tensor(delta, end) for end in ends}
    unchanged = {end for end, tensor in deltas.items() if not tensor.any()}
    copies, apart = {}, False
    for alias, name in ties.items():
        changed = [end for end in (alias, name) if end in ends - unchanged]
        if len(changed) == 2 and _equal(deltas[alias], deltas[name]):
            copies[alias] = name
        elif changed:
            _check_is_read(changed, (alias, name))
            apart = True
    kept = _restricted(delta, delta.specs.keys() - copies.keys() - unchanged)
    return with_copies(kept, copies) if copies else kept, apart


def _check_is_read(changed: Sequence[str], ends: Sequence[str]) -> None:
    """Refuse a change of the module ``shared`` of T5 and BART, which reads its other ends.

    peft leaves such a change out while the model runs, and not when it merges.
    """
    [*kept] = set(ends) - set(changed)
    if kept and changed[0].endswith("shared.weight"):
        raise MismatchError(
            f"an adapter changes {changed[0]}, which the model doesn't run: it runs {kept[0]}",
            hint="train an adapter of embed_tokens instead",
        )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two deltas are equal, up to the order of their sums."""
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max())


def _restricted(delta: LinearForm, names: Set[str]) -> LinearForm:
    """Return a delta at some names only."""
    if delta.specs.keys() <= names:
        return delta
    return delta.only({name: spec for name, spec in delta.specs.items() if name in names})
