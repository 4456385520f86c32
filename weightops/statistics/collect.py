"""Collect a statistic: run a model on a task or a text, and keep what its maps or gradients see."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from weightops.algebra.devices import pick_device
from weightops.algebra.kernels import has_nonfinite
from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.clip_names import mappings
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.checkpoints.renaming import rename_to_match
from weightops.errors import CheckpointError, NonfiniteError, OptionError, TaskError
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.linearized import LinearizedModel
from weightops.evaluation.perplexity import token_blocks
from weightops.statistics.fishers import Labels, diagonal_fisher
from weightops.statistics.recording import Gram, GramRecorder
from weightops.statistics.statistic import Kind, statistic_source
from weightops.support.arguments import check_arguments
from weightops.support.lazy import nn, np, torch, without_gradients
from weightops.support.progress import Bar, progress
from weightops.support.ranges import Range
from weightops.support.text import first_few, portable
from weightops.tasks.table import TaskLike, as_task
from weightops.tasks.task import Task

Batch: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""Inputs of a model, and their labels: of images, or of tokens."""


class Run(NamedTuple):
    """A model and the data that it is run on.

    Attributes:
        module: the module, whose parameters are meant.
        logits: gives the logits of inputs, shape ``(n, classes)`` or ``(n, tokens, vocabulary)``.
        batches: gives the batches of a size.
        size: the number of images or blocks of text.
        data: what they are, for the record.
        bar: the bar of a longer run that it is part of.
    """

    module: nn.Module
    logits: Callable[[torch.Tensor], torch.Tensor]
    batches: Callable[[int], Iterator[Batch]]
    size: int
    data: Mapping[str, Any]
    bar: Bar | None = None

    def progress(self, what: str) -> AbstractContextManager[Bar]:
        """Show how many images or blocks are done."""
        unit = "blocks" if "text" in self.data else "images"
        return nullcontext(self.bar) if self.bar else progress(self.size, what, unit)


def collect(
    model: CheckpointLike,
    task: TaskLike | None = None,
    kind: Kind = "gram",
    *,
    text: str | Path | None = None,
    images: Annotated[int, Range(min=1)] = 256,
    split: Literal["train", "validation"] = "train",
    labels: Labels = "model",
    batch_size: Annotated[int, Range(min=1)] = 32,
    seed: Annotated[int, Range(min=0)] = 0,
    device: str = "auto",
    start: Annotated[int, Range(min=0)] = 0,
    built: ImageModel | None = None,
    bar: Bar | None = None,
) -> Checkpoint:
    """Run a model on data, and return a statistic of it: tensors by the names of its weights.

    A gram is the mean of ``x x'`` over the inputs x of each linear map, shape ``(d, d)``, which
    RegMean needs (arXiv 2212.09849). A fisher is the mean of the squared gradients of
    ``log p(y|x)``, of each parameter's shape, which Fisher merging needs (arXiv 2111.09832).

    Args:
        model: a CLIP model, an image classifier, or with a text a language model.
        task: the task whose images to use.
        kind: gram or fisher.
        text: for language models, a text in UTF-8 instead of a task.
        images: the most images, or blocks of text, to use: the first ones in a fixed random order.
        split: the images to use: train or validation.
        labels: for a fisher, where y comes from: model, from its own predictions (all classes, or
            one draw for more than 16); true, from the data (the empirical Fisher).
        batch_size: images at a time, for a gram.
        seed: seed of the draws of a fisher.
        device: where to compute: auto, cpu, cuda, cuda:1, ...
        start: how many of the images to leave out, as another run has seen them.
        built: the model, if it has been built for another run.
        bar: the bar of a longer run, of which this is a part.

    Returns:
        The statistic, in memory. Its record, which `Checkpoint.save` writes, too, names the model
        and the data.

    Raises:
        OptionError: for neither or both of a task and a text.
        TaskError: if there are no such images.
        NonfiniteError: if the model gives NaN or Inf.

    >>> grams = collect("embedded", "mnist", images=4)
    >>> grams["visual.proj"].shape
    torch.Size([192, 192])
    """
    check_arguments(
        collect,
        kind=kind,
        images=images,
        split=split,
        labels=labels,
        batch_size=batch_size,
        seed=seed,
    )
    checkpoint = open_checkpoint(model)
    if (task is None) == (text is None):
        raise OptionError(
            "a statistic is of a task, or of a text for a language model", hint="task="
        )
    if text is None:
        image_model = built or ImageModel.open(checkpoint, device, precision="float32")
        run = on_images(image_model, as_task(task or ""), split, images, start)
    else:
        run = on_text(checkpoint, text, images, device)
    run = run._replace(bar=bar)
    record = {
        "kind": kind,
        **run.data,
        "count": run.size,
        "model": {"ref": portable(checkpoint.ref), "fingerprint": checkpoint.fingerprint},
    }
    with in_single_precision(run.module):
        if kind == "fisher":
            record |= {"labels": labels, "seed": seed}
            tensors = _fisher(run, checkpoint, labels, seed + start)
        else:
            found = in_names_of(checkpoint, grams_of(run, batch_size), run.module)
            tensors = {name: gram.tensor for name, gram in found.items()}
            record |= {
                "input_first": [name for name, gram in found.items() if gram.input_first],
                "rows": {name: gram.rows for name, gram in found.items()},
            }
    record["tensors"] = len(tensors)
    broken = [name for name, tensor in tensors.items() if has_nonfinite(tensor)]
    if broken:
        raise NonfiniteError(
            f"the {kind} statistic of {checkpoint.ref} holds NaN or Inf at {first_few(broken)}",
            hint="check the weights, and the images",
        )
    if not tensors:
        raise CheckpointError(f"{checkpoint.ref} has no weights that the data pass through")
    source = statistic_source(tensors, f"{kind} statistic of {checkpoint.ref}", record)
    return Checkpoint(LinearForm.of(source))


def on_images(image_model: ImageModel, task: Task, split: str, images: int, start: int = 0) -> Run:
    """Return a run of a model on the first images of a split in a fixed random order.

    With a ``start``, so many of them are left out.

    Raises:
        TaskError: if there are none, or the model has no head for the task.
        CheckpointError: if the model is linearised.
    """
    if isinstance(image_model, LinearizedModel):
        raise CheckpointError(
            f"{image_model.base.ref} is linearised at {image_model.at.ref}: no statistic is of it",
            hint="methods without statistics merge it",
        )
    module = image_model.module.eval()
    head = image_model.zero_shot_head(task)
    pixels = image_model.pixels(task, split)
    order = np.random.default_rng(0).permutation(len(pixels))[start:images]
    if not len(order):
        raise TaskError(f"{task.name} has no images for {split}")

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        dtype = next(module.parameters()).dtype
        return image_model.encode_image(inputs.to(dtype)) @ head.T

    def batches(size: int) -> Iterator[Batch]:
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            yield pixels.batch(chosen), pixels.labels[torch.from_numpy(chosen)]

    data = {"task": task.name, "split": split, **task.reading(split)}
    return Run(module, logits, batches, len(order), data)


def on_text(checkpoint: Checkpoint, text: str | Path, blocks: int, device: str) -> Run:
    """Return a run of a language model on the first blocks of a text.

    Raises:
        CheckpointError: if it isn't a language model with a tokenizer.
        TaskError: if the text is too short.
    """
    tokens = token_blocks(checkpoint, text)[:blocks].to(pick_device(device))
    module = checkpoint.model().to(tokens.device)

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        given: torch.Tensor = module(input_ids=inputs).logits
        return given[:, :-1].float()

    def batches(size: int) -> Iterator[Batch]:
        for batch in tokens.split(size):  # type: ignore[no-untyped-call]
            yield batch, batch[:, 1:]

    return Run(module, logits, batches, len(tokens), {"text": portable(str(text))})


@contextmanager
def in_single_precision(module: nn.Module) -> Iterator[None]:
    """Run a module of half precision in float32, and without the paths that fuse several maps."""
    dtype = next(module.parameters()).dtype
    fused = torch.backends.mha.get_fastpath_enabled()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    if dtype.itemsize < 4:
        module.float()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.set_float32_matmul_precision(precision)
        module.to(dtype)


def _fisher(run: Run, checkpoint: Checkpoint, labels: Labels, seed: int) -> dict[str, torch.Tensor]:
    """Return the Fisher information in the names of a checkpoint."""

    def examples() -> Iterator[tuple[Callable[[], torch.Tensor], torch.Tensor]]:
        with run.progress("fisher") as bar:
            for inputs, truth in run.batches(1):
                yield partial(_flat_logits, run, inputs), truth.flatten()
                bar.update()

    found = diagonal_fisher(run.module, examples(), labels=labels, seed=seed)
    form = LinearForm.of(MemorySource(found, "fisher"))
    renamed = Checkpoint(rename_to_match(form, checkpoint.form))
    return {name: renamed[name] for name in renamed if name in checkpoint.specs}


def _flat_logits(run: Run, inputs: torch.Tensor) -> torch.Tensor:
    return run.logits(inputs).flatten(0, -2)


@without_gradients
def grams_of(run: Run, batch_size: int, only: Collection[str] | None = None) -> dict[str, Gram]:
    """Return the Gram matrices of a module's weights, or of some of them."""
    recorder = GramRecorder(run.module, only)
    with run.progress("gram") as bar:
        for inputs, _ in run.batches(batch_size):
            with recorder:
                run.logits(inputs)
            bar.update(len(inputs))
    return recorder.grams()


def in_names_of(
    checkpoint: Checkpoint, grams: Mapping[str, Gram], module: nn.Module
) -> dict[str, Gram]:
    """Return Gram matrices by the names of a checkpoint, whose weights may be parts of others."""
    specs = MemorySource(module.state_dict(), "the model").specs
    owners = tied_names(checkpoint.form)
    if set(specs) <= set(checkpoint.specs) or not (
        mapped := mappings(specs, checkpoint.specs, partly=True)
    ):
        named = {name: gram for name, gram in grams.items() if name in checkpoint.specs}
    else:
        named = {}
        for name, (kind, names, index, _) in mapped.items():
            gram = grams.get(names[0])
            if gram is None or name not in checkpoint.specs:
                continue
            if kind == "part" and gram.tensor.dim() == 3:
                gram = gram._replace(tensor=gram.tensor[index])
            elif kind == "stack" and any(grams[old].tensor is not gram.tensor for old in names):
                gram = gram._replace(tensor=torch.stack([grams[old].tensor for old in names]))
            named[name] = gram._replace(input_first=gram.input_first != (kind == "transpose"))
    return (
        named
        | {
            alias: named[name]
            for alias, name in owners.items()
            if name in named and alias not in named
        }
        | {
            name: named[alias]
            for alias, name in owners.items()
            if alias in named and name not in named
        }
    )
