"""Compare zero-shot scores with CLIP_benchmark's: same model, images and prompts, float32.

    pip install '.[demo]' 'numpy<2.4' && pip install --no-deps clip-benchmark
    python benchmarks/clip_benchmark_parity.py

CLIP_benchmark is given the embedded model as stock open_clip loads it, and the pictures through a
plain DataLoader.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import open_clip
import torch
from clip_benchmark.metrics import zeroshot_classification
from torch.utils.data import DataLoader, Dataset

from weightops import TASKS, ImageModel, Task, evaluate, open_checkpoint


class Pictures(Dataset):
    def __init__(self, task: Task, preprocess: object) -> None:
        self.images, self.preprocess, self.classes = task.load("test"), preprocess, task.classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.preprocess(self.images[index]), int(self.images.labels[index])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = open_checkpoint("embedded").save(Path(folder, "clip"))
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{path}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{path}")
        model.eval()
        clip = ImageModel.open("embedded", "cpu", precision="float32")
        results = {}
        for name, task in TASKS.items():
            templates = [template.replace("{}", "{c}") for template in task.templates]
            loader = DataLoader(Pictures(task, preprocess), batch_size=256)
            theirs = zeroshot_classification.evaluate(
                model, loader, tokenizer, list(task.classes), templates, "cpu", amp=False
            )
            ours = evaluate(clip, name)[name]
            same = all(
                math.isclose(ours[k], v, abs_tol=1e-12) or (math.isnan(v) and math.isnan(ours[k]))
                for k, v in theirs.items()
            )
            results[name] = {
                "weightops": {k: ours[k] for k in theirs},
                "clip_benchmark": theirs,
                "same": same,
            }
            print(
                f"{name:10} acc1 {ours['acc1']:.4f} / {theirs['acc1']:.4f}  same: {same}",
                flush=True,
            )
    out = Path(__file__).parent / "results" / "clip_benchmark_parity.json"
    out.write_text(json.dumps(results, indent=2, default=float).replace("NaN", "null") + "\n")


if __name__ == "__main__":
    main()
