"""Time task-vector algebra against the plain loop over keys and against the memory's speed.

    python benchmarks/algebra.py [--repeats 15]

ViT-B/32 (151 M parameters, random weights), from state dicts in memory to a new state dict. The
loop is what the task-arithmetic paper describes: subtract key by key, then add alpha times the
difference key by key. The floor is to read both checkpoints and write the result once, at the
bandwidth of a copy into new memory; a result that is returned has to be put into new memory. All
are timed in turn in one process, a new one for each dtype, as memory that was freed and kept would
cost nothing to take again; the table has medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import open_clip
import torch

from weightops import TaskVector

State = dict[str, torch.Tensor]


def states(dtype: torch.dtype) -> tuple[torch.nn.Module, State, State]:
    model = open_clip.create_model("ViT-B-32", pretrained=None)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    pre = model.state_dict()
    return (
        model,
        pre,
        {
            n: t + 1e-3 * torch.randn_like(t) if t.is_floating_point() else t.clone()
            for n, t in pre.items()
        },
    )


def plain_loop(pre: State, ft: State, alpha: float) -> State:
    with torch.no_grad():
        vector = {
            key: ft[key] - pre[key]
            for key in pre
            if pre[key].dtype not in (torch.int64, torch.uint8)
        }
        return {key: pre[key] + alpha * vector[key] if key in vector else pre[key] for key in pre}


def weightops_apply(pre: State, ft: State, alpha: float) -> State:
    return TaskVector(pre, ft).apply(pre, alpha)


def copy_state(pre: State) -> State:
    return {key: tensor.clone() for key, tensor in pre.items()}


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    del result
    return seconds


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_extra(function: Callable[[], object]) -> int:
    """The most resident memory above what there was, by a thread that looks every millisecond."""
    before, peak, stop = resident(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = function()
    stop.set()
    watcher.join()
    peak[0] = max(peak[0], resident())
    del result
    return peak[0] - before


def measure(dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    model, pre, ft = states(dtype)
    size = sum(t.numel() * t.element_size() for t in pre.values())
    vector = TaskVector({n: t.clone() for n, t in pre.items()}, ft)
    ways: dict[str, Callable[[], object]] = {
        "floor": lambda: copy_state(pre),
        "weightops": lambda: weightops_apply(pre, ft, 0.4),
        "loop": lambda: plain_loop(pre, ft, 0.4),
        "in place": lambda: vector.apply_(model, 0.4),
    }
    memory = {
        name: peak_extra(ways[name]) / size for name in ("weightops", "loop")
    }  # before anything is freed
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            seconds = timed(way)
            if repeat:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    medians["floor"] *= 1.5  # a copy moves two models' bytes; build and apply must move three
    return {
        "bytes": size,
        "threads": torch.get_num_threads(),
        "seconds": {n: round(t, 4) for n, t in medians.items()},
        "over_floor": round(medians["weightops"] / medians["floor"], 2),
        "loop_over_weightops": round(medians["loop"] / medians["weightops"], 2),
        "in_place_over_floor": round(medians["in place"] / medians["floor"], 2),
        "peak_extra_models": {n: round(m, 2) for n, m in memory.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "algebra.json"
    )
    args = parser.parse_args()
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found = process.submit(measure, dtype, args.repeats).result()
        name = str(dtype).removeprefix("torch.")
        results[name] = found
        print(f"{name}, {found['bytes'] / 1e6:.0f} MB, {found['threads']} threads")
        for way, seconds in found["seconds"].items():
            print(
                f"  {way:10} {1000 * seconds:7.0f} ms   "
                f"{seconds / found['seconds']['floor']:.2f} x floor"
            )
        print(f"  the loop takes {found['loop_over_weightops']} times as long as weightops;")
        memory = found["peak_extra_models"]
        print(
            f"  peak extra memory, in models: weightops {memory['weightops']:.2f}, "
            f"loop {memory['loop']:.2f}"
        )
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
