"""Kill every verb that writes, at random moments and at chosen calls, and look at what is left.

    python benchmarks/kills.py --kills 1000 --minutes 60 --log kills.jsonl [--verbs merge,patch]

A killed process must leave no output, the whole old one, or the whole new one, and its inputs as
they were. The same command, run again (with ``--resume`` where the verb has it), must succeed with
the output of a run that nobody killed, and leave nothing beside it. Half of the kills come at a
random moment, and half just before a call by which the process opens, renames, exchanges, makes or
removes something in the folder of its output: one call after another. Every other time there is an
older output, of other inputs, which is replaced.

Processes are forked from one that has imported all modules, so that kills fall into the work. With
``--log``, the same command continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple


class Verb(NamedTuple):
    """A command line, in which ``{m}``, ``{e}`` and ``{seed}`` differ between the old and new run.

    Attributes:
        line: the words.
        resumes: True if the verb has ``--resume``.
        in_place: True if the output's folder is there while the process runs.
    """

    line: str
    resumes: bool = False
    in_place: bool = False


_TRAINED = "--steps 4 --lr 1e-3 --batch-size 8 --seed {seed}"
VERBS = {
    "merge": Verb("merge {m} {m1} {m2} --max-shard-size 1MB -o {out}", resumes=True),
    "merge ties": Verb(
        "merge {m} {m1} --base {m2} --method ties --density 0.5 -o {out}.safetensors", resumes=True
    ),
    "apply": Verb("apply {vector} --base {m} -o {out}", resumes=True),
    "vector": Verb("vector {m1} {m} -o {out}.safetensors"),
    "vector int8": Verb("vector {m1} {m} --compress int8 -o {out}.safetensors"),
    "vector lora": Verb("vector {m1} {m} --lora 2 -o {out}"),
    "compare": Verb("compare {m1} {m2} --base {m} -o {out}.png"),
    "pack": Verb("pack {m} {m1} --base {m2} -o {out}.safetensors"),
    "statistics": Verb(
        "statistics {e} --task {right} --images 48 --kind fisher -o {out}.safetensors", resumes=True
    ),
    "evaluate": Verb("evaluate {e} --tasks {right} -o {out}"),
    "rank": Verb("rank {e} {e1} --target {wrong} --labels 8 --steps 2 -o {out}"),
    "soup": Verb("soup {e} {e1} --base embedded --tasks {right} -o {out}"),
    "finetune": Verb(
        f"finetune --task {{wrong}} {_TRAINED} --checkpoint-every 2 -o {{out}}", True, True
    ),
    "lofi": Verb(
        f"lofi --task {{wrong}} --nodes 2 {_TRAINED} --checkpoint-every 2 -o {{out}}", True, True
    ),
    "patch": Verb(
        f"patch --task {{wrong}} --supported {{right}} --rule mean {_TRAINED} --alphas 0,1 "
        "-o {out}",
        resumes=True,
    ),
    "negate": Verb(
        f"negate --target {{right}} --control {{wrong}} {_TRAINED} --alphas 0,1 -o {{out}}",
        resumes=True,
    ),
    "add": Verb(
        f"add --tasks {{wrong}},{{other}} {_TRAINED} --alphas 0,0.5,1 -o {{out}}", resumes=True
    ),
    "analogy": Verb(
        "analogy --a {right} --b {other} --c {wrong} --target {again} --finetuned {e} "
        "--finetuned {e1} --finetuned {tuned} --alphas 0,1 -o {out}",
        resumes=True,
    ),
    "push": Verb("push {tuned} somebody/model --license mit --dry-run"),
}

Files = Mapping[str, bytes]


def files_of(path: Path) -> Files | None:
    """Return name -> content of a file or of all files in a folder; None if there is nothing.

    Of weights there are the tensors alone, since metadata say how long training took. Of other
    files there is the name.
    """
    if not path.exists():
        return None
    inner = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(p.relative_to(path)): content_of(p) for p in inner if p.is_file()}


def content_of(path: Path) -> bytes:
    """Return what must be the same in each run of a command."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return data[8 + int.from_bytes(data[:8], "little") :]
    if path.suffix == ".json":
        json.loads(data)
    return b"something" if data else b""


def contents(path: Path) -> list[tuple[str, bytes]]:
    """Return the files of an input, and their bytes."""
    inner = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(str(p), p.read_bytes()) for p in inner if p.is_file()]


# ------------------------------------------------------------------------- processes


def forked(work: Callable[[], int]) -> int:
    """Call a function in a forked process, and return the number of the process."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        code = work()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a process, and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def verb(words: list[str], errors: Path, before: Callable[[], None] = lambda: None) -> int:
    """Start a command line in a forked process, which calls ``before`` first."""

    def work() -> int:
        from weightops.cli.main import _log_to_stderr, run

        sink = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        _log_to_stderr(20)
        before()
        code = run(words)
        sys.stderr.flush()
        errors.with_name("modules.txt").write_text("\n".join(sys.modules))
        return code

    return forked(work)


def at_calls(folder: Path, act: Callable[[int], None]) -> None:
    """Call ``act`` with 1, 2, ... before each call that concerns the folder of the output."""
    place, count = str(folder), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "ctypes.dlsym":
            concerned = arguments[1] == "renameat2"
        elif event in ("os.remove", "os.rmdir"):  # the last is the folder, open as a number
            concerned = arguments[-1] != -1 or place in str(arguments[0])
        else:
            concerned = event in CALLS and any(place in str(given) for given in arguments[:2])
        if concerned:
            count += 1
            act(count)

    sys.addaudithook(hook)


CALLS = ("open", "os.rename", "os.mkdir", "os.truncate", "os.link", "shutil.rmtree")
"""What Python reports before it is done, in ``sys.addaudithook``."""


# ------------------------------------------------------------------------- the killing


class Kill(NamedTuple):
    """What a kill left: "before" (nothing, or the old output), "new", or what is "between"."""

    verb: str
    number: int
    left: str
    problem: str
    seconds: float


class Target:
    """A verb, its command lines, and what they write when nobody kills them."""

    def __init__(self, name: str, folder: Path, inputs: Mapping[str, str]) -> None:
        self.name, self.verb = name, VERBS[name]
        self.inputs = {path: contents(Path(path)) for path in inputs.values()}
        self.work = folder / name.replace(" ", "_")
        self.errors = folder / "errors.txt"
        self.work.mkdir()
        runs = (
            {"m": inputs["m3"], "e": inputs["e3"], "seed": "1"},
            {"m": inputs["m0"], "e": inputs["e0"], "seed": "0"},
        )
        self.old_words, self.words = (
            [word.format(out=self.work / "out", **inputs, **run) for word in line]
            for line, run in zip([self.verb.line.split()] * 2, runs, strict=True)
        )
        self.out = Path(self.words[-1]) if "-o" in self.words else self.work / "nothing"
        self.old = self.whole_run(self.old_words)
        counted = folder / "calls.txt"
        begun = time.monotonic()
        self.new = self.whole_run(
            [*self.words, *([] if self.old is None else ["--overwrite"])],
            lambda: at_calls(self.work, lambda number: _note(counted, number)),
        )
        self.seconds = time.monotonic() - begun
        self.calls = len(counted.read_bytes()) if counted.exists() else 0

    def whole_run(self, words: list[str], before: Callable[[], None] = lambda: None) -> Any:
        """Run a command line to its end, and return what it wrote."""
        code = ended(verb([*words, "-q"], self.errors, before))
        assert code == 0, f"{self.name}: {code} {self.errors.read_text()[-500:]}"
        import_all(self.errors.with_name("modules.txt"))
        return files_of(self.out)

    def kill(self, number: int, seed: int) -> Kill:
        """Kill a run, run it again, and return what it left and what is wrong with that."""
        begun = time.monotonic()
        replaces = number % 2 == 1 and self.old is not None
        self._prepare(replaces)
        words = [*self.words, *(["--overwrite"] if replaces else []), "-q"]
        if number % 4 >= 2 and self.calls:
            call = 1 + number // 4 % self.calls
            killed = verb(words, self.errors, lambda: at_calls(self.work, _suicide(call)))
        else:
            killed = verb(words, self.errors)
            draw = random.Random(f"{self.name} {number} {seed}").uniform(0, 1.1)
            time.sleep(draw * self.seconds)
            os.kill(killed, signal.SIGKILL)
        ended(killed)
        left, problems = self._left(self.old if replaces else None)
        again = ["--resume"] if self.verb.resumes else [] if self.old is None else ["--overwrite"]
        again += ["--overwrite"] if replaces and self.verb.resumes else []
        code = ended(verb([*self.words, *again, "-q"], self.errors))
        if code:
            problems.append(f"again: {code} {self.errors.read_text()[-300:]}")
        elif files_of(self.out) != self.new:
            problems.append("again: not what an undisturbed run writes")
        beside = [path.name for path in self.work.iterdir() if path != self.out]
        problems += [f"beside it: {beside}"] if beside else []
        problems += [f"{p} has changed" for p, c in self.inputs.items() if contents(Path(p)) != c]
        return Kill(self.name, number, left, "; ".join(problems), time.monotonic() - begun)

    def _left(self, before: Files | None) -> tuple[str, list[str]]:
        """Return what a kill left, and what is wrong with it."""
        try:
            found = files_of(self.out)
        except ValueError as error:
            return "between", [f"half a file: {error}"]
        if found in (before, self.new):
            return "before" if found == before else "new", []
        return "between", [] if self.verb.in_place else [f"left {sorted(found or ())}"]

    def _prepare(self, replaces: bool) -> None:
        shutil.rmtree(self.work)
        self.work.mkdir()
        if replaces:
            self.whole_run(self.old_words)


def _note(file: Path, number: int) -> None:
    with open(file, "a") as stream:
        stream.write("x")


def _suicide(call: int) -> Callable[[int], None]:
    return lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == call else None


def inputs_in(folder: Path) -> dict[str, str]:
    """Make the inputs in a process of its own, so that this one computes nothing before it forks.

    A library may hold threads, which a forked process would lack.
    """
    file = folder / "inputs.json"

    def work() -> int:
        from kill_inputs import make_inputs

        file.write_text(json.dumps(make_inputs(folder)))
        return 0

    assert ended(forked(work)) == 0
    paths: dict[str, str] = json.loads(file.read_text())
    return paths


def import_all(names: Path) -> None:
    """Import what a process imported, so that those that are forked from now on needn't."""
    for name in names.read_text().split("\n"):
        if name not in sys.modules:
            with suppress(Exception):  # modules of modules that are made while those run
                import_module(name)


def main() -> int:
    """Kill all verbs in turn, and print a table; return 1 if anything was left half done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--log", type=Path, help="a file of what was found, to continue from")
    parser.add_argument("--verbs", default=",".join(VERBS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stop = time.monotonic() + 60 * options.minutes
    log = options.log or Path(os.devnull)
    done = (
        [Kill(*json.loads(line)) for line in log.read_text().splitlines()] if log.is_file() else []
    )
    spent = dict.fromkeys(options.verbs.split(","), 0.0)
    for kill in done:
        spent[kill.verb] = spent.get(kill.verb, 0) + kill.seconds
    with tempfile.TemporaryDirectory() as folder:
        inputs = inputs_in(Path(folder))
        targets: dict[str, Target] = {}
        while len(done) < options.kills and time.monotonic() < stop:
            name = min(spent, key=lambda verb: spent[verb])  # each gets as much time
            if name not in targets:
                targets[name] = Target(name, Path(folder), inputs)
            number = sum(kill.verb == name for kill in done)
            kill = targets[name].kill(number, options.seed)
            done.append(kill)
            spent[name] += kill.seconds
            if kill.problem:
                print(f"  {name} {number}: {kill.problem}", flush=True)
            with open(log, "a") as stream:
                stream.write(json.dumps(kill) + "\n")
    return report(done)


def report(done: Sequence[Kill]) -> int:
    """Print a table of all kills, and return 1 if anything was left half done."""
    verbs = dict.fromkeys(kill.verb for kill in done)
    for name in verbs:
        found = [kill for kill in done if kill.verb == name]
        counts = Counter(kill.left for kill in found)
        shown = ", ".join(f"{what} {counts[what]}" for what in ("before", "new", "between"))
        bad = sum(bool(kill.problem) for kill in found)
        print(f"{name:14} {len(found):4} kills: left {shown}; wrong {bad}")
    bad = sum(bool(kill.problem) for kill in done)
    print(f"{bad} of {len(done):,} kills of {len(verbs)} verbs left something half done")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
