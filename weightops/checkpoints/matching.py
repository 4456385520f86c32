"""One checkpoint in the names of another: wrappers' prefixes, transformers' and open_clip's names, image encoders alone, deltas."""

from __future__ import annotations

import logging

from weightops.algebra.linear_form import LinearForm
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.clip_names import is_clip, outside_image_tower, unwrapped
from weightops.checkpoints.libraries.clip_conversion import convert
from weightops.checkpoints.libraries.table import LIBRARIES
from weightops.checkpoints.opening import CheckpointLike, open_any, open_checkpoint
from weightops.checkpoints.renaming import rename_to_match, tells_a_size
from weightops.errors import CheckpointError, MismatchError
from weightops.support.registry import unknown
from weightops.support.text import first_few

log = logging.getLogger("weightops")

WEIGHTS_ALONE = "safetensors"
"""The name that `convert_to` takes for weights without anything that describes their model."""


def match_to_base(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Weights in the names of a base; an image encoder alone is completed by the rest of the base's CLIP model.

    What can't be brought to the base's names is given back as it is, for the comparison to refuse.
    """
    form = rename_to_match(checkpoint.form, base.form)
    missing = [name for name in base.specs if name not in form.specs]
    extra = [name for name in form.specs if name not in base.specs]
    short = {original: name for name, original in unwrapped(base.specs).items()}
    outside = outside_image_tower(
        short[name] for name in missing if not tells_a_size(name, base.specs[name])
    )
    sizes = [name for name in missing if tells_a_size(name, base.specs[name])]
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


def open_matched(source: CheckpointLike, base: Checkpoint) -> Checkpoint:
    """Open weights to be compared with a base: in its names, and with what changes only parts of it applied to it.

    Raises:
        CheckpointError: if it can't be opened.
        MismatchError: if it is a delta whose tensors the base hasn't.
    """
    opened = open_any(source)
    if opened.form.space == "weights":
        return match_to_base(opened, base)
    made_on = getattr(opened.form.sources[0], "made_from", {}).get("base")
    if isinstance(made_on, dict) and made_on.get("fingerprint") != base.fingerprint:
        log.warning(
            "%s was made from %s (%s), and is taken from %s",
            opened.ref,
            made_on.get("ref"),
            made_on.get("fingerprint"),
            base.ref,
        )
    form = (
        base.form.plus(rename_to_match(opened.form, base.form)) if opened.form.specs else base.form
    )
    replaced = getattr(opened.form.sources[0], "replaced", None)
    if replaced is not None:
        whole, left_out = LinearForm.difference(
            rename_to_match(LinearForm.of(replaced), base.form), base.form, strict=False
        )
        form = form.plus(whole)
        extra = [name for name in left_out if name not in base.specs]
        if extra:
            raise MismatchError(
                f"{opened.ref} brings {first_few(extra)}, which {base.ref} doesn't have"
            )
    return Checkpoint(form, base.architecture)


def as_open_clip(checkpoint: Checkpoint) -> Checkpoint:
    """Return a CLIP model of transformers as open_clip's; any other checkpoint unchanged."""
    return _converted(checkpoint, "open_clip") or checkpoint


def convert_to(checkpoint: Checkpoint, library: str) -> Checkpoint:
    """Return a checkpoint whose saved folder loads in a library.

    CLIP models are converted between open_clip and transformers.

    Args:
        checkpoint: weights with a known architecture.
        library: a name in `LIBRARIES`, or "safetensors" for the weights alone.

    Raises:
        CheckpointError: if that library has no such model, or nothing says which model the weights are of.
        UnknownNameError: if there is no such library.
    """
    architecture = checkpoint.architecture
    if library == WEIGHTS_ALONE:
        return checkpoint.as_of(checkpoint.form, None)
    if library not in LIBRARIES:
        raise unknown(LIBRARIES.kind, library, [*LIBRARIES.names(), WEIGHTS_ALONE])
    if architecture is not None and architecture.library == library:
        return checkpoint
    converted = _converted(checkpoint, library)
    if converted is None:
        what = f"a model of {architecture.library}" if architecture else "of no model that is known"
        raise CheckpointError(f"{checkpoint.ref} is {what}, and can't be written for {library}")
    return converted


def _converted(checkpoint: Checkpoint, library: str) -> Checkpoint | None:
    """Return the checkpoint of the converted architecture, in the names of the model that it builds."""
    architecture = checkpoint.architecture and convert(checkpoint.architecture, library)
    if architecture is None:
        return None
    built = open_checkpoint(architecture.build())
    return checkpoint.as_of(rename_to_match(checkpoint.form, built.form), architecture)
