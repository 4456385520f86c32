#!/bin/sh
# open_clip_torch==3.3.0, torch==2.14.1, CPU. open_clip's preprocessing of one picture, as a palette PNG (mode P) and as
# RGB.
# Expected: the same pixels give the same model input, as they do in transformers' CLIPImageProcessor 5.24.0.
# Seen: it resizes first and converts to RGB afterwards, and Pillow resizes palette pictures by nearest neighbour: the
# two inputs differ by 0.8 standard deviations on random pixels, so a data set of palette PNGs is measured on other
# inputs. At 224 x 224, without a resize, the two are equal.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q open_clip_torch==3.3.0 torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import numpy
import open_clip
from open_clip.transform import image_transform
from PIL import Image
from transformers import CLIPImageProcessor

mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
by_open_clip = image_transform(224, is_train=False, mean=mean, std=std)
processor = CLIPImageProcessor()


def by_transformers(image):
    return processor(image, return_tensors="pt")["pixel_values"][0]


seen = {}
for size in (224, 448):
    pixels = numpy.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=numpy.uint8)
    palette = Image.fromarray(pixels).quantize(64)
    for name, way in (("open_clip", by_open_clip), ("transformers", by_transformers)):
        seen[name, size] = float((way(palette) - way(palette.convert("RGB"))).abs().mean())
        print(f"{name}, {size} x {size}: palette and RGB differ by {seen[name, size]:.3f} on average")
wrong = seen.pop(("open_clip", 448))
sys.exit(not (wrong > 0.3 and max(seen.values()) < 1e-3))
PY
"$folder/venv/bin/python" "$folder/try.py"
