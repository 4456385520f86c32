"""Evaluate a linear form chunk by chunk over a pool of threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import local
from typing import Literal, TypeVar

import torch
from tqdm import tqdm

from weightops.errors import MismatchError, NonfiniteError
from weightops.expression import LinearForm, Source, describe, ties
from weightops.kernels import CHUNK, Scratch, Term, combine, has_nonfinite
from weightops.keys import some

log = logging.getLogger("weightops")

SEGMENT = 2 * CHUNK
"""Elements that one thread takes at a time. A fixed partition: results don't depend on the number of threads."""

OnNonfinite = Literal["ignore", "warn", "error"]
T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """What to compute at one tensor: the anchor, and each source's coefficient."""

    name: str
    numel: int
    coefficients: Mapping[Source, float]
    anchor: Source | None
    keep_anchor: bool


@dataclass(frozen=True)
class Segment:
    """Elements ``start`` to ``stop`` of one tensor."""

    step: Step
    start: int
    stop: int


def plan(form: LinearForm, names: Iterable[str] | None = None) -> list[Step]:
    """The steps that evaluate a form at some of its names, or at all."""
    return [_step(form, name) for name in (form.specs if names is None else names)]


def _step(form: LinearForm, name: str) -> Step:
    coefficients = form.coefficients(name)
    weights = [source for source in coefficients if source.space == "weights"]
    # The anchor is the base where it takes part, else what is subtracted most.
    anchor = form.base if form.base in coefficients else min(weights, key=lambda s: coefficients[s], default=None)
    return Step(name, form.specs[name].numel, coefficients, anchor, form.space == "weights")


def segments(steps: Iterable[Step]) -> Iterator[list[Segment]]:
    """Work of about `SEGMENT` elements each: a part of a large tensor, or several small ones."""
    batch: list[Segment] = []
    size = 0
    for step in steps:
        length = max(step.numel, 1) if any(source.whole for source in step.coefficients) else SEGMENT
        for start in range(0, max(step.numel, 1), length):
            stop = min(start + length, step.numel)
            batch.append(Segment(step, start, stop))
            size += stop - start
            if size >= SEGMENT:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def reader(step: Step, scratch: Scratch) -> Callable[[int, int, torch.Tensor], None]:
    """A function that writes elements ``start`` to ``stop`` of a step to a flat tensor, on that tensor's device."""
    flat = {source: source.read(step.name).detach().reshape(-1) for source in step.coefficients}
    others = [
        (source, c, source.space == "weights") for source, c in step.coefficients.items() if source is not step.anchor
    ]

    def write(start: int, stop: int, out: torch.Tensor) -> None:
        def part(source: Source) -> torch.Tensor:
            return flat[source][start:stop].to(out.device, non_blocking=out.device.type != "cpu")

        anchor = part(step.anchor) if step.anchor is not None else None
        terms = [Term(coefficient, part(source), relative) for source, coefficient, relative in others]
        combine(out, anchor, terms, step.keep_anchor, scratch)

    return write


def chunks(segment: Segment, device: torch.device) -> Iterator[tuple[int, int]]:
    """Where to cut a segment: into pieces that stay in a core's cache, or not at all on other devices."""
    size = CHUNK if device.type == "cpu" else SEGMENT
    for start in range(segment.start, segment.stop, size):
        yield start, min(start + size, segment.stop)


def evaluate(segment: Segment, out: torch.Tensor, scratch: Scratch) -> None:
    """Write a segment to ``out`` (flat, as long as the segment), on the device of ``out``."""
    read = reader(segment.step, scratch)
    for start, stop in chunks(segment, out.device):
        read(start, stop, out[start - segment.start : stop - segment.start])


def parallel(
    work: Iterable[list[Segment]],
    do: Callable[[list[Segment], Scratch], T],
    *,
    total: int = 0,
    threads: int | None = None,
) -> Iterator[T]:
    """``do`` over the work in threads, in order, with a progress bar once it has taken a second."""
    buffers = local()
    inference = torch.is_inference_mode_enabled()  # which threads don't inherit

    def one(batch: list[Segment]) -> T:
        if not hasattr(buffers, "scratch"):
            buffers.scratch = Scratch()
        with torch.inference_mode(inference):
            return do(batch, buffers.scratch)

    batches = list(work)
    if len(batches) == 1:
        yield one(batches[0])
        return
    pool = ThreadPoolExecutor(threads or torch.get_num_threads())
    try:
        with tqdm(total=total, unit="B", unit_scale=True, delay=1, leave=False) as bar:
            for batch, result in zip(batches, pool.map(one, batches), strict=True):
                bar.update(sum(s.stop - s.start for s in batch) * 4)
                yield result
    finally:
        pool.shutdown(cancel_futures=True)  # on an error or ^C, what hasn't begun isn't begun


def materialize(
    form: LinearForm,
    out: Mapping[str, torch.Tensor],
    *,
    threads: int | None = None,
    on_nonfinite: OnNonfinite = "ignore",
) -> None:
    """Evaluate a form into given tensors, on whatever device and in whatever float dtype they are.

    Args:
        form: what to evaluate.
        out: name -> tensor to fill; names that it lacks aren't computed.
        threads: how many threads; torch's number by default.
        on_nonfinite: what to do about NaN and Inf in the result.

    Raises:
        NonfiniteError: naming the tensors, if asked for.
    """
    steps = plan(form, _distinct(form, out))
    staged = {
        s.name: out[s.name]
        if out[s.name].is_contiguous()
        else torch.empty_like(out[s.name], memory_format=torch.contiguous_format)
        for s in steps
    }
    flat = {name: tensor.detach().view(-1) for name, tensor in staged.items()}

    def do(batch: list[Segment], scratch: Scratch) -> list[str]:
        bad = []
        for segment in batch:
            target = flat[segment.step.name][segment.start : segment.stop]
            evaluate(segment, target, scratch)
            if on_nonfinite != "ignore" and has_nonfinite(target):
                bad.append(segment.step.name)
        return bad

    on_cpu = all(tensor.device.type == "cpu" for tensor in flat.values())
    total = sum(step.numel for step in steps) * 4
    found = [
        name for bad in parallel(segments(steps), do, total=total, threads=threads if on_cpu else 1) for name in bad
    ]
    for name, tensor in staged.items():
        if tensor is not out[name]:
            out[name].detach().copy_(tensor)
    report_nonfinite(found, on_nonfinite)


def _distinct(form: LinearForm, out: Mapping[str, torch.Tensor]) -> list[str]:
    """The names to compute: of several that share one target's memory, the first, if the form has them tied.

    Raises:
        MismatchError: if it hasn't: one memory can't hold two values.
    """
    tied = ties(form)
    owners: dict[tuple[object, ...], str] = {}
    names = []
    for name in form.specs:
        if name not in out:
            continue
        tensor = out[name]
        place = (tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        owner = owners.setdefault(place, name)
        if owner == name:
            names.append(name)
        elif tied.get(name, name) != tied.get(owner, owner):
            raise MismatchError(
                f"{owner} and {name} are one tensor in the target and two in {describe(form)}; edit both alike, or untie them"
            )
    return names


def report_nonfinite(names: Iterable[str], how: OnNonfinite) -> None:
    """Warn of tensors with NaN or Inf, or raise."""
    names = list(dict.fromkeys(names))
    if names:
        message = f"NaN or Inf in {len(names)} tensor{'s' if len(names) > 1 else ''}: {some(names)}"
        if how == "error":
            raise NonfiniteError(message + "; check the inputs, or go on with on_nonfinite='warn'")
        log.warning(message)


def allocate(form: LinearForm, like: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Tensors to fill for all of a form's names, on the devices of ``like`` or on CPU; tied names share one."""
    tied = ties(form)
    out: dict[str, torch.Tensor] = {}
    for name, spec in form.specs.items():
        if name not in tied:
            device = like[name].device if like is not None and name in like else "cpu"
            with torch.inference_mode(False):
                out[name] = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    return {name: out[tied.get(name, name)] for name in form.specs}
