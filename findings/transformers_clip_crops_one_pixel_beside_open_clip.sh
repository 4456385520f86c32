#!/bin/sh
# transformers==5.24.0, open_clip_torch==3.3.0, torch==2.14.1, CPU. The centre crop of CLIP's preprocessing, on heights
# of 224 to 424.
# Expected: CLIPImageProcessor and open_clip cut out the same 224 rows, as they resize alike and serve the same weights.
# Seen: where 3 is left when the rows to drop are divided by four (227, 231, ...; every fourth size), open_clip begins
# one row lower: torchvision rounds 57.5 to 58, transformers takes 57. Otherwise they agree, so a test on two or three
# pictures passes.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q open_clip_torch==3.3.0 torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

import numpy
from open_clip.transform import image_transform
from PIL import Image
from transformers import CLIPImageProcessor

by_open_clip = image_transform(224, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
processor = CLIPImageProcessor(do_normalize=False)
first_rows = {}
for height in range(224, 425):
    rows = numpy.arange(height).reshape(-1, 1, 1) % 256
    image = Image.fromarray(numpy.broadcast_to(rows, (height, 224, 3)).astype(numpy.uint8))
    ways = (by_open_clip(image), processor(image, return_tensors="pt")["pixel_values"][0])
    first_rows[height] = [round(float(pixels[0, 0, 0]) * 255) for pixels in ways]
apart = {height: rows for height, rows in first_rows.items() if rows[0] != rows[1]}
print(len(apart), "of", len(first_rows), "heights differ; first rows (open_clip, transformers):")
print({height: apart[height] for height in list(apart)[:4]})
every_fourth = list(apart) == [height for height in first_rows if (height - 224) % 4 == 3]
sys.exit(not (every_fourth and all(a == b + 1 for a, b in apart.values())))
PY
"$folder/venv/bin/python" "$folder/try.py"
