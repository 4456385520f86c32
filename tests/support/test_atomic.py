"""Outputs that appear whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from weightops.errors import OutputError
from weightops.support import atomic
from weightops.support.atomic import atomic_output, check_free, resumable_output, stage_of
from weightops.support.locks import lock_of

CHILD = """
import os, signal, sys
from pathlib import Path
from weightops.errors import OutputError
from weightops.support import atomic

out = Path(sys.argv[1])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def write(name, **options):
    with atomic.atomic_output(out, **options) as part:
        part.mkdir()
        (part / "a.json").write_text(name)
        (part / "b.json").write_text(name)

try:
    exec(sys.argv[2])
except OutputError as error:
    print(error)
"""


def in_child(out: Path, code: str, *, killed: bool = False) -> str:
    """Run code in another process and return what it printed."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(out), code], capture_output=True)
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr.decode()
    return done.stdout.decode()


def test_a_failed_output_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out.json"

    def write(text: str, *, fail: bool) -> None:
        with atomic_output(out) as temporary:
            temporary.write_text(text)
            assert not out.exists()
            if fail:
                raise ZeroDivisionError("division")

    with pytest.raises(ZeroDivisionError, match="division"):
        write("begun", fail=True)
    assert list(tmp_path.iterdir()) == []
    write("complete", fail=False)
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]


def test_the_old_output_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("old", "new"):
        with atomic_output(out, overwrite=True) as temporary:
            assert text == "old" or (out / "x.json").read_text() == "old"
            temporary.mkdir()
            (temporary / "x.json").write_text(text)
    assert (out / "x.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_outputs_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "holiday.png").touch()
    with pytest.raises(OutputError, match=r"out exists\nhint: overwrite=True replaces it"):
        check_free(tmp_path / "out", overwrite=False)
    with pytest.raises(OutputError, match=r"other things than .* \(holiday.png\)"):
        check_free(tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="is not a name for an output"):
        check_free(Path("/"), overwrite=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    with (
        pytest.raises(OutputError, match="is a folder, and the output is a file"),
        atomic_output(empty, overwrite=True) as temporary,
    ):
        temporary.touch()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """What is dead is told by the lock: a number may be another process's now, or this one's."""
    foreign = [".out.x-0c.part", ".out2.part", ".out.lock2"]
    for name in (
        *foreign,
        ".out.part",
        ".out.old",
        ".out.lock",
        f".out.{os.getpid()}-0badc0de.part",
    ):
        (tmp_path / name).touch()
    with atomic_output(tmp_path / "out") as temporary:
        temporary.touch()
    assert {path.name for path in tmp_path.iterdir()} == {"out", *foreign}


def test_a_failed_output_is_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(name: str, *, fail: bool) -> None:
        with resumable_output(out, resume=True) as folder:
            (folder / name).touch()
            for code in ("with atomic.resumable_output(out): 1", "write('other')"):
                assert f"out is being written by process {os.getpid()} on " in in_child(out, code)
            if fail:
                raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        write("first.json", fail=True)
    assert not out.exists()
    assert stage_of(out).is_dir()
    write("second.json", fail=False)
    assert {path.name for path in out.iterdir()} == {"first.json", "second.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_file_of_a_stage(tmp_path: Path) -> None:
    with resumable_output(tmp_path / "x.safetensors", single=True) as folder:
        (folder / "x.safetensors").write_bytes(b"data")
        (folder / "journal.0").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


KILLS = {
    "while it writes": ("atomic._sync = die", "old"),
    "before the exchange": ("atomic._exchange = die", "old"),
    "after the exchange": ("atomic._flush = lambda path: path == out.parent and die()", "new"),
    "while the old one is removed": (
        "atomic.shutil.rmtree = lambda path, **_: (next(Path(path).iterdir()).unlink(), die())",
        "new",
    ),
    "where nothing is exchanged, before": (
        "atomic._exchange = lambda *_: False; real = Path.rename\n"
        "Path.rename = lambda a, b: die() if a.name == '.out.part' and b == out else real(a, b)",
        None,
    ),
    "where nothing is exchanged, after": (
        "atomic._exchange = lambda *_: False; atomic._flush = lambda p: p == out.parent and die()",
        "new",
    ),
}
"""When a process is killed -> how, and what is under the name of the output then."""


@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, moment: str) -> None:
    out = tmp_path / "out"
    in_child(out, "write('old')")
    how, left = KILLS[moment]
    in_child(out, f"{how}\nwrite('new', overwrite=True)", killed=True)
    if left:
        assert {path.read_text() for path in out.iterdir()} == {left}
        assert len(list(out.iterdir())) == 2
    else:
        assert "out exists" in in_child(out, "write('x')"), "the old one is back"
    assert in_child(out, "write('third', overwrite=True)") == ""
    assert {path.read_text() for path in out.iterdir()} == {"third"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_systems_that_can_exchange_do(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if atomic._exchange(tmp_path / "a", tmp_path / "b"):
        assert [p.name for n in "ab" for p in (tmp_path / n).iterdir()] == ["b", "a"]
    with pytest.raises(OSError, match="No such file"):
        atomic._exchange(tmp_path / "a", tmp_path / "c") or os.stat(tmp_path / "c")


def test_an_output_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for text in ("old", "new"):
        in_child(tmp_path / "out", f"write({text!r}, overwrite=True)")
        assert (tmp_path / "disk" / "real" / "a.json").read_text() == text
    assert (tmp_path / "out").is_symlink()
    with atomic_output(tmp_path / "disk" / "real", overwrite=True) as part:
        part.mkdir()
        refused = in_child(tmp_path / "out", "write('x', overwrite=True)")
        assert "is being written by process" in refused
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with (
        pytest.raises(OutputError, match="circle is a link that leads nowhere"),
        atomic_output(tmp_path / "circle"),
    ):
        pass


@pytest.mark.parametrize("write", [atomic_output, resumable_output])
def test_failures_of_the_system_are_one_error(tmp_path: Path, write: Callable[..., Any]) -> None:
    """Here the process has no descriptor left for a file."""
    out = tmp_path / "new" / "out"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        with pytest.raises(OutputError, match="out can't be written: Too many open files"):
            stack.enter_context(write(out))
    assert list(tmp_path.iterdir()) == []


def test_many_processes_write_one_output_in_turn(tmp_path: Path) -> None:
    """The lock holds though its file is removed each time: no two are ever inside at once."""
    code = """
inside = out.with_name("inside")
for _ in range(100):
    with atomic.atomic_output(out, overwrite=True, wait=True) as part:
        inside.mkdir()
        part.mkdir()
        inside.rmdir()
"""
    line = [sys.executable, "-c", CHILD, str(tmp_path / "out"), code]
    processes = [subprocess.Popen(line) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not lock_of(tmp_path / "out").exists()
