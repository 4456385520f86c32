"""Damage files of every kind, open each, and count what happens.

    python benchmarks/attacks.py --files 100000 --seed 1

A damaged file must open or be refused with one of weightops' own errors, in ten seconds and with
three gigabytes of addresses more than there were. Each kind runs in a process of its own, so that a
crash is counted. The kinds, and the mutations, are those of ``tests/attacks``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "attacks")]

Use = Callable[[Path], object]


def kinds() -> dict[str, int]:
    """Return the kinds of files, and what share of the files is of each kind."""
    from test_configurations import RECIPES
    from test_mutants import FORMS, INSIDE
    from test_other_mutants import OTHER

    return {
        **{name: form[0] for name, form in {**FORMS, **INSIDE, **OTHER}.items()},
        **{f"recipe: {name}": 500 for name in RECIPES},
    }


def attack(kind: str, count: int, seed: int) -> None:
    """Use ``count`` damaged files of a kind, and print what happened as JSON."""
    from test_mutants import mutate

    from weightops.errors import WeightopsError

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("ten seconds")

    signal.signal(signal.SIGALRM, late)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    draws = random.Random(f"{kind} {seed}")
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        data, write, use = sound(kind, Path(folder))
        use(write(data))
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (3 << 30), hard))
        for _ in range(count):
            mutant = mutate(data, draws)
            path = write(mutant)
            signal.alarm(10)
            begun = time.monotonic()
            try:
                use(path)
                outcome = "opened"
            except WeightopsError:
                outcome = "refused"
            except TimeoutError:
                outcome = "hung"
            except BaseException as error:
                outcome = f"bare {type(error).__name__}: {str(error)[:80]}"
            signal.alarm(0)
            slowest = max(slowest, time.monotonic() - begun)
            outcomes[outcome] += 1
    print(json.dumps({"outcomes": outcomes, "slowest": round(slowest, 2)}))


def sound(kind: str, folder: Path) -> tuple[bytes, Callable[[bytes], Path], Use]:
    """Return a sound file of a kind, a function that writes such a file, and one that uses it."""
    import yaml
    from test_configurations import RECIPES
    from test_mutants import FORMS, INSIDE, read_pictures, use
    from test_other_mutants import OTHER

    if kind in INSIDE:
        _, content, wrap = INSIDE[kind]

        def write_inside(data: bytes) -> Path:
            (folder / "x").unlink(missing_ok=True)
            return wrap(folder / "x", data)

        return content, write_inside, use
    if kind in OTHER:
        path = OTHER[kind][1](folder)
        use_form: Use = OTHER[kind][2]
    elif kind in FORMS:
        path = FORMS[kind][1](folder)
        use_form = read_pictures if kind == "pictures" else use
    else:
        from weightops import Recipe

        path = folder / "r.yaml"
        path.write_text(yaml.safe_dump(RECIPES[kind.partition(": ")[2]], sort_keys=False))
        use_form = Recipe.read

    def write(data: bytes) -> Path:
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return path

    return path.read_bytes(), write, use_form


def main() -> int:
    """Attack all kinds, and print a table; return 1 if anything but one of our errors came."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="one kind, in this process")
    options = parser.parse_args()
    if options.kind:
        attack(options.kind, options.files, options.seed)
        return 0
    shares = kinds()
    total: Counter[str] = Counter()
    for name, share in shares.items():
        count = -(-options.files * share // sum(shares.values()))
        line = [sys.executable, __file__, "--kind", name, "--files", str(count)]
        done = subprocess.run([*line, "--seed", str(options.seed)], capture_output=True, text=True)
        if done.returncode:
            total["crashed"] += 1
            print(f"{name:28} crashed ({done.returncode}): {done.stderr[-300:]}", flush=True)
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        total.update(result["outcomes"])
        shown = ", ".join(f"{what} {n:,}" for what, n in result["outcomes"].items())
        print(f"{name:28} {shown}; slowest {result['slowest']} s", flush=True)
    files = sum(n for what, n in total.items() if what != "crashed")
    bad = {what: n for what, n in total.items() if what not in ("opened", "refused")}
    print(f"{files:,} files of {len(shares)} kinds: {bad or 'no crash, no hang, no bare error'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
