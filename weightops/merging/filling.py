"""Take what isn't merged from another model: other tensors, or the files beside the weights."""

from __future__ import annotations

from collections.abc import Iterable

from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.names import layer_of
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.conversion import TensorMapping
from weightops.checkpoints.renamed import renamed
from weightops.checkpoints.renaming import matched_names, states_a_size
from weightops.errors import RecipeError
from weightops.merging.layers import Stack
from weightops.merging.towers import belongs
from weightops.support.text import first_few


def fill_missing(part: Checkpoint, whole: Checkpoint) -> Checkpoint:
    """Return a whole model with the tensors of a part in place of its own.

    The tensors of a part have the ends of the whole model's names: ``model.layers.0...`` becomes
    ``model.language_model.layers.0...``. Where several ends match, the language model is meant.

    Raises:
        RecipeError: if a tensor of the part has no place, or one of another shape.
    """
    form = _in_names_of(part, whole)
    tied = tied_names(whole.form)
    form = renamed(
        form,
        {
            name: TensorMapping("copy", (name if name in form.specs else tied[name],))
            for name in whole.specs
            if name in form.specs or tied.get(name) in form.specs
        },
    )
    rest = [name for name in whole.specs if name not in form.specs]
    _check_head(part, whole, form, rest)
    stack = Stack([whole.form.part(rest), form])
    return Checkpoint(LinearForm.of(stack), whole.architecture)


def like(merged: Checkpoint, model: Checkpoint, *, by_token: bool) -> Checkpoint:
    """Return merged weights with the configuration, tokenizer and other files of a model.

    The depth, and what else merging has changed in the configuration, stays.

    Args:
        merged: the weights.
        model: the model.
        by_token: leave out of account the number of rows, since the vocabulary is another.

    Raises:
        RecipeError: if the model's tensors outside of the layers have other shapes.
    """
    first = 1 if by_token else 0
    other = [
        f"{name} {tuple(spec.shape)} / {tuple(model.specs[name].shape)}"
        for name, spec in merged.specs.items()
        if layer_of(name) is None
        and name in model.specs
        and spec.shape[first:] != model.specs[name].shape[first:]
    ]
    if other:
        raise RecipeError(
            f"the result can't have the configuration of {model.ref}, whose tensors have other "
            f"shapes: {first_few(other)}"
        )
    if merged.architecture is None or model.architecture is None:
        return merged
    return Checkpoint(merged.form, model.architecture.changed(merged.architecture.changes))


def _in_names_of(part: Checkpoint, whole: Checkpoint) -> LinearForm:
    """Return the form of a part in the names of the whole model."""
    form = matched_names(part.form, whole.form, whole.names_in_memory)
    if not set(form.specs) <= set(whole.specs):
        places = {
            _place(name, whole.specs, part.ref, whole.ref): TensorMapping("copy", (name,))
            for name, spec in part.specs.items()
            if not states_a_size(name, spec)
        }
        form = renamed(part.form, places)
    other = [
        f"{name} {tuple(spec.shape)} / {tuple(whole.specs[name].shape)}"
        for name, spec in form.specs.items()
        if spec.shape != whole.specs[name].shape
    ]
    if other:
        raise RecipeError(f"{part.ref} and {whole.ref} differ in shapes: {first_few(other)}")
    return form


def _place(name: str, names: Iterable[str], part: str, whole: str) -> str:
    """Return the name with the longest end in common; the language model's, if there are more."""
    layer, pieces = layer_of(name), name.split(".")
    alike = [n for n in names if (layer_of(n) is None) == (layer is None)]
    for i in range(len(pieces) - 1):
        end = ".".join(pieces[i:])
        found = [n for n in alike if n == end or n.endswith(f".{end}")]
        if len(found) > 1:
            found = [n for n in found if belongs(n, "text")]
        if len(found) == 1:
            return found[0]
        if found or (layer and not layer_of(end)):
            break
    raise RecipeError(f"{whole} has no place for {name} of {part}")


def _check_head(part: Checkpoint, whole: Checkpoint, form: LinearForm, rest: Iterable[str]) -> None:
    """Refuse a part whose head is its embeddings, for a model that has a head of its own."""
    config = part.architecture.config if part.architecture else {}
    heads = [name for name in rest if name.endswith("lm_head.weight")]
    embedded = any("embed_tokens" in name for name in form.specs)
    if heads and embedded and config.get("tie_word_embeddings"):
        raise RecipeError(
            f"the head of {part.ref} is its embeddings, and {whole.ref} has {heads[0]} apart"
        )
