"""Time what merging with data takes, side by side with FusionBench 0.2.33.

    python benchmarks/from_data.py [--fusion-bench VENV/bin/python] [--vision 192,4,32,8]

Both collect Gram matrices and Fisher informations of one CLIP model of transformers from the same
pictures, FusionBench with its own functions and their defaults (batches of 32), and merge two
models with what they have collected. WUDI is timed on the matrices of the image encoder, beside the
loop of its paper. Seconds are those of the processor. FusionBench needs an environment of its own.
Fisher's informations aren't alike: weightops takes the expectation over the classes, of each
picture; FusionBench squares one gradient of a whole batch. A run with both writes its rows to
results/from_data.json, beside those of other sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "from_data.json"
CLASSES, FLOOR, RATIO = 10, 1e-6, 0.95
NAMES = ("a", "b")
PLAIN = "wudi, as in its paper"


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor's seconds of a call, and its result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def prepare(folder: Path, vision: list[int], images: int) -> None:
    """Write two models of transformers, of random weights, and pictures in folders by class."""
    import numpy as np
    from PIL import Image
    from transformers import CLIPConfig, CLIPModel

    from weightops import open_checkpoint
    from weightops.checkpoints.matching import convert_to

    width, layers, size, patch = vision
    for seed, name in enumerate(NAMES):
        convert_to(open_checkpoint("embedded"), "transformers").save(folder / name)
        config = CLIPConfig.from_pretrained(folder / name)
        own = config.vision_config
        own.hidden_size, own.intermediate_size, own.num_hidden_layers = width, 4 * width, layers
        own.image_size, own.patch_size, own.num_attention_heads = size, patch, max(width // 64, 1)
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder / name)
        settings = folder / name / "preprocessor_config.json"
        written = json.loads(settings.read_text())
        written |= {key: {"height": size, "width": size} for key in ("size", "crop_size")}
        settings.write_text(json.dumps(written))
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for i in range(images if split == "train" else CLASSES):
            path = folder / "pictures" / split / f"class {i % CLASSES}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


def ours(folder: Path, images: int, steps: int) -> dict[str, float]:
    """Return the seconds of weightops."""
    from weightops import ImageModel, merge, open_checkpoint
    from weightops.merging.methods.interference import wudi
    from weightops.statistics.collect import statistic_of
    from weightops.statistics.runs import on_images
    from weightops.tasks.table import find_task

    task, checkpoint = find_task(str(folder / "pictures")), open_checkpoint(folder / "a")
    found, made = {}, {}
    for kind in ("gram", "fisher"):
        model = ImageModel.open(checkpoint, "cpu", precision="float32")

        def collected(count: int, kind=kind, model=model) -> Any:
            return statistic_of(on_images(model, task, "train", count), checkpoint, kind)

        collected(1)
        model.forget(task)
        found[f"{kind}, collected"], made[kind] = seconds(partial(collected, images))
    states = [image_encoder(folder / name) for name in NAMES]
    for kind, method, options in (("gram", "regmean", {"ratio": RATIO}), ("fisher", "fisher", {})):
        tensors = {n: t for n, t in made[kind].items() if n in states[0]}
        given = [{kind: tensors}, {kind: tensors}]
        merged = merge(states, method, statistics=given, **options)
        found[f"{method}, merged"], _ = seconds(merged.state_dict)
    if not steps:
        return found
    base = image_encoder(folder / "a")
    deltas = [torch.stack([states[1][n] - base[n], base[n]]) for n in matrices(base)]
    found["wudi, merged"], _ = seconds(lambda: [wudi(delta, steps=steps) for delta in deltas])
    found[PLAIN], _ = seconds(lambda: [plain_wudi(delta, steps) for delta in deltas])
    return found


def plain_wudi(deltas: torch.Tensor, steps: int) -> torch.Tensor:
    """Return WUDI's vector by Adam on the loss as its paper writes it."""
    found = torch.nn.Parameter(deltas.sum(0))
    optimizer = torch.optim.Adam([found], lr=1e-5)
    squares = deltas.flatten(1).square().sum(1)[:, None, None]
    for _ in range(steps):
        optimizer.zero_grad()
        (((found - deltas) @ deltas.mT).square() / squares).sum().backward()
        optimizer.step()
    return found.detach()


def image_encoder(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    return {
        n: t for n, t in state.items() if n.startswith("vision_model.") and t.is_floating_point()
    }


def matrices(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, tensor in state.items() if tensor.ndim == 2 and ".layers." in name]


def theirs(folder: Path, images: int, steps: int) -> dict[str, float]:
    """Return the seconds of FusionBench; run in its environment."""
    from fusion_bench.method.fisher_merging.clip_fisher_merging import (
        FisherMergingForCLIPVisionModel,
    )
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
    from fusion_bench.method.regmean.clip_regmean import RegMeanAlgorithmForCLIP
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
    from fusion_bench.method.wudi.wudi import wudi_merging
    from PIL import Image
    from torch import nn
    from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

    whole = CLIPModel.from_pretrained(folder / "a")
    encoder = CLIPVisionModel.from_pretrained(folder / "a").eval()
    named = {n: m for n, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    weights = [name for name, _ in encoder.named_parameters()]
    files = sorted((folder / "pictures" / "train").rglob("*.png"))

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            label = int(files[index].parent.name.split()[1])
            return Image.open(files[index]).convert("RGB"), label

    shared = {"exclude_param_names_regex": [], "dataloader_kwargs": {"batch_size": 32}}
    regmean = RegMeanAlgorithmForCLIP(
        **shared,
        num_regmean_examples=images,
        reduce_non_diagonal_ratio=RATIO,
        weight_transpose=True,
    )
    fisher = FisherMergingForCLIPVisionModel(
        **shared,
        normalize_fisher_weight=True,
        minimal_fisher_weight=FLOOR,
        num_fisher_examples=images,
    )
    for algorithm in (regmean, fisher):  # as its set-up does, from a downloaded model
        algorithm._clip_processor = CLIPProcessor.from_pretrained(folder / "a")
        algorithm.visual_projection = whole.visual_projection.requires_grad_(False)
        algorithm.logit_scale_exp = whole.logit_scale.detach().exp()
        head = torch.randn(CLASSES, whole.config.projection_dim)
        algorithm.zeroshot_weights = {"task": head / head.norm(dim=-1, keepdim=True)}
    found, made = {}, {}
    with torch.no_grad():
        found["gram, collected"], made["gram"] = seconds(
            lambda: regmean.get_regmean_weights("task", encoder, Pictures(), named)
        )
    found["fisher, collected"], made["fisher"] = seconds(
        lambda: fisher.get_fisher_weights("task", encoder, Pictures(), weights)
    )
    states = [dict(CLIPVisionModel.from_pretrained(folder / n).named_parameters()) for n in NAMES]
    with torch.no_grad():
        lists = {name: [state[name].detach() for state in states] for name in weights}
        found["regmean, merged"], _ = seconds(
            lambda: merging_with_regmean_weights(lists, [made["gram"]] * 2, RATIO)
        )
        found["fisher, merged"], _ = seconds(
            lambda: merging_with_fisher_weights(lists, [made["fisher"]] * 2, torch.ones(2) / 2)
        )
    if not steps:
        return found
    base = {name: pair[0] for name, pair in lists.items()}
    vectors = [
        {n: lists[n][1] - base[n] for n in matrices(base)},
        {n: base[n] for n in matrices(base)},
    ]
    found["wudi, merged"], _ = seconds(lambda: wudi_merging(vectors, "cpu", steps))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fusion-bench", type=Path, help="the Python of its environment")
    parser.add_argument("--vision", default="192,4,32,8", help="width, layers, pixels, patch")
    parser.add_argument("--images", type=int, default=256, help="as both programs take")
    parser.add_argument("--wudi-steps", type=int, default=300, help="0 leaves WUDI out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.side:
        run = {"ours": ours, "theirs": theirs}[given.side]
        print("\n" + json.dumps(run(given.folder, given.images, given.wudi_steps)))
        return
    pythons = {"ours": sys.executable, "theirs": given.fusion_bench}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), [int(number) for number in given.vision.split(",")], given.images)
        asked = ["--folder", name, "--images", str(given.images), "--threads", str(given.threads)]
        asked += ["--wudi-steps", str(given.wudi_steps)]
        took = {
            side: json.loads(
                subprocess.run(
                    [str(python), __file__, "--side", side, *asked],
                    check=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                ).stdout.splitlines()[-1]
            )
            for side, python in pythons.items()
            if python is not None
        }
    if "theirs" in took and PLAIN in took["ours"]:
        took["theirs"][PLAIN] = took["ours"].pop(PLAIN)
        took["ours"][PLAIN] = took["ours"]["wudi, merged"]
    print(f"{'processor seconds':28}{'weightops':>10}{'beside':>13}{'ratio':>8}")
    rows = {}
    for what, own in took["ours"].items():
        other = took.get("theirs", {}).get(what)
        ratio = f"{other:13.3f}{other / own:8.2f}" if other else ""
        print(f"{what:28}{own:10.3f}{ratio}")
        if other:
            rows[what] = [round(own, 3), round(other, 3), round(other / own, 2)]
    if rows:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        known[given.vision] = {"images": given.images, "threads": given.threads, "rows": rows}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
