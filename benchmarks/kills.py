"""Kill every verb that writes, at random moments, and look at what is left.

    python benchmarks/kills.py --kills 1000 [--verbs merge,patch] [--seed 1]

A killed process must leave no output, the whole old one, or the whole new one, and its inputs as
they were. The same command, run again (with ``--resume`` where the verb has it), must succeed and
leave nothing beside its output.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

VERBS: dict[str, tuple[str, bool]] = {
    "merge": ("merge {m0} {m1} {m2} --method linear --max-shard-size 1MB -o {out}", True),
    "merge ties": ("merge {m1} {m2} --base {m0} --method ties --density 0.5 -o {out}", True),
    "apply": ("apply {vector} --base {m0} -o {out}", True),
    "vector": ("vector {m0} {m1} -o {out}.safetensors", False),
    "vector compressed": ("vector {m0} {m1} --compress int8 -o {out}.safetensors", False),
    "vector lora": ("vector {m0} {m1} --lora 2 -o {out}", False),
    "compare": ("compare {m0} {m1} {m2} -o {out}.png", False),
    "finetune": (
        "finetune --task digits --steps 6 --checkpoint-every 2 --batch-size 8 -o {out}",
        True,
    ),
    "evaluate": ("evaluate embedded --tasks digits -o {out}", False),
    "patch": (
        "patch --task digits --supported shapes --rule mean --steps 4 --alphas 0,1 -o {out}",
        True,
    ),
}
"""Name -> a command line, and whether it can be resumed."""

Files = Mapping[str, bytes]


def files_of(path: Path) -> Files | None:
    """Return name -> content of a file or of all files in a folder; None if there is nothing."""
    if path.is_file():
        return {"": path.read_bytes()}
    if not path.is_dir():
        return None
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def is_whole(found: Files | None, reference: Files, *, exact: bool) -> bool:
    """Return whether an output has all files of the reference; its weights to the bit if exact.

    The metadata of what is trained say how long that took.
    """
    if found is None or found.keys() != reference.keys():
        return False
    weights = [name for name in found if name.endswith(".safetensors") or not name]
    return all(found[name] == reference[name] for name in weights if exact) and all(
        len(found[name]) == len(reference[name]) for name in weights
    )


def main() -> int:
    """Kill all verbs in turn, and print a table; return 1 if anything was left half done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--verbs", default=",".join(VERBS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = options.verbs.split(",")
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(Path(folder))
        for name in names:
            bad += kill(name, Path(folder), inputs, -(-options.kills // len(names)), options.seed)
    print(f"{bad} of {options.kills} kills left something half done")
    return 1 if bad else 0


def make_inputs(folder: Path) -> dict[str, str]:
    """Write three models and a task vector, and return their paths."""
    from weightops import TaskVector, open_checkpoint

    generator = torch.Generator().manual_seed(0)
    paths = {}
    for i in range(3):
        tensors = {f"l.{j}.weight": torch.randn(300, 300, generator=generator) for j in range(8)}
        paths[f"m{i}"] = str(open_checkpoint(tensors).save(folder / f"m{i}.safetensors"))
    vector = TaskVector(paths["m0"], paths["m1"]).save(folder / "vector.safetensors")
    return {**paths, "vector": str(vector)}


def kill(name: str, folder: Path, inputs: Mapping[str, str], count: int, seed: int) -> int:
    """Kill one verb ``count`` times, print a line, and return how often something was left."""
    text, resumable = VERBS[name]
    exact = name not in ("finetune", "patch")
    work = folder / "work"
    words = [word.format(out=work / "out", **inputs) for word in text.split()]
    line, out = [sys.executable, "-m", "weightops", *words, "-q"], Path(words[-1])
    before = {path: Path(path).read_bytes() for path in inputs.values()}
    draws, seen, bad = random.Random(f"{name} {seed}"), Counter[str](), 0
    begun = time.monotonic()
    subprocess.run(line, check=True, capture_output=True)
    duration, reference = time.monotonic() - begun, files_of(out)
    assert reference is not None
    for i in range(count):
        old = i % 2 == 1  # every other time, an old output is replaced
        if not old:
            shutil.rmtree(work)
        process = subprocess.Popen(
            [*line, *(["--overwrite"] if old else [])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(draws.uniform(0.2, 1.1) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = files_of(out)
        # A run's folder is there while it lasts, with states to resume from.
        whole = left is None or name == "finetune" or is_whole(left, reference, exact=exact)
        seen["nothing" if left is None else "an output"] += 1
        again = ["--resume"] if resumable else ["--overwrite"]
        again += ["--overwrite"] if old and resumable and name != "finetune" else []
        done = subprocess.run([*line, *again], capture_output=True, text=True)
        complete = done.returncode == 0 and is_whole(files_of(out), reference, exact=exact)
        clean = [path.name for path in work.iterdir()] == [out.name]
        unchanged = all(Path(path).read_bytes() == data for path, data in before.items())
        if not (whole and complete and clean and unchanged):
            bad += 1
            beside = sorted(path.name for path in work.iterdir())
            print(f"  {name} {i}: {whole=} {complete=} {unchanged=} {beside} {done.stderr[-200:]}")
    shown = ", ".join(f"{what} {n}" for what, n in seen.items())
    print(f"{name:18} {count} kills: left {shown}; {bad} half done", flush=True)
    shutil.rmtree(work)
    return bad


if __name__ == "__main__":
    sys.exit(main())
