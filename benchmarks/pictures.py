"""Measure the one decoding of pictures: 21 alphas against one decoding plus 21 bare passes.

    python benchmarks/pictures.py                  # a trial, in a minute
    python benchmarks/pictures.py --images 10000   # JPEGs of 500 x 375, models of 224 pixels

The pictures are drawn noise with the detail of photographs; the model is a CLIP of open_clip's with
random weights. Nothing of prepared pictures is kept in memory: they are read from the cache's file.
Seconds are of the clock, and in brackets of all processors together, which other programs on the
machine change less. The ratios are written to results/pictures.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from weightops import Checkpoint, TaskVector, open_checkpoint
from weightops.algebra.precision import computed_in
from weightops.checkpoints.libraries.open_clip import OpenClipArchitecture
from weightops.evaluation import image_model
from weightops.search.goal import Goal
from weightops.search.session import EditSession
from weightops.tasks.folder import folder_task

RESULTS = Path(__file__).parent / "results"
ALPHAS = [round(0.05 * i, 2) for i in range(21)]


def draw(folder: Path, count: int) -> None:
    """Write pictures of two classes: all but a few of them for validation."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", count), ("test", 8)):
        for name in ("one", "two"):
            (folder / split / name).mkdir(parents=True)
        for i in range(number):
            coarse = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
            picture = coarse.resize((500, 375), Image.Resampling.BICUBIC)
            picture.save(folder / split / ("one", "two")[i % 2] / f"{i}.jpg", quality=90)


def build(folder: Path, layers: int, width: int) -> Checkpoint:
    """Write a model of 224 pixels with random weights."""
    open_checkpoint("embedded").save(folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    size = {"image_size": 224, "patch_size": 32, "layers": layers, "width": width}
    config["model_cfg"]["vision_cfg"] = {**size, "head_width": 64}
    config["preprocess_cfg"] = {**config.get("preprocess_cfg", {}), "resize_mode": "shortest"}
    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    architecture = OpenClipArchitecture(folder)
    model = Checkpoint(open_checkpoint(architecture.build()).form, architecture)
    model.save(folder, overwrite=True)
    return open_checkpoint(folder)


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return the seconds of the clock and of the processors that work takes, and its result."""
    clock, processors = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - clock, time.process_time() - processors, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    given = parser.parse_args()
    image_model.PIXEL_BUDGET = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WEIGHTOPS_CACHE"] = f"{folder}/cache"
        draw(Path(folder, "photos"), given.images)
        model = build(Path(folder, "model"), given.layers, given.width)
        task = folder_task(Path(folder, "photos"))
        tuned = {n: t + 1e-3 if t.is_floating_point() else t for n, t in model.items()}
        vector = TaskVector(model, tuned)

        images = task.load("validation")
        session = EditSession(model, [task], device="cpu", precision="float32")
        steps = session.model.preprocess

        def decode(threads: int) -> torch.Tensor:
            with ThreadPoolExecutor(threads) as pool:
                return torch.stack(list(pool.map(lambda i: steps(images[i]), range(len(images)))))

        one_thread = timed(lambda: decode(1))
        decoding = timed(lambda: decode(os.cpu_count() or 1))
        batches = decoding[2].split(256)
        module = session.model.module.eval()

        def bare() -> None:
            with torch.no_grad(), computed_in("float32", batches[0].device):  # as the sweep does
                for _ in ALPHAS:
                    for batch in batches:
                        module.encode_image(batch)

        passes = timed(bare)

        def sweep() -> None:
            trial = session.trial({"vector": vector}, Goal({task.name: 1.0}))
            for alpha in ALPHAS:
                trial.measurements.measure((alpha,))

        first = timed(sweep)
        session = EditSession(model, [task], device="cpu", precision="float32")
        second = timed(sweep)
        pixels = EditSession(model, [task], device="cpu", precision="float32").model.pixels(
            task, "validation"
        )
        same = torch.equal(pixels.batch(np.arange(len(images))), decoding[2])
        with tempfile.TemporaryDirectory() as other:
            os.environ["WEIGHTOPS_CACHE"] = other
            fresh = EditSession(model, [task], device="cpu", precision="float32").model
            preparing = timed(lambda: fresh.pixels(task, "validation").prepare())

    for name, (clock, processors, _) in {
        "decoding, one thread": one_thread,
        f"decoding, {os.cpu_count()} threads": decoding,
        "decoding into the cache": preparing,
        "21 bare forward passes": passes,
        "21 alphas, pictures new": first,
        "21 alphas, pictures prepared": second,
    }.items():
        print(f"{name:30} {clock:8.2f} s ({processors:.2f})")
    shares = [first[i] / (decoding[i] + passes[i]) for i in range(2)]
    row = {
        "pictures": given.images,
        "21 alphas over one decoding and 21 bare passes": round(shares[0], 3),
        "the same of the processors": round(shares[1], 3),
        "decoding on one thread over that into the cache": round(one_thread[0] / preparing[0], 2),
    }
    for what, value in row.items():
        print(f"{what}: {value}")
    (RESULTS / "pictures.json").write_text(json.dumps(row, indent=2) + "\n")
    print(f"the same bits as without the cache: {same}")


if __name__ == "__main__":
    main()
