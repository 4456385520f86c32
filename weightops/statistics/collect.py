"""Collect a statistic: run a model on a task or a text, and keep what its maps or gradients see."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from weightops.algebra.kernels import has_nonfinite
from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.clip_names import mappings
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.opening import CheckpointLike, open_checkpoint
from weightops.checkpoints.renaming import rename_to_match
from weightops.errors import CheckpointError, NonfiniteError, OptionError
from weightops.statistics.fishers import Labels, diagonal_fisher
from weightops.statistics.recording import Gram, GramRecorder
from weightops.statistics.runs import Run, run_on
from weightops.statistics.statistic import Kind, statistic_source
from weightops.support.arguments import check_arguments
from weightops.support.lazy import nn, torch, without_gradients
from weightops.support.ranges import Range
from weightops.support.text import first_few, portable
from weightops.tasks.table import TaskLike


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

    Returns:
        The statistic, in memory. Its record, which `Checkpoint.save` writes, too, names the model
        and the data.

    Raises:
        OptionError: for neither or both of a task and a text, or labels of a gram.
        TaskError: if there are no such images.
        NonfiniteError: if the model gives NaN or Inf.

    >>> grams = collect("embedded", "mnist", images=4)
    >>> grams["visual.proj"].shape
    torch.Size([192, 192])
    """
    options: dict[str, Any] = {"labels": labels, "batch_size": batch_size, "seed": seed}
    check_request(kind, images=images, split=split, **options)
    checkpoint = open_checkpoint(model)
    run = run_on(checkpoint, task, text, split, images, device)
    return statistic_of(run, checkpoint, kind, **options)


def check_request(kind: Kind, *, labels: Labels = "model", **others: Any) -> None:
    """Refuse arguments of `collect` that are out of range, or don't go together."""
    check_arguments(collect, kind=kind, labels=labels, **others)
    if kind == "gram" and labels != "model":
        raise OptionError(
            f"a gram is of inputs, which have no labels; labels is {labels!r}",
            hint="kind='fisher', or leave out labels",
        )


def statistic_of(
    run: Run,
    checkpoint: Checkpoint,
    kind: Kind,
    *,
    labels: Labels = "model",
    batch_size: int = 32,
    seed: int = 0,
) -> Checkpoint:
    """Return the statistic that a run gives of a checkpoint; see `collect`."""
    record = {
        "kind": kind,
        **run.data,
        "count": len(run.chosen),
        "model": {"ref": portable(checkpoint.ref), "fingerprint": checkpoint.fingerprint},
    }
    with in_single_precision(run.module):
        if kind == "fisher":
            record |= {"labels": labels, "seed": seed}
            tensors = _fisher(run, checkpoint, labels, seed + run.chosen.start)
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
