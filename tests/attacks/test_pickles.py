"""Pickles that try to run something: nothing runs, and the names that they ask for are reported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.bytewise import (
    archive,
    call,
    mapping,
    module,
    name,
    number,
    several,
    storage,
    stream,
    tar,
    tensor,
    text,
)
from helpers.gadgets import CALLED, COMMAND, GADGETS

from weightops import open_checkpoint
from weightops.checkpoints.formats import pickle_calls
from weightops.checkpoints.formats.pickle_objects import StandIn
from weightops.errors import CheckpointError

STORED, TENSOR_KEYS = b"FloatStorage", b"(X\x01\x00\x00\x000l"

FORMS: dict[str, Callable[[Path, bytes], Path]] = {
    "zip": lambda path, content: archive(path, content),
    "stream": lambda path, content: stream(
        path, content, keys=TENSOR_KEYS if STORED in content else b"]"
    ),
    "tar": lambda path, content: tar(path, content),
    "script": lambda path, content: archive(path, content, script=True),
}


def sound(form: str) -> bytes:
    """Return the opcodes of a sound tensor in a container."""
    return b"K\x07Q" if form == "tar" else tensor()


@pytest.fixture(autouse=True)
def sentinel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "SENTINEL"


@pytest.mark.parametrize("form", FORMS)
def test_a_gadget_beside_tensors_is_named_and_not_run(
    form: str, tmp_path: Path, sentinel: Path
) -> None:
    for label, (gadget, name_) in GADGETS.items():
        checkpoint = open_checkpoint(
            FORMS[form](tmp_path / "x.pt", mapping(w=sound(form), x=gadget))
        )
        assert list(checkpoint) == ["w"], label
        assert checkpoint["w"].shape == (2, 4)
        assert name_ in checkpoint.source.skipped, (label, checkpoint.source.skipped)
        assert not sentinel.exists(), label


@pytest.mark.parametrize("form", FORMS)
def test_a_gadget_that_a_tensor_depends_on_is_refused_by_name(
    form: str, tmp_path: Path, sentinel: Path
) -> None:
    for label, (gadget, name_) in GADGETS.items():
        rebuilt = mapping(
            w=sound(form),
            x=call("torch._utils._rebuild_tensor_v2", gadget, number(0), b")", b")", b"\x89", b"}"),
        )
        with pytest.raises(
            CheckpointError, match=r"a tensor is made from .*, not from a storage"
        ) as refused:
            open_checkpoint(FORMS[form](tmp_path / "x.pt", rebuilt))
        assert name_ in str(refused.value), label
        assert not sentinel.exists(), label


@pytest.mark.parametrize("form", FORMS)
def test_a_call_with_a_tensor_is_refused_by_name(form: str, tmp_path: Path, sentinel: Path) -> None:
    for path in CALLED:
        with pytest.raises(
            CheckpointError, match=r"x is what .* makes of stored numbers"
        ) as refused:
            open_checkpoint(
                FORMS[form](tmp_path / "x.pt", mapping(w=sound(form), x=call(path, sound(form))))
            )
        assert path.replace("__builtin__", "builtins") in str(refused.value)
        assert not sentinel.exists(), path


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_content_is_a_gadget(form: str, tmp_path: Path, sentinel: Path) -> None:
    for label, (gadget, name_) in GADGETS.items():
        with pytest.raises(
            CheckpointError, match=r"x\.pt can't be read as a torch file"
        ) as refused:
            open_checkpoint(FORMS[form](tmp_path / "x.pt", gadget))
        assert name_ in str(refused.value), label
        assert not sentinel.exists(), label


def test_a_module_of_a_hostile_class(tmp_path: Path, sentinel: Path) -> None:
    for form in ("zip", "stream", "script"):
        checkpoint = open_checkpoint(
            FORMS[form](tmp_path / "x.pt", module("subprocess.Popen", args=tensor()))
        )
        assert list(checkpoint) == ["args"]
        assert checkpoint.source.skipped == ("subprocess.Popen",)
    with pytest.raises(
        CheckpointError, match=r"args is what posix\.system makes of stored numbers"
    ):
        open_checkpoint(
            archive(tmp_path / "x.pt", module("a.B", args=call("posix.system", tensor())))
        )
    assert not sentinel.exists()


def test_hostile_parts_that_are_never_looked_at(tmp_path: Path, sentinel: Path) -> None:
    gadget = call("posix.system", text(COMMAND))
    script = archive(tmp_path / "s.pt", mapping(w=tensor()), script=b"\x80\x02" + gadget + b".")  # type: ignore[arg-type]
    assert list(open_checkpoint(script)) == ["w"]
    for position in range(3):
        parts = [
            b"\x80\x02" + number(0x1950A86A20F9469CFC6C) + b".",
            b"\x80\x02" + number(1001) + b".",
            b"\x80\x02}.",
        ]
        parts[position] = b"\x80\x02" + gadget + b"0" + parts[position][2:]
        parts += [
            b"\x80\x02" + mapping(w=tensor()) + b".",
            b"\x80\x02" + gadget + b"0(X\x01\x00\x00\x000l.",
            (8).to_bytes(8, "little"),
            bytes(32),
        ]
        (tmp_path / "x.pt").write_bytes(b"".join(parts))
        if position:  # else the magic number isn't at the beginning
            assert list(open_checkpoint(tmp_path / "x.pt")) == ["w"]
    assert not sentinel.exists()


PERSISTENT_LIES = {
    "refers to something else than a storage": several(
        text("module"), name("posix.system"), b"N", b"N"
    )
    + b"Q",
    "refers to something else": text("posix") + b"Q",
    "a storage is a posix.system": storage(kind="posix.system"),
    "which it doesn't hold": storage(key="../../etc/passwd"),
    "of 1,152,921,504,606,846,972 bytes": storage(numel=2**58 - 1),
    "elements, which can't be": storage(numel=2**60),
    "has -8 elements": storage(numel=-8),
}


def test_persistent_ids_that_lie(tmp_path: Path, sentinel: Path) -> None:
    for message, stored in PERSISTENT_LIES.items():
        with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
            open_checkpoint(archive(tmp_path / "x.pt", mapping(w=tensor(stored))))
    assert not sentinel.exists()


def test_no_listed_call_runs_its_arguments() -> None:
    """Every listed call answers hostile arguments with descriptions only."""
    hostile = StandIn("posix.system", (COMMAND,))
    for path, function in pickle_calls.CALLS.items():
        assert function.__module__ == pickle_calls.__name__, path
        for count in range(8):
            try:
                answer = function(*[hostile] * count)
            except (CheckpointError, TypeError):
                continue
            assert answer is None or isinstance(answer, StandIn), path


RUN_ALL = """
import pathlib, pickle, sys
for path in sorted(pathlib.Path().glob("*.pkl")):
    try:
        pickle.loads(path.read_bytes())
    except BaseException:
        pass
    if pathlib.Path("SENTINEL").exists():
        pathlib.Path("SENTINEL").unlink()
        print("ran", path.stem)
"""


def test_the_gadgets_are_real(tmp_path: Path) -> None:
    """Python's own unpickler runs the gadgets, so the tests above could fail."""
    calls = [
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "cProfile.run",
        "subprocess.getoutput",
        "runpy._run_code",
    ]
    opcodes = ["INST", "OBJ", "a memoised global", "STACK_GLOBAL", "a chain of getattr", "a key"]
    for label in calls + opcodes:
        (tmp_path / f"{label}.pkl").write_bytes(b"\x80\x04" + GADGETS[label][0] + b".")
    command = [sys.executable, "-c", RUN_ALL]
    ran = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    assert {f"ran {label}" for label in calls + opcodes} <= set(ran)
