"""Bring a checkpoint to the names of another one, or to another library."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from weightops.algebra.linear_form import LinearForm, describe
from weightops.algebra.provenance import fingerprint
from weightops.checkpoints.adapters.adapter import Adapter
from weightops.checkpoints.adapters.binding import bind, placed_term
from weightops.checkpoints.adapters.lora import LoraSource
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.clip_names import is_clip, outside_image_tower, unwrapped
from weightops.checkpoints.config_differences import config_differences
from weightops.checkpoints.libraries.clip_conversion import convert
from weightops.checkpoints.libraries.table import LIBRARIES
from weightops.checkpoints.linearized import linearized_at
from weightops.checkpoints.opening import CheckpointLike, open_any, open_checkpoint
from weightops.checkpoints.renaming import match_ties, rename_to_match, states_a_size
from weightops.checkpoints.statistic_record import refuse_statistic
from weightops.checkpoints.ties import warn_of_ends_that_differ
from weightops.errors import CheckpointError, MismatchError
from weightops.support.registry import unknown
from weightops.support.text import first_few

log = logging.getLogger("weightops")

WEIGHTS_ALONE = "safetensors"
"""The name that `convert_to` takes for weights without anything that describes their model."""


def match_to_base(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Return weights in the names of a base.

    An image encoder alone is completed with the other tensors of the base's CLIP model. Weights
    that can't be renamed are returned unchanged, so that a comparison refuses them.
    """
    form = _with_sizes_of(base.form, match_names(checkpoint, base))
    missing = [name for name in base.specs if name not in form.specs]
    extra = [name for name in form.specs if name not in base.specs]
    if missing and not extra and _can_be_completed(missing, base, checkpoint.ref):
        delta, _ = LinearForm.difference(form, base.form, strict=False)
        form = base.form.plus(delta)
    if form is checkpoint.form:
        return checkpoint
    return checkpoint.with_form(form, checkpoint.architecture)


def _with_sizes_of(base: LinearForm, form: LinearForm) -> LinearForm:
    """Return weights whose buffers of sizes have the dtypes that a base has, as versions differ."""
    changed = {
        name: base.specs[name]
        for name, spec in form.specs.items()
        if (of_base := base.specs.get(name)) is not None
        and spec != of_base
        and spec.shape == of_base.shape
        and states_a_size(name, spec)
    }
    return replace(form, specs={**form.specs, **changed}) if changed else form


def match_names(checkpoint: Checkpoint, base: Checkpoint) -> LinearForm:
    """Return the form of a checkpoint, weights or a delta, in the names of a base.

    A form that can't be renamed is returned unchanged. Adapters that were loaded without a base
    are put on the base's modules.
    """
    form = checkpoint.form
    loose = [source for source in form.sources if isinstance(source, LoraSource)]
    if loose and base.form.space == "weights":
        return _with_adapters(checkpoint, base)
    names = None
    if not set(form.specs) <= set(base.specs):
        names = base.names_in_memory or checkpoint.names_in_memory
    return match_ties(rename_to_match(form, base.form, names), base.form)


def _with_adapters(delta: Checkpoint, base: Checkpoint) -> LinearForm:
    """Return a delta, of which some terms are adapters, in the names of a base."""
    form = delta.form
    others = {f: c for f, c in form.terms.items() if not isinstance(f.source, LoraSource)}
    specs = {n: s for n, s in form.specs.items() if any(n in f.source.specs for f in others)}
    rest = LinearForm("delta", specs, others)
    result = match_names(delta.with_form(rest, delta.architecture), base)
    for factor, coefficient in form.terms.items():
        if isinstance(factor.source, LoraSource):
            names = {n: s for n, s in factor.source.specs.items() if n in form.specs}
            term = LinearForm("delta", names, {factor: coefficient})
            result = result.plus(placed_term(term, factor.source, base))
    return result


def in_common_names(forms: Sequence[LinearForm]) -> list[LinearForm]:
    """Return forms in the names of the largest of them, the first of several.

    Raises:
        MismatchError: if there is no name that all of them have.
    """
    largest = max(forms, key=lambda form: len(form.specs))
    renamed = [form if form is largest else rename_to_match(form, largest) for form in forms]
    if not set.intersection(*(set(form.specs) for form in renamed)):
        raise MismatchError(
            f"{first_few([describe(form) for form in forms])} have no tensor name in common",
            hint="compare models of one architecture",
        )
    return renamed


def _can_be_completed(missing: list[str], base: Checkpoint, ref: str) -> bool:
    """Return whether a base may supply the missing tensors of the weights called ``ref``."""
    weights = [name for name in missing if not states_a_size(name, base.specs[name])]
    if not weights:
        return True
    canonical = {original: name for name, original in unwrapped(base.specs).items()}
    only_images = outside_image_tower(canonical[name] for name in weights)
    if not only_images or not is_clip(canonical.values()):
        return False
    log.info("%s is an image encoder: %s come from %s", ref, first_few(missing), base.ref)
    return True


def open_matched(source: CheckpointLike, base: Checkpoint, *, strict: bool = False) -> Checkpoint:
    """Open weights in the names of a base; a delta or an adapter is applied to the base.

    Args:
        source: the weights, delta or adapter.
        base: the base.
        strict: refuse weights that are configured differently, and a vector that was made from
            another base, instead of warning.

    Raises:
        CheckpointError: if ``source`` can't be opened.
        MismatchError: with ``strict=True``, naming the settings or the other base.
        MismatchError: if ``source`` is a delta with tensors that the base lacks, or an adapter that
            wasn't made on such a base.
        SpaceError: if either is a statistic.
    """
    opened = open_any(source)
    for given in (opened, base):
        refuse_statistic(given)
    warn_of_ends_that_differ(base, opened)
    if opened.form.space == "weights":
        check_config(opened, base, strict=strict)
        return match_to_base(opened, base)
    stored = opened.form.sources[0]
    if isinstance(stored, Adapter):
        return bind(stored, base)
    _check_base(opened, base, strict=strict)
    delta = match_names(opened, base)
    return Checkpoint(base.form.plus(delta), base.architecture)


def check_config(checkpoint: Checkpoint, base: Checkpoint, *, strict: bool) -> None:
    """Warn if weights are of a model that computes something else with the same tensors.

    Raises:
        MismatchError: naming the settings, with ``strict=True``.
    """
    if checkpoint.architecture is None or base.architecture is None:
        return
    if checkpoint.architecture.library != base.architecture.library:
        return
    differences = config_differences(checkpoint.architecture, base.architecture)
    if not differences:
        return
    named = f"{checkpoint.ref} and {base.ref} are configured differently"
    listed = first_few(differences, 6)
    if strict:
        raise MismatchError(f"{named}: {listed}")
    log.warning("%s, and the result is configured as the second: %s", named, listed)


def _check_base(delta: Checkpoint, base: Checkpoint, *, strict: bool) -> None:
    """Warn if a task vector was made from other weights than a base, or refuse it."""
    stored = delta.form.sources[0]
    made_on = stored.made_from.get("base")
    if not isinstance(made_on, dict):
        return
    recorded = made_on.get("fingerprint")
    if recorded != base.fingerprint and not is_renamed(base, delta.form, recorded):
        made_from = f"{made_on.get('ref')} ({recorded})"
        message = f"{stored.ref} was made from {made_from}, and is taken from {base.ref}"
        if strict:
            raise MismatchError(message)
        log.warning(message)


def is_renamed(base: Checkpoint, vector: LinearForm, recorded: object) -> bool:
    """Return whether a base, in a vector's other names, has the fingerprint of the vector's own."""
    if set(vector.specs) == set(base.specs):
        return False
    return fingerprint(match_names(base, Checkpoint(vector))) == recorded


def as_open_clip(checkpoint: Checkpoint) -> Checkpoint:
    """Return a CLIP model of transformers as open_clip's; any other checkpoint unchanged."""
    converted = _converted(checkpoint, "open_clip")
    return checkpoint if converted is None else converted


def convert_to(checkpoint: Checkpoint, library: str) -> Checkpoint:
    """Return a checkpoint whose saved folder loads in a library.

    CLIP models are converted between open_clip and transformers.

    Args:
        checkpoint: weights with a known architecture.
        library: a name in `LIBRARIES`, or "safetensors" for the weights alone.

    Raises:
        CheckpointError: if that library has no such model, or the architecture isn't known; or if
            the weights are of a linearised model, which no other library runs.
        UnknownNameError: if there is no such library.
    """
    architecture = checkpoint.architecture
    if library == WEIGHTS_ALONE:
        return checkpoint.with_form(checkpoint.form, None)
    if library not in LIBRARIES:
        raise unknown(LIBRARIES.kind, library, [*LIBRARIES.names(), WEIGHTS_ALONE])
    if architecture is not None and architecture.library == library:
        return checkpoint
    at = linearized_at(checkpoint.form)
    if at is not None:
        raise CheckpointError(
            f"{checkpoint.ref} is linearised at {at.ref}: {library} would run it as it isn't",
            hint=f"--format {WEIGHTS_ALONE} writes the weights alone",
        )
    converted = _converted(checkpoint, library)
    if converted is None:
        what = f"a model of {architecture.library}" if architecture else "of no model that is known"
        raise CheckpointError(f"{checkpoint.ref} is {what}, and can't be written for {library}")
    return converted


def _converted(checkpoint: Checkpoint, library: str) -> Checkpoint | None:
    """Return the weights in another library's names; None if there is no such conversion."""
    architecture = checkpoint.architecture and convert(checkpoint.architecture, library)
    if architecture is None:
        return None
    built = open_checkpoint(architecture.build())
    return checkpoint.with_form(rename_to_match(checkpoint.form, built.form), architecture)
