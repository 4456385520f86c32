"""Show how far the work is: one bar for a whole job, with what it is at and the time left.

At a terminal, the bars of the parts are shown under it while they run. Where stderr is a file or a
pipe, the job is a line every ten seconds at most; in a notebook it is one line of text that
changes. At the end nothing of it is left, but for the lines in a file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

DELAY = 1.0
"""Seconds before a bar is shown: what is done by then needs none."""

EVERY = 10.0
"""Seconds between lines where there is no terminal."""

_JOB: ContextVar[Job | None] = ContextVar("job", default=None)


class Bar:
    """The bar of one part of the work, which also counts for the job that it is part of.

    Args:
        total: how many steps there are.
        what: what is done; empty if that says nothing to people.
        unit: what a step is.
        work: how much of the job's work a step is.
        done: how many steps a run before has done.
    """

    def __init__(self, total: float, what: str, unit: str, work: float, done: float) -> None:
        self._job, self._work = _JOB.get(), work
        self._bar: Any = None
        if self._job is None or _is_terminal():
            scaled = {"unit": unit or "it", "unit_scale": unit == "B"}
            self._bar = _new_bar(total=total, initial=done, desc=what or None, **scaled)
        if self._job is not None and what:
            self._job.at(what)

    def update(self, steps: float = 1) -> None:
        """Count steps that are done."""
        if self._bar is not None:
            self._bar.update(steps)
        if self._job is not None:
            self._job.done(steps * self._work)

    def note(self, text: str) -> None:
        """Show a text beside the bar from the next time on that it is drawn."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


_PLANNED = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {left} left"


class Job:
    """The bar of a whole job.

    Args:
        name: the name of the job.
        total: the amount of its work, in any unit; None until `left` tells it.
    """

    def __init__(self, name: str, total: float | None) -> None:
        self._name = name
        self._bar = _new_bar(desc=name, bar_format="{desc}: {elapsed}")
        if total is not None:
            self._plan(total)

    def _plan(self, total: float) -> None:
        self._bar.total = max(total, 1e-9)
        self._bar.bar_format = self._bar.form(_PLANNED)

    def at(self, what: str) -> None:
        """Say what the job is at."""
        self._bar.set_description_str(f"{self._name}, {what}", refresh=False)

    def done(self, work: float) -> None:
        """Count work of a part; when more is done than was planned, the plan grows."""
        if self._bar.total and not self._bar.disable:
            self._bar.total = max(self._bar.total, self._bar.n + work)
        self._bar.update(work)

    def left(self, work: float) -> None:
        """Say how much of the work is left, also when a part took less than was planned."""
        if self._bar.disable:
            return
        if self._bar.total is None:
            self._plan(self._bar.n + work)
        self.done(max(self._bar.total - work - self._bar.n, 0))

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


class Part(Job):
    """A job inside of another: the bars inside count for that one, whose plan they know nothing of.

    Args:
        whole: the job that it is part of.
    """

    def __init__(self, whole: Job) -> None:
        self._whole = whole

    def at(self, what: str) -> None:
        self._whole.at(what)

    def done(self, work: float) -> None:
        self._whole.done(work)

    def left(self, work: float) -> None:
        pass


@contextmanager
def job(name: str, work: float | None) -> Iterator[Job]:
    """Show one bar for all that is done inside; a job inside a job is part of it.

    >>> with job("a job", 10) as whole, progress(5, "its first part", work=2) as bar:
    ...     bar.update()
    """
    outer = _JOB.get()
    if outer is not None:
        yield Part(outer)
        return
    whole = Job(name, work)
    before = _JOB.set(whole)
    try:
        yield whole
    finally:
        _JOB.reset(before)
        whole.close()


def left(work: float) -> None:
    """Say how much is left of the job that runs, if one does: see `Job.left`."""
    whole = _JOB.get()
    if whole is not None:
        whole.left(work)


@contextmanager
def progress(
    total: float, what: str, unit: str = "", *, work: float = 0.0, done: float = 0
) -> Iterator[Bar]:
    """Show a bar; see `Bar` for the arguments."""
    bar = Bar(total, what, unit, work, done)
    try:
        yield bar
    finally:
        bar.close()


def tracked(items: Iterable[T], what: str, unit: str = "", total: int | None = None) -> Iterator[T]:
    """Yield items, with a bar.

    >>> list(tracked("ab", "letters"))
    ['a', 'b']
    """
    count = total if total is not None else len(items) if isinstance(items, Sized) else 0
    with progress(count, what, unit) as bar:
        for item in items:
            yield item
            bar.update()


def set_aside() -> None:
    """Clear the bars of a terminal, so that a line can be printed; they come back by themselves."""
    for bar in list(tqdm._instances):
        if isinstance(bar, _Terminal) and bar.last_print_t > bar.start_t:
            bar.clear()


def _is_terminal() -> bool:
    return bool(getattr(sys.stderr, "isatty", lambda: False)())


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython() if ipython else None, "kernel")


def _new_bar(**how: Any) -> Any:
    """Return a bar of tqdm in the form for this place."""
    if _is_terminal():
        return _Terminal(leave=False, delay=DELAY, **how)
    if _is_notebook():
        return _Notebook(leave=False, delay=DELAY, mininterval=0.5, **how)
    if "bar_format" not in how:
        how["bar_format"] = "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed}, {left} left{postfix}"
    return _Lines(leave=False, delay=EVERY, mininterval=EVERY, miniters=0, **how)


class _Timed(tqdm):  # type: ignore[misc]
    """A bar whose time left counts from the first work on: what comes before tells nothing."""

    _began: float | None = None

    @staticmethod
    def form(bar_format: str) -> str:
        """Return the form of a bar for this place."""
        return bar_format

    def update(self, n: float | None = 1) -> bool | None:
        if self._began is None and n:
            self._began = time.monotonic()
            self._before = self.n + n
        drawn: bool | None = super().update(n)
        return drawn

    @property
    def format_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().format_dict
        n, total = values["n"], values["total"]
        counted = n - self._before if self._began is not None else 0
        left = "?"
        if counted > 0 and total:
            seconds = (time.monotonic() - (self._began or 0.0)) / counted * (total - n)
            left = self.format_interval(max(seconds, 0))
        return {**values, "left": left}


class _Terminal(_Timed):
    """A bar that is drawn over and over in one line of a terminal."""


class _Lines(_Timed):
    """A bar that is a new line each time, for files and pipes."""

    @staticmethod
    def form(bar_format: str) -> str:
        return bar_format.replace("|{bar}| ", ", ")

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None and (not self.total or self.n < self.total):
            sys.stderr.write(f"weightops: {self}\n")
            sys.stderr.flush()


class _Notebook(_Timed):
    """A bar that is a text which changes, in the output of a notebook's cell."""

    _shown: Any = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        text = {"text/plain": str(self) if msg is None else msg}
        if self._shown is None:
            ipython = sys.modules["IPython"]  # the notebook's own
            self._shown = ipython.display.display(text, raw=True, display_id=True)
        else:
            self._shown.update(text, raw=True)
