"""The files that a checkpoint is written to: weights in one, shards or parts; card and recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.provenance import provenance
from weightops.checkpoints.formats.safetensors import MODEL_SPEC, RECORD
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.recorded_recipe import recipe_of
from weightops.engine.layout import FileLayout, layout
from weightops.errors import OptionError
from weightops.hub.cards import CardFacts, merge_card
from weightops.support.json_files import write_json
from weightops.support.result_files import CARD, RECIPE
from weightops.support.yaml_files import yaml_text

_OTHER_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def is_single_file(path: Path, max_shard_size: int | None) -> bool:
    """Return whether an output is one file, not a folder.

    Raises:
        OptionError: if the path has the suffix of another format, or shards were asked for.
    """
    if path.suffix in _OTHER_SUFFIXES:
        raise OptionError(
            f"{path} has the suffix of another format",
            hint="weightops writes .safetensors files, and folders",
        )
    single = path.suffix == ".safetensors"
    if single and max_shard_size is not None:
        raise OptionError(f"{path} is one file", hint="give a folder to write shards to")
    return single


def folder_layout(
    form: LinearForm,
    architecture: Architecture | None,
    metadata: Mapping[str, str],
    max_shard_size: int | None,
) -> list[FileLayout]:
    """Lay a form out in the files that a folder of an architecture has.

    Args:
        form: the form.
        architecture: the architecture; None for weights alone.
        metadata: the metadata of each file.
        max_shard_size: the most bytes of tensors in one file.
    """
    parts = architecture.parts if architecture else {}
    # A model that ties nothing takes a name without a tensor for one that is missing.
    untied = architecture is not None and architecture.config.get("tie_word_embeddings") is False
    names: dict[str, list[str]] = {"": [], **{prefix: [] for prefix in parts}}
    for name in form.specs:
        names[max((p for p in names if name.startswith(p)), key=len)].append(name)
    main = architecture.weights_file if architecture else "model.safetensors"
    files: list[FileLayout] = []
    for prefix, file in {"": main, **parts}.items():
        if names[prefix]:
            limit = max_shard_size if architecture is None or architecture.shards(prefix) else None
            part = form.part(names[prefix])
            files += layout(
                part, file, metadata, max_shard_size=limit, prefix=prefix, aliases=not untied
            )
    return files


def file_metadata(form: LinearForm, recipe: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the metadata of each file: provenance, recipe, and the ModelSpec of the inputs."""
    made_from = {**({"recipe": recipe} if recipe else {}), **provenance(form)}
    return {"format": "pt", **_model_spec(form), RECORD: json.dumps(made_from)}


def _model_spec(form: LinearForm) -> dict[str, str]:
    """Return what the first input with a ModelSpec says of the model, but for its file's hash."""
    for leaf in form.leaves:
        told = {key: text for key, text in leaf.metadata.items() if key.startswith(MODEL_SPEC)}
        told.pop(f"{MODEL_SPEC}hash_sha256", None)
        if told:
            return told
    return {}


def folders_of(form: LinearForm) -> dict[str, Path]:
    """Return the ref of each place that a form reads -> its folder."""
    return {leaf.ref: leaf.files[0].path.parent for leaf in form.leaves if leaf.files}


def write_records(
    folder: Path, model: Any, *, device: str, name: str, facts: CardFacts | None = None
) -> None:
    """Write what a folder says of its weights: card, recipe, and other records as JSON.

    Args:
        folder: the folder.
        model: the `Checkpoint` that is written.
        device: where the weights are computed.
        name: the name that the folder will have.
        facts: the library that the folder loads in; by default that of the model's architecture.
    """
    recipe, card = model.recipe, model.card
    own = model.architecture.card_facts if model.architecture else CardFacts()
    facts = facts or own
    if recipe is None and all(leaf.files for leaf in model.form.leaves):
        recipe = recipe_of(provenance(model.form))
    if recipe and "verb" not in recipe:
        text = yaml_text(dict(recipe))
        (folder / RECIPE).write_text(text, encoding="utf-8")
        if card is None and facts.pipeline_tag != "other":
            models = [entry["model"] for entry in recipe["models"]]
            options = recipe.get("options")
            card = merge_card(recipe["method"], models, recipe.get("base"), text, options)
    if card:
        text = card.text(facts, device, name=name, inputs=folders_of(model.form))
        (folder / CARD).write_text(text, encoding="utf-8")
    for file, content in model.records.items():
        write_json(folder / file, content)
