"""Measure on CUDA: evaluation, an alpha of a resident edit, fine-tuning and merges.

    python benchmarks/gpu.py

It says on which device, and refuses without one. ViT-B/32 has random weights, and pictures are
random: only times are measured. `--device cpu --small` runs all of it, for its test.

evaluation: images a second of `predict` with prepared pictures, and as a share of those of a plain
forward pass in the same precision on images that are on the device. alpha: milliseconds to set a
model to base + alpha * vector, both on the device. fit: steps a second. merges: seconds to merge
four models on the device, and as a multiple of the time that their bytes take to come over the bus.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from weightops import ImageModel, TaskVector, TrainingConfig, fit, merge, open_checkpoint
from weightops.algebra.precision import computed_in
from weightops.evaluation.zero_shot import predict
from weightops.reports.outcome import versions
from weightops.tasks.task import Task
from weightops.training.learners import ImageLearner

RESULTS = Path(__file__).parent / "results"
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
CLASSES = tuple(f"class {i}" for i in range(10))


class Noise:
    """Random pictures of one size, in memory."""

    def __init__(self, count: int, size: int) -> None:
        self.labels = np.arange(count) % len(CLASSES)
        self._pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> object:
        from PIL import Image

        return Image.fromarray(self._pixels[index])


def median_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median of the seconds that a call takes until the device has finished."""
    taken = []
    for _ in range(rounds + 1):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def opened(small: bool, device: str, folder: Path) -> ImageModel:
    """Return the model, with random weights."""
    torch.manual_seed(0)
    config = TINY if small else open_clip.get_model_config("ViT-B-32")
    module = open_clip.model.CLIP(**config)
    content = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    open_checkpoint(module).save(folder / "open_clip_model.safetensors")
    return ImageModel.open(folder, device)


def evaluation(model: ImageModel, task: Task, rounds: int) -> dict[str, object]:
    """Measure `predict` beside a plain forward pass on images that are on the device."""
    count, batch = len(task.load("test")), 256
    pixels, head = model.pixels(task, "test"), model.class_features(task)
    images = pixels.batch(np.arange(count)).to(model.device)

    @torch.no_grad()
    def plain() -> None:
        with computed_in(model.precision, model.device):
            for part in images.split(batch):
                features = F.normalize(model.module.encode_image(part).float(), dim=-1)
                (features @ head.T).argmax(1)

    ours = median_seconds(lambda: predict(model, task, "test"), model.device, rounds)
    theirs = median_seconds(plain, model.device, rounds)
    return {
        "images_a_second": round(count / ours, 1),
        "plain_images_a_second": round(count / theirs, 1),
        "share": round(theirs / ours, 3),
    }


def alpha(model: ImageModel, rounds: int) -> dict[str, object]:
    """Measure an alpha with base and vector on the device."""
    base = {name: t.detach().clone() for name, t in model.module.state_dict().items()}
    tuned = {name: t + 1e-3 if t.is_floating_point() else t for name, t in base.items()}
    vector = TaskVector(base, tuned)
    seconds = median_seconds(
        lambda: vector.apply_(model.module, 0.4, base=base), model.device, rounds
    )
    return {"milliseconds": round(1000 * seconds, 3)}


def fitting(model: ImageModel, task: Task, steps: int, rounds: int) -> dict[str, object]:
    """Measure steps of fine-tuning."""
    config = TrainingConfig(steps=steps, batch_size=min(128, len(task.load("train"))))
    learner = ImageLearner(model, task)
    seconds = median_seconds(lambda: fit(learner, config), model.device, rounds)
    return {"steps_a_second": round(steps / seconds, 2), "batch": config.batch_size}


def merges(model: ImageModel, rounds: int) -> dict[str, object]:
    """Measure merges of four models that are on the device, beside the bus."""
    base = {name: t.detach().clone() for name, t in model.module.state_dict().items()}
    models = [{n: t * (1 + 0.01 * i) for n, t in base.items()} for i in range(4)]
    host = {name: tensor.cpu() for name, tensor in base.items()}
    bus = 4 * median_seconds(
        lambda: {n: t.to(model.device, copy=True) for n, t in host.items()}, model.device, rounds
    )
    found: dict[str, object] = {"bus_seconds": round(bus, 4)}
    for method, options in (("linear", {}), ("ties", {"base": base, "density": 0.2})):
        seconds = median_seconds(
            lambda method=method, options=options: merge(models, method, **options),  # type: ignore[misc]
            model.device,
            rounds,
        )
        found[method] = {"seconds": round(seconds, 4), "over_bus": round(seconds / bus, 2)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model and few pictures")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("-o", "--out", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; nothing was measured", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    count, size = (8, 16) if args.small else (5120, 224)
    pictures = Noise(count, size)
    task = Task(
        "noise",
        CLASSES,
        ("a photo of a {}.",),
        load=lambda split: pictures,
        sizes=dict.fromkeys(("train", "validation", "test"), count),
        source="noise",
        license="none",
    )
    with tempfile.TemporaryDirectory() as folder:
        model = opened(args.small, args.device, Path(folder))
        found = {
            "device": name,
            "precision": model.precision,
            "model": "tiny" if args.small else "ViT-B/32, random weights",
            "evaluation": evaluation(model, task, args.rounds),
            "alpha": alpha(model, args.rounds),
            "fit": fitting(model, task, 2 if args.small else 50, min(args.rounds, 3)),
            "merges": merges(model, args.rounds),
            "versions": versions(),
        }
    print(json.dumps(found, indent=2))
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
