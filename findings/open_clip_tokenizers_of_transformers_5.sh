#!/bin/sh
# open_clip_torch==3.2.0 with transformers==5.24.0. open_clip 3.2 states no upper bound for transformers.
# Expected: a tokenizer of transformers that open_clip.get_tokenizer makes can be called, or isn't made.
# Seen: it is made without a word, and the first call fails: it asks for batch_encode_plus, which transformers 5 removed.
# open_clip 3.3.0 calls the tokenizer itself, and works. Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q open_clip_torch==3.2.0 transformers==5.24.0 torch==2.14.1 torchvision==0.29.1
cat > "$folder/try.py" <<'PY'
import json
import pathlib
import sys

import open_clip

folder = pathlib.Path(sys.argv[1], "model")
folder.mkdir(exist_ok=True)
words = {"<s>": 0, "</s>": 1, "a": 2, "cat": 3}
model = {"type": "WordLevel", "vocab": words, "unk_token": "</s>"}
(folder / "tokenizer.json").write_text(
    json.dumps({"version": "1.0", "added_tokens": [], "normalizer": None, "truncation": None, "padding": None,
                "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model})
)
(folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "</s>", "model_max_length": 8})
)
text = {"context_length": 8, "vocab_size": 4, "width": 8, "heads": 1, "layers": 1, "hf_tokenizer_name": "here"}
config = {"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": text}, "preprocess_cfg": {}}
(folder / "open_clip_config.json").write_text(json.dumps(config))
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
try:
    print(tokenizer(["a cat"]))
except AttributeError as error:
    print(type(error).__name__, error)
    sys.exit("batch_encode_plus" not in str(error))
sys.exit(1)
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
"$folder/venv/bin/pip" install -q open_clip_torch==3.3.0
if "$folder/venv/bin/python" "$folder/try.py" "$folder"; then exit 1; fi
