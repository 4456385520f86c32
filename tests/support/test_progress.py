"""Progress: one bar for a job, lines where there is no terminal, and nothing that is left."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import pytest

from weightops.support import progress as module
from weightops.support.progress import job, left, progress, set_aside, tracked


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
    with job("outer", 10) as outer:
        with job("inner", 99) as inner, progress(2, "a part", work=1) as bar:
            bar.update(2)
            inner.done(1)
            inner.left(0)  # of its own plan
        assert (outer._bar.n, outer._bar.total) == (3, 10)


def test_a_job_of_unknown_length(often: None) -> None:
    def do() -> None:
        with job("experiment", None) as whole:
            for i in range(10):
                with progress(2, f"part {i}", work=5) as bar:
                    time.sleep(0.03)
                    bar.update(2)
            whole.left(3)

    lines = shown(do)
    assert lines
    assert all(re.fullmatch(r"weightops: experiment, part \d: \d\d:\d\d", line) for line in lines)


def test_a_job_whose_length_is_told_on_the_way(often: None) -> None:
    def do() -> None:
        with job("experiment", None) as whole, progress(20, "a part", work=1) as bar:
            bar.update(5)
            left(15)
            for _ in range(15):
                time.sleep(0.03)
                bar.update()
            assert (whole._bar.n, whole._bar.total) == (20, 20)

    left(3)  # of no job
    form = r"weightops: experiment, a part: +\d+%, \d\d:\d\d, (\d\d:\d\d|\?) left"
    lines = shown(do)
    assert lines
    assert all(re.fullmatch(form, line) for line in lines)


CELL = """
import time
from weightops.support import progress
progress.DELAY = 0.0
with progress.job("patch", 40) as whole:
    for part in range(2):
        with progress.progress(20, f"part {part}", work=1) as bar:
            for _ in range(20):
                time.sleep(0.02)
                bar.update()
"""


def test_a_notebook_has_one_text_that_is_gone_in_the_end() -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    seen: list[str] = []

    class Client(nbclient.NotebookClient):  # type: ignore[misc, name-defined]
        def process_message(self, msg: dict[str, Any], *rest: Any) -> Any:
            if msg["msg_type"] in ("display_data", "update_display_data", "stream"):
                seen.append(msg["content"].get("data", {}).get("text/plain", "a stream"))
            return super().process_message(msg, *rest)

    Client(notebook, timeout=120, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output["data"] == {"text/plain": ""}
    assert all(text.startswith("patch") for text in seen[:-1])
    assert any("part 1" in text for text in seen)
