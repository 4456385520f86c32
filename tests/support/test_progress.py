"""Progress: one bar for a job, lines where there is no terminal, and nothing that is left."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from contextlib import redirect_stderr

import pytest

from weightops.support import progress as module
from weightops.support.progress import job, progress, set_aside, tracked


class Terminal(io.StringIO):
    """A text that calls itself a terminal."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        """The lines that a terminal would show in the end."""
        lines, row, column = [""], 0, 0
        for piece in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", self.getvalue()):
            if piece == "\x1b[A":
                row = max(row - 1, 0)
            elif piece == "\n":
                row, column = row + 1, 0
            elif piece == "\r":
                column = 0
            else:
                lines += [""] * (row + 1 - len(lines))
                old = lines[row].ljust(column)
                lines[row] = old[:column] + piece + old[column + len(piece) :]
                column += len(piece)
        return [line.rstrip() for line in lines]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines come every 50 ms, and bars at once."""
    monkeypatch.setattr(module, "EVERY", 0.05)
    monkeypatch.setattr(module, "DELAY", 0.0)


def shown(do: Callable[[], object]) -> list[str]:
    """Do something, and return the lines that it has written to a stderr which is a file."""
    with redirect_stderr(io.StringIO()) as text:
        do()
    return text.getvalue().splitlines()


def work(parts: int, steps: int = 10, seconds: float = 0.02) -> None:
    with job("patch", parts * steps) as whole:
        for part in range(parts):
            with progress(steps, f"part {part}", "steps", work=1) as bar:
                for _ in range(steps):
                    time.sleep(seconds)
                    bar.update()
                    bar.note("loss 1")
            whole.left((parts - part - 1) * steps)


def test_a_file_has_a_line_now_and_then(often: None) -> None:
    lines = shown(lambda: work(3))
    assert 3 <= len(lines) <= 13  # at most one each 50 ms of 0.6 s
    form = r"weightops: patch, part \d: +(\d+)%, \d\d:\d\d, (\d\d:\d\d|\?) left"
    shares = [int(re.fullmatch(form, line)[1]) for line in lines]  # type: ignore[index]
    assert shares == sorted(shares)
    assert {re.search(r"part \d", line)[0] for line in lines} >= {"part 0", "part 1"}  # type: ignore[index]


def test_a_bar_without_a_job_has_lines_too(often: None) -> None:
    lines = shown(lambda: [time.sleep(0.02) for _ in tracked(range(10), "letters")])
    assert lines
    assert all(re.match(r"weightops: letters: \d+/10 it, ", line) for line in lines)


def test_what_is_short_shows_nothing() -> None:
    assert shown(lambda: work(3)) == []


def test_a_terminal_has_both_bars_and_nothing_afterwards(often: None) -> None:
    with redirect_stderr(Terminal()) as terminal:
        work(2, seconds=0.12)
    drawn = terminal.getvalue()
    assert "patch, part 1" in drawn
    assert "10/10" in drawn or "9/10" in drawn
    assert not any(terminal.screen)


def test_lines_are_printed_between_bars(often: None) -> None:
    with redirect_stderr(Terminal()) as terminal, job("patch", 20) as whole:
        for i in range(20):
            time.sleep(0.02)
            whole.done(1)
            if i == 10:
                set_aside()
                terminal.write("a row\n")
    assert terminal.screen[0] == "a row"
    assert not any(terminal.screen[1:])


def test_the_plan_is_met() -> None:
    with job("patch", 100) as whole:
        for left in (60, 70, 10):  # less was done than planned, then more
            with progress(80, "a part", work=1) as bar:
                bar.update(20)
            whole.left(left)
        assert (whole._bar.n, whole._bar.total) == (90, 100)
        whole.done(30)
        assert (whole._bar.n, whole._bar.total) == (120, 120)


def test_a_job_inside_a_job_is_part_of_it() -> None:
    with job("outer", 10) as outer, job("inner", 99) as inner:
        assert inner is outer
    with job("another", 1) as another:
        assert another is not outer
