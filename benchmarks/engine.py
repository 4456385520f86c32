"""Time merges of sharded checkpoints against mergekit's and against the disk's own speed.

    python benchmarks/engine.py [--mergekit VENV/bin] [--size 0.5] [--methods ties,slerp]
                                [--slope linear,slerp] [--repeats 5] [--union]
    python benchmarks/engine.py --tensors 10000 [--elements 1000]
    python benchmarks/engine.py --cold 2

A base and four fine-tuned checkpoints of a Llama-like model are made in a temporary folder: random
weights, bf16, three shards each. For each method the two programs run in turn as processes of their
own on a warm cache; the table has medians of seconds (mergekit runs once where it takes more than
10) and the peak of anonymous memory, which a thread reads from /proc every 5 ms. The slope is what
a billion parameters more take, from half of the size to the size. The floor reads every input byte
and writes (and syncs) an output of the right size; the loop is what `Checkpoint.save` takes,
imports and headers aside.

With --tensors, models of many small tensors are merged instead, and the table has what one tensor
costs beyond the start of the process (which is that of models of ten tensors), beside a plain loop
with the safetensors library.

With --cold, four models of that many billions of parameters are merged (linear) whose files aren't
in the system's cache, and as a measure the same bytes are read, an output is written, and synced,
with an empty cache, too: in turn, three times. Of a file of 1 GB that is in the cache before, the
table has what is left there. It needs root, and free disk for five models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

METHODS: dict[str, tuple[int, dict[str, object], dict[str, object]]] = {
    # models, weightops' options, mergekit's parameters
    "linear": (4, {}, {"weight": 0.25}),
    "task_arithmetic": (4, {"weights": "0.3,0.3,0.3,0.3"}, {"weight": 0.3}),
    "slerp": (2, {"t": 0.4}, {"t": 0.4}),
    "model_stock": (4, {}, {}),
    "karcher": (4, {}, {}),
    "dare_linear": (
        4,
        {"density": 0.5, "weights": "0.3,0.3,0.3,0.3"},
        {"density": 0.5, "weight": 0.3},
    ),
    "dare_ties": (
        4,
        {"density": 0.5, "weights": "0.3,0.3,0.3,0.3"},
        {"density": 0.5, "weight": 0.3},
    ),
    "sce": (4, {"select_topk": 0.5}, {"select_topk": 0.5}),
    "breadcrumbs": (
        4,
        {"density": 0.9, "gamma": 0.01, "weights": "0.3,0.3,0.3,0.3"},
        {"density": 0.9, "gamma": 0.01, "weight": 0.3},
    ),
    "ties": (4, {"density": 0.5}, {"density": 0.5, "weight": 1.0}),
    "della": (
        4,
        {"density": 0.5, "epsilon": 0.1, "weights": "0.3,0.3,0.3,0.3"},
        {"density": 0.5, "epsilon": 0.1, "weight": 0.3},
    ),
    "arcee_fusion": (2, {}, {}),
    "nearswap": (1, {"t": 0.001}, {"t": 0.001}),
    "ram": (4, {}, {}),
    "multislerp": (4, {}, {"weight": 0.25}),
}
SHORT = 10
"""Seconds of mergekit under which it is run as often as weightops."""
ON_WEIGHTS = ("linear", "slerp", "karcher", "arcee_fusion", "multislerp")
ASKED = {
    "linear": 6,
    "task_arithmetic": 6,
    "slerp": 9,
    "model_stock": 6,
    "karcher": 8,
    "dare_linear": 10,
    "dare_ties": 10,
    "sce": 14,
    "breadcrumbs": 15,
    "ties": 30,
    "della": 12,
    "arcee_fusion": 4,
    "nearswap": 4,
    "ram": 4,
    "multislerp": 4,
}
"""How many times as fast as mergekit a method is meant to be, as a process and by its slope."""


def shapes(
    billions: float, hidden: int = 1536, inner: int = 4096, vocabulary: int = 32000
) -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    """A Llama configuration of about that many parameters, and its tensors."""
    layers = round(
        (billions * 1e9 - 2 * hidden * vocabulary) / (4 * hidden**2 + 3 * hidden * inner)
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "vocab_size": vocabulary,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
    }
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        tensors |= {f"{prefix}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        tensors |= {f"{prefix}mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        tensors |= {f"{prefix}{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    return config, tensors | {
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }


def make(folder: Path, billions: float, models: int = 5, **sizes: int) -> list[Path]:
    """The base and its fine-tuned kin, three shards each."""
    config, tensors = shapes(billions, **sizes)
    places = [folder / name for name in ("base", *(f"ft{i}" for i in range(1, models)))]
    for place in places:
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    total = sum(torch.Size(s).numel() for s in tensors.values())
    generator = torch.Generator().manual_seed(0)
    shard: dict[Path, dict[str, torch.Tensor]] = {place: {} for place in places}
    held, index, weight_map = 0, 1, {}
    for name in names:
        base = 0.02 * torch.randn(tensors[name], generator=generator)
        for place in places:
            delta = (
                0 if place is places[0] else 0.002 * torch.randn(tensors[name], generator=generator)
            )
            shard[place][name] = (base + delta).bfloat16()
        weight_map[name] = f"model-{index:05}-of-00003.safetensors"
        held += base.numel()
        if held >= total * index / 3 - 1 or name == names[-1]:
            for place in places:
                save_file(shard[place], place / weight_map[name], {"format": "pt"})
                shard[place] = {}
            index += 1
    for place in places:
        text = json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": weight_map})
        (place / "model.safetensors.index.json").write_text(text)
    return places


def made(folder: Path, billions: float, models: int = 5) -> list[Path]:
    """The models in a folder, which are made if they aren't there."""
    names = ("base", "ft1", "ft2", "ft3", "ft4")[:models]
    return [folder / n for n in names] if folder.exists() else make(folder, billions, models)


def add_tokenizers(places: list[Path], rows: int) -> None:
    """Tokenizers of as many tokens as there are rows, two of which are each model's own."""
    for i, place in enumerate(places):
        words = [f"word{n}" for n in range(rows - 2)]
        added = [
            {"id": rows - 2 + n, "content": f"<own{i}{n}>", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for n in range(2)
        ]
        model = {"type": "WordLevel", "vocab": {w: n for n, w in enumerate(words)}}
        content = {
            **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder")),
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {**model, "unk_token": words[0]},
        }
        (place / "tokenizer.json").write_text(json.dumps(content))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": words[0]}
        (place / "tokenizer_config.json").write_text(json.dumps(settings))


def union(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The linear merge by token of four models with vocabularies of 152k tokens."""
    rows, hidden = 151_936, 896
    places = make(folder / "union", args.size, 4, hidden=hidden, inner=4864, vocabulary=rows)
    add_tokenizers(places, rows)
    out, recipe = folder / "merged", folder / "union.yaml"
    models = [{"model": str(place), "parameters": {"weight": 0.25}} for place in places]
    keys = {"merge_method": "linear", "dtype": "bfloat16", "tokenizer_source": "union"}
    recipe.write_text(json.dumps({**keys, "models": models}))
    own = [sys.executable, "-m", "weightops", "merge", str(recipe), "-o", str(out)]
    row: dict[str, object] = {"weightops": measured(own, out, args.repeats, places)}
    if args.mergekit:
        command = [str(args.mergekit / "mergekit-yaml"), str(recipe), str(out), "--lazy-unpickle"]
        row["mergekit"] = measured(command, out, 1, places)
        row["ratio"] = round(row["mergekit"]["seconds"] / row["weightops"]["seconds"], 1)  # type: ignore[index]
        row["asked"] = 4
    print(f"  linear by token  {json.dumps(row)}", flush=True)
    shutil.rmtree(folder / "union")
    return row


class Cost(NamedTuple):
    """What a process and its children took."""

    seconds: float
    processor: float
    """Seconds of the processor, user's and system's: they tell less of what else runs."""
    gigabytes: float
    """The peak of anonymous memory."""


def run(command: list[str], env: dict[str, str] | None = None) -> Cost:
    """Run a process and return what it took."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **(env or {})}
        )
        peak = [0]

        def anonymous(pid: int, parents: bytes = b"") -> int:
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                return 0
            if command == parents:  # forked, and about to run another program: the same memory
                return 0
            own = next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
            return own + sum(anonymous(int(child), command) for child in children)

        def watch() -> None:
            while process.poll() is None:
                peak[0] = max(peak[0], anonymous(process.pid))
                time.sleep(0.005)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.wait()
        seconds = time.perf_counter() - start
        watcher.join()
        log.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read().decode()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, processor, peak[0] * 1024 / 1e9)


def ours(method: str, places: list[Path], out: Path) -> list[str]:
    models, options, _ = METHODS[method]
    base = [] if method in ON_WEIGHTS else ["--base", str(places[0])]
    settings = [
        text
        for name, value in options.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    inputs = map(str, places[1 : models + 1])
    merging = ["merge", *inputs, "--method", method, *base, *settings, "-o", str(out)]
    return [sys.executable, "-m", "weightops", *merging]


def theirs(method: str, places: list[Path], out: Path, scripts: Path) -> list[str]:
    models, _, parameters = METHODS[method]
    own = {
        key: value
        for key, value in parameters.items()
        if key in ("weight", "density", "gamma", "epsilon")
    }
    config: dict[str, object] = {
        "merge_method": method,
        "dtype": "bfloat16",
        "models": [
            {"model": str(place), **({"parameters": own} if own else {})}
            for place in places[1 : models + 1]
        ],
        "parameters": {key: value for key, value in parameters.items() if key not in own},
    }
    if method not in ("linear", "multislerp", "karcher"):
        first = method in ("slerp", "arcee_fusion")
        config["base_model"] = str(places[1] if first else places[0])
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps(config))  # JSON is YAML
    return [str(scripts / "mergekit-yaml"), str(recipe), str(out), "--lazy-unpickle"]


def clean(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)


def floor(places: list[Path], folder: Path, models: int = 4) -> float:
    """Read every byte of the inputs and write one output of their size, synced; seconds."""
    buffer = bytes(1 << 24)
    start = time.perf_counter()
    warm(places[: models + 1])
    size = sum(file.stat().st_size for file in places[0].glob("*.safetensors"))
    with open(folder / "floor", "wb", buffering=0) as stream:
        for _ in range(0, size, len(buffer)):
            stream.write(buffer)
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    (folder / "floor").unlink()
    return seconds


LOOP = """
import sys, time, torch
from weightops.merging.merge import merge
*models, method, base, out = sys.argv[1:]
merged = merge(models, method, base=base or None)
start = time.perf_counter()
merged.save(out)
print(time.perf_counter() - start)
"""


def loop(method: str, places: list[Path], out: Path) -> float:
    """Seconds of `Checkpoint.save` alone."""
    base = "" if method in ON_WEIGHTS else str(places[0])
    warm(places)
    command = [sys.executable, "-c", LOOP, *map(str, places[1:5]), method, base, str(out)]
    seconds = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    clean(out)
    return seconds


def warm(places: list[Path]) -> None:
    """Bring the inputs into the system's cache."""
    buffer = bytearray(1 << 24)
    for place in places:
        for file in place.glob("*.safetensors"):
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass


PLAIN = """
import sys
import torch
from safetensors import safe_open
from safetensors.torch import save_file
*models, out = sys.argv[1:]
opened = [safe_open(model, "pt") for model in models]
merged = {}
for name in opened[0].keys():
    tensors = [file.get_tensor(name).float() for file in opened]
    merged[name] = (sum(tensors) / len(tensors)).bfloat16()
save_file(merged, out, {"format": "pt"})
"""


def small_tensors(folder: Path, tensors: int, elements: int) -> list[Path]:
    """A base and two models of many tensors of one size."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(tensors, elements, generator=generator)
    paths = [folder / f"{tensors}-{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        delta = 0.1 * i * torch.randn(tensors, elements, generator=generator)
        rows = (base + delta).bfloat16()
        save_file({f"layers.{k}.weight": row.clone() for k, row in enumerate(rows)}, path)
    return paths


def drop_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def in_cache(path: Path) -> float:
    """Gigabytes of a file that the system's cache holds."""
    line = subprocess.run(
        ["fincore", "-bnro", "res", path], check=True, capture_output=True, text=True
    ).stdout
    return int(line) / 1e9


def cold(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The linear merge of four models, and the floor, from files that aren't in the cache."""
    places = made(folder / str(args.cold), args.cold, 4)
    out, other = folder / "merged", folder / "another"
    with open(other, "wb") as stream:
        for _ in range(1000):
            stream.write(os.urandom(1_000_000))
    floors, merges, left = [], [], []
    for _ in range(3):
        drop_cache()
        floors.append(floor(places, folder))
        drop_cache()
        other.read_bytes()
        command = [sys.executable, "-m", "weightops", "merge", *map(str, places), "--method"]
        merges.append(run([*command, "linear", "-o", str(out)]))
        left.append(in_cache(other))
        clean(out)
    row = {
        "billions": args.cold,
        "floor": round(statistics.median(floors), 2),
        "merge": medians(merges),
        "ratio": round(statistics.median(floors) / statistics.median(m.seconds for m in merges), 2),
        "asked": 0.9,
        "kept of another file": round(min(left), 2),
        "date": date.today().isoformat(),
        "processor": processor(),
    }
    print(f"  {json.dumps(row)}; floors {floors}, merges {[m.seconds for m in merges]}")
    return row


def per_tensor(args: argparse.Namespace, folder: Path) -> None:
    """Print what a small tensor costs beyond the start, in microseconds, and the whole merge."""
    few, many = (small_tensors(folder, n, args.elements) for n in (10, args.tensors))
    out = folder / "merged.safetensors"
    merging = [sys.executable, "-m", "weightops", "merge", "--overwrite", "-o", str(out)]
    programs: dict[str, Callable[[list[str]], list[str]]] = {
        "linear of 2": lambda files: [*merging, *files[1:], "--method", "linear"],
        "task arithmetic of 2": lambda files: [
            *(*merging, *files[1:], "--base", files[0], "--method", "task_arithmetic")
        ],
        "a plain loop over 2": lambda files: [sys.executable, "-c", PLAIN, *files[1:], str(out)],
    }
    for title, command in programs.items():
        runs = [
            [run(command([*map(str, files)])) for files in (few, many)] for _ in range(args.repeats)
        ]
        (start, start_cpu, _), (wall, cpu, _) = (
            [statistics.median(column) for column in zip(*(run[i] for run in runs), strict=True)]
            for i in (0, 1)
        )
        a_tensor = [1e6 * extra / args.tensors for extra in (wall - start, cpu - start_cpu)]
        print(
            f"  {title:20}  {wall:6.2f} s, of the processor {cpu:6.2f} s; a tensor beyond the "
            f"start: {a_tensor[0]:5.0f} us, of the processor {a_tensor[1]:5.0f} us",
            flush=True,
        )


def measured(command: list[str], out: Path, repeats: int, places: list[Path]) -> dict[str, float]:
    return side_by_side({"": lambda _: command}, places, out, repeats)[""]


def medians(costs: list[Cost]) -> dict[str, float]:
    columns = zip(Cost._fields, zip(*costs, strict=True), strict=True)
    return {name: round(statistics.median(column), 2) for name, column in columns}


Programs = dict[str, Callable[[list[Path]], list[str]]]


def side_by_side(programs: Programs, places: list[Path], out: Path, repeats: int) -> dict:
    """Cost of each program on the same models, run in turn; mergekit once where it takes long."""
    runs: dict[str, list[Cost]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, command in programs.items():
            if name != "mergekit" or not runs[name] or runs[name][0].seconds < SHORT:
                warm(places)
                runs[name].append(run(command(places)))
                clean(out)
    return {name: medians(costs) for name, costs in runs.items()}


def compared(row: dict, key: str, asked: float) -> dict:
    """A row with the ratios of the two programs, by the clock and by the processor."""
    ours, theirs = row["weightops"], row["mergekit"]
    ratios = {
        f"{key} of {column}": round(theirs[column] / ours[column], 1)
        for column in ("seconds", "processor")
    }
    return {**row, **ratios, "asked": asked}


def slope(large: dict, small: dict, billions: float) -> dict:
    """Cost of a billion parameters more, from models of half the size and of the size."""
    return {
        name: {
            column: round((cost[column] - small[name][column]) / (billions / 2), 2)
            for column in ("seconds", "processor")
        }
        for name, cost in large.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mergekit", type=Path, help="the bin folder of an environment with mergekit 0.1.5"
    )
    parser.add_argument("--size", type=float, default=0.5, help="billions of parameters")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--slope", default="", help="the methods that merge models of half the size, too"
    )
    parser.add_argument(
        "--union",
        action="store_true",
        help="also the linear merge by token of four models with 152k tokens",
    )
    parser.add_argument(
        "--cold", type=float, help="merge models of so many billions that aren't in the cache"
    )
    parser.add_argument("--tensors", type=int, help="merge models of so many small tensors")
    parser.add_argument("--elements", type=int, default=1000, help="elements of a small tensor")
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints; kept")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "engine.json"
    )
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    try:
        if args.tensors:
            per_tensor(args, folder)
            return
        report = json.loads(args.out.read_text()) if args.out.exists() else {}
        report |= {"cold": cold(args, folder)} if args.cold else benchmark(args, folder)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    finally:
        if not args.folder:
            shutil.rmtree(folder)


def processor() -> str:
    """The processor's name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}"


def benchmark(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    places = made(folder / str(args.size), args.size)
    sloped = args.slope.split(",") if args.slope else []
    halves = made(folder / str(args.size / 2), args.size / 2) if sloped else []
    out = folder / "merged"
    clean(out)
    imports = measured([sys.executable, "-c", "import torch"], out, args.repeats, [])
    floor(places, folder)  # from here on, the inputs are in the system's cache
    floors = statistics.median(floor(places, folder) for _ in range(args.repeats))
    report: dict[str, object] = {
        "billions": args.size,
        "date": date.today().isoformat(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "import torch": imports,
        "floor": round(floors, 2),
        "methods": {},
        "loop_over_floor": {},
    }
    print(
        f"{args.size} B parameters; import torch {imports['seconds']} s, "
        f"{imports['gigabytes']} GB; floor {floors:.2f} s"
    )
    if args.union:
        report["union"] = union(args, folder)
    for method in filter(None, args.methods.split(",")):
        programs: Programs = {"weightops": partial(ours, method, out=out)}
        if args.mergekit:
            programs["mergekit"] = partial(theirs, method, out=out, scripts=args.mergekit)
        row = side_by_side(programs, places, out, args.repeats)
        if method in sloped:
            small = side_by_side(programs, halves, out, args.repeats)
            row["slope"] = slope(row, small, args.size)
        if args.mergekit:
            row = compared(row, "ratio", ASKED[method])
            if method in sloped:
                row["slope"] = compared(row["slope"], "ratio", ASKED[method])
        report["methods"][method] = row  # type: ignore[index]
        print(f"  {method:16} {json.dumps(row)}", flush=True)
    for method in ("linear", "task_arithmetic"):
        seconds = statistics.median(loop(method, places, out) for _ in range(args.repeats))
        report["loop_over_floor"][method] = round(seconds / floors, 2)  # type: ignore[index]
        print(
            f"  {method}: the loop takes {seconds:.2f} s, {seconds / floors:.2f} times the floor",
            flush=True,
        )
    return report


if __name__ == "__main__":
    main()
