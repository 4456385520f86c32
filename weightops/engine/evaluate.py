"""Evaluate a linear form chunk by chunk over a pool of threads."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import RLock, local
from typing import Literal, TypeVar

import torch
from tqdm import tqdm

from weightops.algebra.dtypes import accumulator
from weightops.algebra.kernels import Term, combine, has_nonfinite, widen
from weightops.algebra.linear_form import LinearForm, describe, tied_names
from weightops.algebra.scratch import Scratch, Slot
from weightops.algebra.source import Source, cut, flattened
from weightops.engine.plan import Segment, Step, _anchored, plan, size, units
from weightops.errors import MismatchError, NonfiniteError
from weightops.support.text import first_few

log = logging.getLogger("weightops")
T = TypeVar("T")

ALONE = 1 << 24
"""Elements at a time where torch's own threads share them."""


OnNonfinite = Literal["ignore", "warn", "error"]


Reader = Callable[[int, int, Sequence[torch.Tensor]], None]
"""Writes elements ``start`` to ``stop`` of steps of one tensor to flat tensors, one for each step, on these tensors' device."""


def _expanded(step: Step, scratch: Scratch) -> Step:
    """The step with sources that are combinations of others replaced by these."""
    parts = {
        s: s.combination(step.name, scratch.nested(s)) if s.computed else None
        for s in step.coefficients
    }
    if not any(part is not None for part in parts.values()):
        return step
    totals: dict[Source, float] = {}
    for source, coefficient in step.coefficients.items():
        part = parts[source]
        for inner, value in ({source: 1.0} if part is None else part).items():
            totals[inner] = totals.get(inner, 0.0) + coefficient * value
    whole = math.fsum(value for source, value in totals.items() if source.space == "weights")
    if (
        step.keep_anchor and abs(whole - 1) > 1e-12
    ):  # not an average: there is nothing to be relative to
        return Step(step.name, step.numel, totals, None, False)
    return _anchored(step.name, step.numel, totals, step.anchor, step.keep_anchor)


def reader(steps: Sequence[Step], scratch: Scratch) -> Reader:
    """A reader of some steps of one tensor, which opens and widens what several of them take part in once."""
    steps = [_expanded(step, scratch) for step in steps]
    used = Counter(source for step in steps for source in step.coefficients)
    opened = {
        source: source.open(steps[0].name, scratch.nested(source) if source.computed else scratch)
        for source in used
    }
    shared = (
        []
        if any(step.keep_anchor for step in steps)
        else [source for source, n in used.items() if n > 1]
    )
    others = [
        [
            (c, source, source.space == "weights")
            for source, c in step.coefficients.items()
            if source is not step.anchor
        ]
        for step in steps
    ]

    def write(start: int, stop: int, rows: Sequence[torch.Tensor]) -> None:
        parts = {
            source: scratch.to_device(part(start, stop), rows[0].device)
            for source, part in opened.items()
        }
        for i, source in enumerate(shared):
            parts[source] = widen(parts[source], accumulator(rows[0].dtype), scratch, Slot.SHARED, index=i)
        for step, terms, row in zip(steps, others, rows, strict=True):
            anchor = None if step.anchor is None else parts[step.anchor]
            combine(
                row,
                anchor,
                [Term(c, parts[s], relative) for c, s, relative in terms],
                step.keep_anchor,
                scratch,
            )

    return write


def through(
    read: Reader, dtype: torch.dtype, scratch: Scratch
) -> Callable[[int, int], torch.Tensor]:
    """What a reader writes, in a buffer on the device of ``scratch``."""

    def part(start: int, stop: int) -> torch.Tensor:
        out = scratch.get(Slot.RESULT, stop - start, dtype)
        read(start, stop, [out])
        return out

    return part


def evaluate(
    unit: Iterable[Segment], target: Callable[[Segment], torch.Tensor], scratch: Scratch
) -> Iterator[tuple[Segment, torch.Tensor]]:
    """Fill the (flat) target of each segment of a unit in turn, on its device."""
    step = read = None
    for segment in unit:
        if read is None or segment.step is not step:
            step, read = segment.step, reader([segment.step], scratch)
        out = target(segment)
        read(segment.start, segment.stop, [out])
        yield segment, out


def parallel(
    work: Sequence[list[Segment]],
    do: Callable[[list[Segment], Scratch], T],
    *,
    threads: int | None = None,
    width: int = 4,
    device: torch.device | None = None,
) -> Iterator[T]:
    """``do`` over units, in order, on a device, with a progress bar (``width`` bytes an element) once it has taken a second.

    With one thread it runs in the caller's, where torch may use its own; of several each computes alone.
    """
    inference = torch.is_inference_mode_enabled()  # which threads don't inherit
    precision = torch.get_float32_matmul_precision()
    before = torch.get_num_threads()
    buffers = local()

    def one(unit: list[Segment]) -> T:
        if not hasattr(buffers, "scratch"):
            buffers.scratch = Scratch(device or "cpu")
        with torch.inference_mode(inference):
            return do(unit, buffers.scratch)

    threads = min(threads or before, len(work))
    pool = (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        if threads > 1
        else None
    )
    total = width * sum(map(size, work))
    torch.set_float32_matmul_precision(
        "highest"
    )  # whatever suits the training of the caller's models
    try:
        with tqdm(total=total, unit="B", unit_scale=True, delay=1, leave=False) as bar:
            for unit, result in zip(
                work, pool.map(one, work) if pool else map(one, work), strict=True
            ):
                bar.update(width * size(unit))
                yield result
    finally:
        torch.set_float32_matmul_precision(precision)
        if pool:
            pool.shutdown(cancel_futures=True)  # on an error or ^C, what hasn't begun isn't begun
            torch.set_num_threads(before)


@contextmanager
def alone() -> Iterator[None]:
    """One thread at a time, which may use all that torch has: for what holds whole tensors."""
    with _ALONE:
        before = torch.get_num_threads()
        torch.set_num_threads(_THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(before)


_ALONE, _THREADS = RLock(), torch.get_num_threads()


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
        threads: how many threads; by default what suits the form.
        on_nonfinite: what to do about NaN and Inf in the result.

    Raises:
        NonfiniteError: naming the tensors, if asked for.
    """
    steps = plan(form, _distinct(form, out))
    staged = {
        s.name: torch.empty_like(out[s.name], memory_format=torch.contiguous_format)
        for s in steps
        if not out[s.name].is_contiguous()
    }

    def target(segment: Segment) -> torch.Tensor:
        name = segment.step.name
        return cut(flattened(staged.get(name, out[name])), segment.start, segment.stop)

    def do(unit: list[Segment], scratch: Scratch) -> list[str]:
        filled = evaluate(unit, target, scratch)
        return [s.step.name for s, out in filled if on_nonfinite != "ignore" and has_nonfinite(out)]

    # Plain arithmetic is best left to torch's own threads; what is computed by methods is not, nor what is sent elsewhere.
    computed = any(source.computed for step in steps for source in step.coefficients)
    devices = {out[step.name].device for step in steps}
    if threads is None and not computed and all(device.type == "cpu" for device in devices):
        work, threads = units(steps, ALONE), 1
    else:
        work = units(steps)
    found = [
        name
        for bad in parallel(
            work, do, threads=threads, device=devices.pop() if len(devices) == 1 else None
        )
        for name in bad
    ]
    for name, tensor in staged.items():
        out[name].detach().copy_(tensor)
    report_nonfinite(found, on_nonfinite)


def _distinct(form: LinearForm, out: Mapping[str, torch.Tensor]) -> list[str]:
    """The names to compute: of several that share one target's memory, the first, if the form has them tied.

    Raises:
        MismatchError: if it hasn't: one memory can't hold two values.
    """
    tied = tied_names(form)
    owners: dict[tuple[object, ...], str] = {}
    names = []
    for name in form.specs:
        if name not in out:
            continue
        tensor = out[name]
        place = (
            (tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride())
            if tensor.numel()
            else (name,)
        )
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
        message = (
            f"NaN or Inf in {len(names)} tensor{'s' if len(names) > 1 else ''}: {first_few(names)}"
        )
        if how == "error":
            raise NonfiniteError(message + "; check the inputs, or go on with on_nonfinite='warn'")
        log.warning(message)


def allocate(
    form: LinearForm, like: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Tensors to fill for all of a form's names, on the devices of ``like`` or on CPU; tied names share one."""
    tied = tied_names(form)
    out: dict[str, torch.Tensor] = {}
    cpu = torch.device("cpu")
    with torch.inference_mode(False):
        for name, spec in form.specs.items():
            if name not in tied:
                device = like[name].device if like is not None and name in like else cpu
                out[name] = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    return {name: out[tied.get(name, name)] for name in form.specs}
