#!/bin/sh
# pillow==13.0.0. One picture with EXIF orientation 6, saved as TIFF, PNG and WebP; and the loop of many data loaders: open,
# read the orientation, turn the pixels by it, convert to RGB.
# Expected: Image.open leaves pixels as they are stored, for every format, so that the three end up alike; and without
# the turn (as torchvision's ImageFolder and CLIP_benchmark read pictures) all three stay as they are stored.
# Seen: a TIFF is turned by load() itself, which also removes the orientation: it ends up turned twice (6 twice is upside
# down), and a data set of TIFFs is upright where the same data set of PNGs lies on its side.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 numpy==2.4.6
cat > "$folder/try.py" <<'PY'
import sys
import tempfile

import numpy
from PIL import Image

stored = numpy.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=numpy.uint8)
exif = Image.Exif()
exif[0x0112] = 6  # to be turned by 270 degrees anticlockwise
upright = numpy.asarray(Image.fromarray(stored).transpose(Image.Transpose.ROTATE_270))
seen = {}
for kind in ("png", "webp", "tiff"):
    path = f"{tempfile.mkdtemp()}/photo.{kind}"
    Image.fromarray(stored).save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    image = Image.open(path)
    before = image.getexif().get(0x0112)
    turned = numpy.asarray(image.transpose(Image.Transpose.ROTATE_270).convert("RGB"))
    plain = numpy.asarray(Image.open(path).convert("RGB"))
    after = image.getexif().get(0x0112)
    seen[kind] = (numpy.array_equal(plain, stored), numpy.array_equal(turned, upright), before, after)
    print(f"{kind}: as stored {seen[kind][0]}, upright after the turn {seen[kind][1]}, "
          f"orientation before {before}, after {after}")
right = (True, True, 6, 6)
sys.exit(not (seen["png"] == seen["webp"] == right and seen["tiff"] == (False, False, 6, None)))
PY
"$folder/venv/bin/python" "$folder/try.py"
rm -rf "$folder"
