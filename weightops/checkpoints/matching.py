"""One checkpoint in the names of another: wrappers' prefixes, transformers' and open_clip's names, image encoders alone, deltas."""

from __future__ import annotations

import logging

from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.checkpoint import Architecture, Checkpoint
from weightops.checkpoints.clip_names import is_clip, outside_image_tower, unwrapped
from weightops.checkpoints.libraries.open_clip import OpenClipArchitecture
from weightops.checkpoints.libraries.timm import TimmArchitecture
from weightops.checkpoints.libraries.transformers import TransformersArchitecture
from weightops.checkpoints.opening import CheckpointLike, open_any, open_checkpoint
from weightops.checkpoints.renaming import _tells_a_size, fitted
from weightops.errors import CheckpointError, MismatchError
from weightops.support.text import first_few

log = logging.getLogger("weightops")


def alike(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Weights in the names of a base; an image encoder alone is completed by the rest of the base's CLIP model.

    What can't be brought to the base's names is given back as it is, for the comparison to refuse.
    """
    form = fitted(checkpoint.form, base.form)
    missing = [name for name in base.specs if name not in form.specs]
    extra = [name for name in form.specs if name not in base.specs]
    short = {original: name for name, original in unwrapped(base.specs).items()}
    outside = outside_image_tower(
        short[name] for name in missing if not _tells_a_size(name, base.specs[name])
    )
    sizes = [name for name in missing if _tells_a_size(name, base.specs[name])]
    if (
        missing
        and not extra
        and (len(sizes) == len(missing) or (outside and is_clip(short.values())))
    ):
        if len(sizes) < len(missing):
            log.info(
                "%s is an image encoder: %s come from %s",
                checkpoint.ref,
                first_few(missing),
                base.ref,
            )
        delta, _ = LinearForm.difference(form, base.form, strict=False)
        form = base.form.plus(delta)
    return (
        checkpoint if form is checkpoint.form else checkpoint.as_of(form, checkpoint.architecture)
    )


def open_like(source: CheckpointLike, base: Checkpoint) -> Checkpoint:
    """Open weights to be compared with a base: in its names, and with what changes only parts of it applied to it.

    Raises:
        CheckpointError: if it can't be opened.
        MismatchError: if it is a delta whose tensors the base hasn't.
    """
    opened = open_any(source)
    if opened.form.space == "weights":
        return alike(opened, base)
    made_on = getattr(opened.form.sources[0], "made_from", {}).get("base")
    if isinstance(made_on, dict) and made_on.get("fingerprint") != base.fingerprint:
        log.warning(
            "%s was made from %s (%s), and is taken from %s",
            opened.ref,
            made_on.get("ref"),
            made_on.get("fingerprint"),
            base.ref,
        )
    form = base.form.plus(fitted(opened.form, base.form)) if opened.form.specs else base.form
    replaced = getattr(opened.form.sources[0], "replaced", None)
    if replaced is not None:
        whole, left_out = LinearForm.difference(
            fitted(LinearForm.of(replaced), base.form), base.form, strict=False
        )
        form = form.plus(whole)
        extra = [name for name in left_out if name not in base.specs]
        if extra:
            raise MismatchError(
                f"{opened.ref} brings {first_few(extra)}, which {base.ref} doesn't have"
            )
    return Checkpoint(form, base.architecture)


def for_open_clip(checkpoint: Checkpoint) -> Checkpoint:
    """A CLIP model of transformers as open_clip has it; any other checkpoint as it is."""
    architecture = checkpoint.architecture
    converted = (
        architecture.open_clip() if isinstance(architecture, TransformersArchitecture) else None
    )
    return _built_as(converted, checkpoint) if converted else checkpoint


def in_format(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """A checkpoint as "open_clip", "transformers" or "timm" has it: the folder that it is saved to loads in that library.

    CLIP models go from open_clip to transformers and back; "safetensors" leaves all but the weights away.

    Raises:
        CheckpointError: if that library hasn't such a model, or it isn't known of what model the weights are.
    """
    architecture = checkpoint.architecture
    if name == "safetensors":
        return checkpoint.as_of(checkpoint.form, None)
    if name == _library(architecture):
        return checkpoint
    if name == "open_clip" and isinstance(architecture, TransformersArchitecture):
        converted = for_open_clip(checkpoint)
        if converted is not checkpoint:
            return converted
    if name == "transformers" and isinstance(architecture, OpenClipArchitecture):
        return _built_as(TransformersArchitecture.of_open_clip(architecture), checkpoint)
    known = _library(architecture)
    what = f"a model of {known}" if known else "of no model that is known"
    raise CheckpointError(f"{checkpoint.ref} is {what}, and can't be written for {name}")


def _library(architecture: Architecture | None) -> str | None:
    kinds = {
        "open_clip": OpenClipArchitecture,
        "transformers": TransformersArchitecture,
        "timm": TimmArchitecture,
    }
    return next((name for name, kind in kinds.items() if isinstance(architecture, kind)), None)


def _built_as(architecture: Architecture, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint in the names of the model that an architecture builds."""
    return checkpoint.as_of(
        fitted(checkpoint.form, open_checkpoint(architecture.build()).form), architecture
    )
