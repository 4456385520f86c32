#!/bin/sh
# timm==1.0.24, torch==2.14.1. A folder that timm.models.save_for_hf writes (config.json, model.safetensors).
# Expected: timm.create_model("local-dir:FOLDER", pretrained=True) loads it, as "hf-hub:" loads the same files.
# Seen: the .safetensors file is found first, and given to torch.load, which fails. timm 1.0.26 loads it.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q timm==1.0.24 torch==2.14.1 torchvision==0.29.1
cat > "$folder/try.py" <<'PY'
import sys

import timm

model = timm.create_model("test_vit", pretrained=False)
timm.models.save_for_hf(model, f"{sys.argv[1]}/saved", safe_serialization=True)
try:
    timm.create_model(f"local-dir:{sys.argv[1]}/saved", pretrained=True)
except Exception as error:
    print(timm.__version__, type(error).__name__)
    sys.exit(0)
print(timm.__version__, "loaded")
sys.exit(1)
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
"$folder/venv/bin/pip" install -q timm==1.0.26
if "$folder/venv/bin/python" "$folder/try.py" "$folder"; then exit 1; fi
