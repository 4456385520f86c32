"""Gram matrices layer by layer, at the inputs that the model merged so far gives: RegMean++."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.names import PerTensor, depths, layer_of
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.matching import as_open_clip
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.errors import OptionError
from weightops.evaluation.image_model import ImageModel
from weightops.merging.merge import merge
from weightops.statistics.collect import grams_of, in_names_of, in_single_precision
from weightops.statistics.recording import Gram
from weightops.statistics.runs import Run, on_images
from weightops.statistics.statistic import statistic_source
from weightops.support.arguments import check_arguments
from weightops.support.lazy import torch
from weightops.support.ranges import Range
from weightops.tasks.table import TaskLike, as_tasks


def collect_layer_by_layer(
    models: Sequence[CheckpointLike],
    tasks: Sequence[TaskLike],
    *,
    weights: Sequence[PerTensor] | None = None,
    images: Annotated[int, Range(min=1)] = 256,
    split: Literal["train", "validation"] = "train",
    batch_size: Annotated[int, Range(min=1)] = 32,
    device: str = "auto",
    **options: Any,
) -> list[Checkpoint]:
    """Return the Gram matrices with which RegMean is RegMean++ (arXiv 2508.03121).

    One layer after another is merged by RegMean. The Gram matrices of a model's layer are taken
    with the layers before it as merged, and the layer itself as in the model: so each layer is
    merged for the inputs that it will have. A layer is what the first number in a name counts;
    embeddings come before, heads after all layers. There is a run for each layer and model, and
    one model in memory.

    Args:
        models: image models of one architecture.
        tasks: the task of each, whose images are used.
        weights: the weights of the merge.
        images: the most images of each task.
        split: the images to use: train or validation.
        batch_size: images at a time.
        device: where to compute.
        options: the options of `regmean`.

    Returns:
        For each model its statistic, for ``statistics=`` of `merge`.

    Raises:
        OptionError: if there isn't one task for each model, or for a value that can't be.

    >>> grams = collect_layer_by_layer(["embedded"] * 2, ["mnist", "digits"], images=2)
    >>> merged = merge(["embedded"] * 2, "regmean", statistics=[{"gram": g} for g in grams])
    """
    check_arguments(collect_layer_by_layer, images=images, split=split, batch_size=batch_size)
    listed = as_tasks(tasks)
    if len(listed) != len(models):
        raise OptionError(f"there are {len(models)} models, and tasks for {len(listed)}")
    given = [open_checkpoint(model) for model in models]
    opened = [as_open_clip(checkpoint) for checkpoint in given]
    image_model = ImageModel.open(opened[0], device, precision="float32")
    runs = [on_images(image_model, task, split, images) for task in listed]
    module, done = image_model.module, dict[str, torch.Tensor]()
    found: list[dict[str, Gram]] = [{} for _ in models]
    with in_single_precision(module):
        for names in _layers(image_model):
            parts = [{name: checkpoint[name] for name in names} for checkpoint in opened]
            own = []
            for checkpoint, run in zip(opened, runs, strict=True):
                checkpoint.load_into(module)
                module.load_state_dict(done, strict=False)
                own.append(grams_of(run, batch_size, names))
            done |= _merged(parts, own, weights, options)
            for grams, new in zip(found, own, strict=True):
                grams.update(new)
    return [
        _statistic(checkpoint, in_names_of(checkpoint, grams, module), run, given)
        for checkpoint, grams, run in zip(given, found, runs, strict=True)
    ]


def _layers(model: ImageModel) -> list[list[str]]:
    """Return the names of the parameters that images pass, layer by layer."""
    part, prefix = model.trained
    named = (f"{prefix}{name}" for name, _ in part.named_parameters())
    names = [name for name in named if name in model.base.specs]
    groups: dict[float, list[str]] = {}
    for name, depth in depths(names).items():
        layer = layer_of(name)
        place = layer.number if layer else (math.inf if depth else -math.inf)
        groups.setdefault(place, []).append(name)
    return [groups[place] for place in sorted(groups)]


def _merged(
    parts: Sequence[Mapping[str, torch.Tensor]],
    grams: Sequence[Mapping[str, Gram]],
    weights: Sequence[PerTensor] | None,
    options: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """Merge one layer; without linear maps, by the average."""
    if not grams[0]:
        return merge(parts, "linear", weights=weights).state_dict()
    statistics = [{"gram": _checkpoint(own, "a layer", {})} for own in grams]
    merged: Checkpoint = merge(parts, "regmean", weights=weights, statistics=statistics, **options)
    return merged.state_dict()


def _checkpoint(grams: Mapping[str, Gram], ref: str, record: Mapping[str, Any]) -> Checkpoint:
    tensors = {name: gram.tensor for name, gram in grams.items()}
    first = [name for name, gram in grams.items() if gram.input_first]
    made = {"kind": "gram", **record, "input_first": first}
    return Checkpoint(LinearForm.of(statistic_source(tensors, ref, made)))


def _statistic(
    model: Checkpoint, grams: Mapping[str, Gram], run: Run, models: Sequence[Checkpoint]
) -> Checkpoint:
    """Return the statistic of one model, which names all models of the merge."""
    record = {
        **run.data,
        "count": len(run.chosen),
        "model": {"ref": model.ref, "fingerprint": model.fingerprint},
        "merged_before": [other.fingerprint for other in models],
    }
    return _checkpoint(grams, f"gram statistic of {model.ref}, layer by layer", record)
