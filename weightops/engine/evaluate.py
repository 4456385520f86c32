"""Evaluate planned steps, segment by segment, into tensors.

A reader opens the sources that the steps of one tensor use, each source once, and combines their
elements. `evaluate` runs readers over a unit of the plan, on whichever thread has taken the unit.
`materialize` evaluates a form into tensors in memory; `write` does so into files.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from weightops.algebra.dtypes import accumulator
from weightops.algebra.kernels import CHUNK, PIECE, Term, combine, has_nonfinite, keep_equal, widen
from weightops.algebra.linear_form import LinearForm, describe, tied_names
from weightops.algebra.scratch import Scratch, Slot
from weightops.algebra.source import Source, cut, flattened
from weightops.engine.plan import Segment, Step, anchored_step, plan, units
from weightops.engine.threads import parallel
from weightops.errors import MismatchError, NonfiniteError
from weightops.support.lazy import torch
from weightops.support.text import first_few

log = logging.getLogger("weightops")

_TORCH_SEGMENT = 1 << 24
"""Elements of a segment where torch's own threads share the work."""

_VARIANCE = "running_var"
"""The end of the names of batch normalisation's variances."""

_STATISTICS = "batchnorm=TASK recomputes them, batchnorm='base' keeps the base's"

OnNonfinite = Literal["ignore", "warn", "error"]
"""The reaction to NaN and Inf in a result."""

Reader: TypeAlias = "Callable[[int, int, Sequence[torch.Tensor]], None]"
"""Computes elements ``start`` to ``stop`` of several steps of one tensor, into one flat tensor for
each step, on the device of these tensors."""


def reader(steps: Sequence[Step], scratch: Scratch) -> Reader:
    """Return a reader of steps of one tensor.

    The reader opens each source once, and widens once the tensors that several steps use.
    """
    steps = [_expanded(step, scratch) for step in steps]
    uses = Counter(source for step in steps for source in step.coefficients)
    first = steps[0]
    opened = {source: _opened(source, first, scratch.nested(source)) for source in uses}
    keeps_anchor = any(step.keep_anchor for step in steps)
    shared = [] if keeps_anchor else [source for source, count in uses.items() if count > 1]
    terms_of = [
        [
            (coefficient, source, source.space == "weights")
            for source, coefficient in step.coefficients.items()
            if source is not step.anchor
        ]
        for step in steps
    ]

    def read(start: int, stop: int, rows: Sequence[torch.Tensor]) -> None:
        device = rows[0].device
        length = PIECE * torch.get_num_threads() if device.type == "cpu" else max(stop - start, 1)
        for first in range(start, stop, length):
            last = min(first + length, stop)
            read_piece(first, last, [row[first - start : last - start] for row in rows])

    def read_piece(start: int, stop: int, rows: Sequence[torch.Tensor]) -> None:
        device, working = rows[0].device, accumulator(rows[0].dtype)
        tensors = {
            source: scratch.to_device(elements(start, stop), device)
            for source, elements in opened.items()
        }
        for i, source in enumerate(shared):
            tensors[source] = widen(tensors[source], working, scratch, Slot.SHARED, index=i)
        for step, terms, row in zip(steps, terms_of, rows, strict=True):
            anchor = None if step.anchor is None else tensors[step.anchor]
            found = [Term(c, tensors[source], relative) for c, source, relative in terms]
            combine(row, anchor, found, step.keep_anchor, scratch)
            if step.run and step.keep_anchor and anchor is not None:
                keep_equal(row, anchor, found, step.run.values())

    return read


def _opened(source: Source, step: Step, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
    """Return a function that returns elements of a source at a step."""
    if not step.run:
        return source.open(step.name, scratch)
    return lambda start, stop: source.read_run([*step.run], scratch)[start:stop]


def _expanded(step: Step, scratch: Scratch) -> Step:
    """Return the step with the sources that are combinations of others replaced by these."""
    combinations = {
        source: source.combination(step.name, scratch.nested(source)) if source.computed else None
        for source in step.coefficients
    }
    if all(combination is None for combination in combinations.values()):
        return step
    totals: dict[Source, float] = {}
    for source, coefficient in step.coefficients.items():
        combination = combinations[source]
        for inner, value in ({source: 1.0} if combination is None else combination).items():
            totals[inner] = totals.get(inner, 0.0) + coefficient * value
    weights_sum = math.fsum(value for source, value in totals.items() if source.space == "weights")
    if step.keep_anchor and abs(weights_sum - 1) > 1e-12:
        # This is not an average, so the terms can't be taken relative to an anchor.
        return Step(step.name, step.numel, totals, None, False)
    return anchored_step(step.name, step.numel, totals, step.anchor, step.keep_anchor)


def buffered(
    read: Reader, dtype: torch.dtype, scratch: Scratch
) -> Callable[[int, int], torch.Tensor]:
    """Return a function that reads elements ``start`` to ``stop`` into a buffer of ``scratch``."""

    def elements(start: int, stop: int) -> torch.Tensor:
        out = scratch.get(Slot.RESULT, stop - start, dtype)
        read(start, stop, [out])
        return out

    return elements


def stacked(
    forms: Sequence[LinearForm], name: str, dtype: torch.dtype, scratch: Scratch
) -> torch.Tensor:
    """Return the tensors of ``k`` forms at one name, shape ``(k, ...)``, on scratch's device."""
    read = reader([plan(form, [name])[0] for form in forms], scratch)
    shape = forms[0].specs[name].shape
    stack = torch.empty((len(forms), *shape), dtype=dtype, device=scratch.device)
    rows = stack.view(len(forms), -1)
    for start in range(0, rows.shape[1], CHUNK):
        stop = min(start + CHUNK, rows.shape[1])
        read(start, stop, rows[:, start:stop].unbind())
    return stack


def evaluate(
    unit: Iterable[Segment], target: Callable[[Segment], torch.Tensor], scratch: Scratch
) -> Iterator[tuple[Segment, torch.Tensor]]:
    """Fill the flat target of each segment of a unit, and yield both."""
    step = read = None
    for segment in unit:
        if read is None or segment.step is not step:
            step, read = segment.step, reader([segment.step], scratch)
        out = target(segment)
        read(segment.start, segment.stop, [out])
        yield segment, out


def materialize(
    form: LinearForm,
    out: Mapping[str, torch.Tensor],
    *,
    threads: int | None = None,
    on_nonfinite: OnNonfinite = "ignore",
) -> None:
    """Evaluate a form into given tensors, of any float dtype and on any device.

    Args:
        form: the form to evaluate.
        out: name -> tensor to fill; names that it lacks aren't computed.
        threads: how many threads; by default the number that suits the form.
        on_nonfinite: what to do about NaN and Inf in the result: "ignore", "warn" or "error".

    Raises:
        NonfiniteError: naming the tensors, if ``on_nonfinite="error"``.
        MismatchError: if two names share a tensor of ``out``, and their values differ.
    """
    steps = plan(form, _distinct(form, out))
    contiguous = {
        step.name: torch.empty_like(out[step.name], memory_format=torch.contiguous_format)
        for step in steps
        if not out[step.name].is_contiguous()
    }

    def target(segment: Segment) -> torch.Tensor:
        name = segment.step.name
        return cut(flattened(contiguous.get(name, out[name])), segment.start, segment.stop)

    def do(unit: list[Segment], scratch: Scratch) -> list[str]:
        found: list[str] = []
        for segment, out in evaluate(unit, target, scratch):
            if on_nonfinite != "ignore":
                found += flawed(segment, out)
        return found

    # Torch's own threads suit plain arithmetic on CPU; ours suit methods, and copies to a device.
    computed = any(source.computed for step in steps for source in step.coefficients)
    devices = {out[step.name].device for step in steps}
    if threads is None and not computed and all(device.type == "cpu" for device in devices):
        work, threads = units(steps, _TORCH_SEGMENT), 1
    else:
        work = units(steps)
    device = devices.pop() if len(devices) == 1 else None
    found = parallel(work, do, files=form.files, threads=threads, device=device)
    nonfinite = [name for names in found for name in names]
    for name, tensor in contiguous.items():
        out[name].detach().copy_(tensor)
    report_nonfinite(nonfinite, on_nonfinite)


def _distinct(form: LinearForm, out: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names to compute: the first of those that share one tensor of ``out``.

    Raises:
        MismatchError: if names that share a tensor aren't tied in the form.
    """
    tied = tied_names(form)
    owners: dict[tuple[object, ...], str] = {}
    names = []
    for name in form.specs:
        if name not in out:
            continue
        tensor = out[name]
        memory = (
            (tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride())
            if tensor.numel()
            else (name,)
        )
        owner = owners.setdefault(memory, name)
        if owner == name:
            names.append(name)
        elif tied.get(name, name) != tied.get(owner, owner):
            raise MismatchError(
                f"{owner} and {name} are one tensor in the target and two in {describe(form)}",
                hint="edit both alike, or untie them",
            )
    return names


def flawed(segment: Segment, out: torch.Tensor) -> list[str]:
    """Return the tensors of a segment that hold NaN or Inf, or are variances and negative."""
    step = segment.step
    variances = any(name.endswith(_VARIANCE) for name in step.run or [step.name])
    if not (has_nonfinite(out) or (variances and bool((out < 0).any()))):
        return []
    parts = torch.split(out, [*step.run.values()]) if step.run else [out]
    return [
        name
        for name, part in zip(step.run or [step.name], parts, strict=True)
        if has_nonfinite(part) or (name.endswith(_VARIANCE) and bool((part < 0).any()))
    ]


def report_nonfinite(names: Iterable[str], how: OnNonfinite) -> None:
    """Warn of tensors that hold NaN or Inf, or negative running variances.

    Raises:
        NonfiniteError: instead of the warning, if ``how`` is "error".
    """
    names = list(dict.fromkeys(names))
    variances = [name for name in names if name.endswith(_VARIANCE)]
    others = [name for name in names if name not in variances]
    for kind, found, hint in (
        ("NaN or Inf", others, "check the inputs, or set on_nonfinite='warn'"),
        ("negative or infinite variances", variances, _STATISTICS),
    ):
        if not found:
            continue
        fact = f"{kind} in {len(found)} tensor{'s' if len(found) > 1 else ''}: {first_few(found)}"
        if how == "error":
            raise NonfiniteError(fact, hint=hint)
        log.warning("%s%s", fact, f"; {hint}" if found is variances else "")


def allocate(
    form: LinearForm, like: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return empty tensors for all names of a form; tied names share one tensor.

    Args:
        form: the form whose shapes and dtypes to use.
        like: name -> tensor on whose device to allocate; CPU for names that it lacks.
    """
    tied = tied_names(form)
    owned: dict[str, torch.Tensor] = {}
    cpu = torch.device("cpu")
    with torch.inference_mode(False):
        for name, spec in form.specs.items():
            if name not in tied:
                device = like[name].device if like is not None and name in like else cpu
                owned[name] = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    return {name: owned[tied.get(name, name)] for name in form.specs}
