"""Run the same recipes with weightops and with mergekit: how far the results are apart, and why.

    python benchmarks/parity.py --mergekit VENV/bin [--fusionbench VENV/bin]

A tiny Llama-like base, three fine-tuned kin and one that is nearly the base, in float32 and in
bf16, are merged by mergekit 0.1.5 from YAML files that `weightops merge` takes as they are;
FusionBench 0.2.33 merges the float32 ones by its functions for TIES, TSV-M and Iso. The table has
the largest difference, relative to the largest change that the merge makes (0 is equality), and the
share of elements that differ by more than rounding: four units in the last place of the output.
Methods that draw at random are compared by the share of elements that they change and the mean
square of the change.

What isn't rounding: FusionBench's threshold of TIES keeps an element more or less; in bf16 mergekit
rounds deltas, sums and unit vectors to bf16, and its sort keeps any of several equal magnitudes.
Singular vectors carry rounding of 1e-5 of the change.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from engine import shapes
from safetensors.torch import load_file, save_file

from weightops import merge

RECIPES: dict[str, dict[str, object]] = {
    "linear": {"weights": [1, 2, 0.5]},
    "slerp": {
        "models": 1,
        "parameters": {"t": [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.4}]},
    },
    "nuslerp": {"models": 2, "weights": [1, 3], "base": False},
    "nuslerp on deltas": {"method": "nuslerp", "models": 2, "weights": [1, 3]},
    "karcher": {"base": False},
    "model_stock": {},
    "passthrough": {"models": 1, "base": False},
    "passthrough, slices": {"method": "passthrough", "slices": [(1, 0, 2), (2, 1, 3)]},
    "task_arithmetic": {"weights": [0.3, 0.4, -0.2], "parameters": {"lambda": 0.9}},
    "ties": {"weights": [1, 2, 0.5], "density": [0.5, 0.3, 0.3]},
    "ties, not normalized": {
        "method": "ties",
        "weights": [0.4, 0.2, 0.5],
        "density": [0.5] * 3,
        "parameters": {"normalize": False},
    },
    "breadcrumbs": {
        "weights": [0.3, 0.4, 0.2],
        "density": [0.8] * 3,
        "parameters": {"gamma": 0.02},
    },
    "breadcrumbs_ties": {"weights": [0.3, 0.4, 0.2], "density": [0.8] * 3},
    "sce": {"parameters": {"select_topk": 0.4}},
    "dare_linear": {"weights": [0.3, 0.4, 0.2], "density": [0.5] * 3},
    "dare_ties": {"weights": [0.3, 0.4, 0.2], "density": [0.5] * 3},
    "della_linear": {
        "weights": [0.3, 0.4, 0.2],
        "density": [0.5] * 3,
        "parameters": {"epsilon": 0.1},
    },
    "della": {"weights": [0.3, 0.4, 0.2], "density": [0.5] * 3, "parameters": {"epsilon": 0.1}},
    "della, all kept": {"method": "della", "weights": [0.3, 0.4, 0.2]},
    "slerp, nearly parallel": {
        "whole": {
            "merge_method": "slerp",
            "base_model": 0,
            "models": [{"model": 0}, {"model": 4}],
            "parameters": {"t": 0.3},
        }
    },
    "slerp, t over each slice": {
        "whole": {
            "merge_method": "slerp",
            "base_model": 0,
            "parameters": {"t": [0.0, 1.0]},
            "slices": [
                {"sources": [{"model": i, "layer_range": span} for i in (0, 1)]}
                for span in ([0, 2], [0, 3])
            ],
        }
    },
    "linear, one slice": {
        "whole": {
            "merge_method": "linear",
            "slices": [
                {
                    "sources": [
                        {"model": i, "layer_range": [1, 3], "parameters": {"weight": i}}
                        for i in (1, 2)
                    ]
                }
            ],
        }
    },
    "ties, by filters": {
        "whole": {
            "merge_method": "ties",
            "base_model": 0,
            "parameters": {"density": 0.3},
            "models": [
                {
                    "model": 1,
                    "parameters": {"weight": 1.0, "density": [{"filter": "mlp", "value": 0.5}]},
                },
                {
                    "model": 2,
                    "parameters": {
                        "weight": [{"filter": "self_attn", "value": 0.2}, {"value": 0.5}]
                    },
                },
            ],
        }
    },
    "task_arithmetic, lambda by a filter": {
        "whole": {
            "merge_method": "task_arithmetic",
            "base_model": 0,
            "parameters": {"lambda": [{"filter": "mlp", "value": 0.5}]},
            "models": [{"model": i, "parameters": {"weight": 0.5}} for i in (1, 2)],
        }
    },
}
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")


def make(folder: Path, dtype: torch.dtype) -> list[Path]:
    """A base and three kin."""
    config, _ = shapes(0.1)
    config |= {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "vocab_size": 500,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (500, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (500, 64),
    }
    for i in range(3):
        prefix = f"model.layers.{i}."
        tensors |= {f"{prefix}self_attn.{p}_proj.weight": (64, 64) for p in "qkvo"}
        tensors |= {f"{prefix}mlp.{p}_proj.weight": (160, 64) for p in ("gate", "up")} | {
            f"{prefix}mlp.down_proj.weight": (64, 160)
        }
        tensors |= {f"{prefix}{p}_layernorm.weight": (64,) for p in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(0)
    base = {n: 0.02 * torch.randn(s, generator=generator) for n, s in tensors.items()}
    places = []
    for i in range(5):
        place = folder / ("base" if not i else f"ft{i}")
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config))
        far = (0.0, 0.002, 0.002, 0.002, 0.0002)[i]
        state = {
            n: t + (far * torch.randn(t.shape, generator=generator) if i else 0)
            for n, t in base.items()
        }
        save_file(
            {n: t.to(dtype) for n, t in state.items()},
            place / "model.safetensors",
            {"format": "pt"},
        )
        places.append(place)
    return places


def recipe(
    name: str, settings: dict[str, object], places: list[Path], dtype: str
) -> dict[str, object]:
    method = str(settings.get("method", name))
    if "whole" in settings:
        return {**_named(settings["whole"], places), "dtype": dtype}
    if "slices" in settings:
        slices = [
            {"sources": [{"model": str(places[i]), "layer_range": [a, b]}]}
            for i, a, b in settings["slices"]
        ]  # type: ignore[attr-defined]
        return {"merge_method": method, "slices": slices, "dtype": dtype}
    entries = []
    for i, place in enumerate(places[1 : int(settings.get("models", 3)) + 1]):  # type: ignore[call-overload]
        own = {
            key: settings[plural][i]
            for key, plural in (("weight", "weights"), ("density", "density"))
            if plural in settings
        }  # type: ignore[index]
        entries.append({"model": str(place), **({"parameters": own} if own else {})})
    content: dict[str, object] = {"merge_method": method, "models": entries, "dtype": dtype}
    if method != "linear" and settings.get("base", True):
        content["base_model"] = str(places[0])
        if method == "slerp":
            content["models"] = [{"model": str(places[0])}, *entries]
    return content | ({"parameters": settings["parameters"]} if "parameters" in settings else {})


def _named(value: Any, places: list[Path]) -> Any:
    """A recipe with paths for the numbers of models."""
    if isinstance(value, dict):
        return {
            k: str(places[v]) if k in ("model", "base_model") else _named(v, places)
            for k, v in value.items()
        }
    return [_named(entry, places) for entry in value] if isinstance(value, list) else value


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def compare(
    name: str, ours: Path, theirs: Path, start: Path, dtype: torch.dtype
) -> dict[str, float]:
    a, b, base = load(ours), load(theirs), load(start)
    if a.keys() != b.keys():
        raise SystemExit(
            f"{name}: the outputs hold different tensors: {sorted(a.keys() ^ b.keys())}"
        )
    base = {name: base.get(name, torch.zeros_like(tensor)) for name, tensor in a.items()}
    x, y, z = (torch.cat([s[n].double().flatten() for n in sorted(a)]) for s in (a, b, base))
    if name in RANDOM:
        changed = [((v - z).abs() > 0).double().mean().item() for v in (x, y)]
        square = (x - z).square().mean() / (y - z).square().mean()
        return {
            "changed": round(changed[0], 4),
            "mergekit changed": round(changed[1], 4),
            "mean square ratio": round(square.item(), 4),
        }
    unit = 4 * torch.finfo(dtype).eps * y.abs().clamp(min=1e-2)
    largest = (x - y).abs().max().item() / ((y - z).abs().max().item() or 1.0)
    beyond = ((x - y).abs() > unit).double().mean().item()
    return {"largest": float(f"{largest:.2g}"), "beyond rounding": float(f"{beyond:.2g}")}


FUSIONBENCH = """
import sys
from types import SimpleNamespace
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_svd_dict, sum_svd_dict
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

out, base, *tuned = map(Path, sys.argv[1:])
base, *tuned = (load_file(path / "model.safetensors") for path in (base, *tuned))
names = list(base)
vectors = [{n: t[n] - base[n] for n in names} for t in tuned]
tasks = SimpleNamespace(DATASETS=[str(i) for i in range(len(vectors))])
flat = torch.stack([torch.cat([v[n].flatten() for n in names]) for v in vectors])
merged = ties_merging(flat, reset_thresh=20, merge_func="dis-mean")
parts = merged.split([base[n].numel() for n in names])
wrapped = [SimpleNamespace(vector=dict(v)) for v in vectors]
found = {
    "ties, global": {n: part.view_as(base[n]) for n, part in zip(names, parts)},
    "iso_c": iso_c(vectors, accelerator="cpu"),
    "iso_cts": iso_cts(vectors, 0.8, accelerator="cpu"),
    "tsv_m": sum_svd_dict(compute_svd_dict(wrapped, tasks), tasks),
}
for name, vector in found.items():
    (out / name).mkdir(parents=True)
    edited = {n: (base[n] + vector[n]).contiguous() for n in names}
    save_file(edited, out / name / "model.safetensors")
"""
OURS = {
    "ties, global": ("ties", {"density": 0.2, "normalize": "count", "scope": "global"}),
    "iso_c": ("iso_c", {}),
    "iso_cts": ("iso_cts", {"common": 0.8}),
    "tsv_m": ("tsv_m", {}),
}


def against_fusionbench(
    scripts: Path, places: list[Path], folder: Path
) -> dict[str, dict[str, float]]:
    """The same task vectors, merged by FusionBench's functions in its own environment."""
    done = subprocess.run(
        [str(scripts / "python"), "-c", FUSIONBENCH, str(folder), *map(str, places)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    rows = {}
    for name, (method, options) in OURS.items():
        ours = folder / f"{name}.ours"
        merge(places[1:], method, base=places[0], **options).save(ours)
        rows[name] = compare(name, ours, folder / name, places[0], torch.float32)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mergekit",
        type=Path,
        required=True,
        help="the bin folder of an environment with mergekit 0.1.5",
    )
    parser.add_argument(
        "--fusionbench", type=Path, help="the bin folder of an environment with fusion-bench 0.2.33"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "parity.json"
    )
    args = parser.parse_args()
    report: dict[str, dict[str, object]] = (
        json.loads(args.out.read_text()) if args.out.exists() else {}
    )
    with tempfile.TemporaryDirectory() as temporary:
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            folder = Path(temporary) / kind
            places = make(folder, dtype)
            for name, settings in RECIPES.items():
                file = folder / "recipe.yaml"
                file.write_text(json.dumps(recipe(name, settings, places, kind)))
                ours, theirs = folder / f"{name}.ours", folder / f"{name}.theirs"
                for command in (
                    [
                        str(args.mergekit / "mergekit-yaml"),
                        str(file),
                        str(theirs),
                        "--copy-tokenizer",
                    ],
                    [sys.executable, "-m", "weightops", "merge", str(file), "-o", str(ours)],
                ):
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
                row = compare(name, ours, theirs, places[0], dtype)
                report.setdefault(name, {})[kind] = row
                print(f"{kind:9} {name:36} {json.dumps(row)}", flush=True)
        if args.fusionbench:
            for name, row in against_fusionbench(
                args.fusionbench,
                make(Path(temporary) / "fb", torch.float32)[:4],
                Path(temporary) / "fb-out",
            ).items():
                report[f"{name} (FusionBench)"] = {"float32": row}
                print(f"float32   {name:22} {json.dumps(row)}  FusionBench", flush=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
