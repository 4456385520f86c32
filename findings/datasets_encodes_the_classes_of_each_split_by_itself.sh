#!/bin/sh
# datasets==5.2.0. DatasetDict.class_encode_column("label") turns a column of class names into numbers, for a set of
# three classes whose test split has images of two of them.
# Expected: one numbering for the dictionary, or an error, as concatenate_datasets raises for unequal names.
# Seen: each split gets a numbering of its own, of the names that it holds. "dog" is 1 in train, 0 in test, so a
# model that is right in all of the test images scores 0, and a head fine-tuned on train fits nothing in test. No error, no
# warning; train.features["label"] alone shows nothing.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0
cat > "$folder/try.py" <<'PY'
import sys

import datasets

datasets.disable_progress_bars()
splits = datasets.DatasetDict(
    train=datasets.Dataset.from_dict({"label": ["cat", "dog", "owl", "dog"]}),
    test=datasets.Dataset.from_dict({"label": ["owl", "dog"]}),
)
encoded = splits.class_encode_column("label")
for name, split in encoded.items():
    print(name, splits[name]["label"][:], split["label"][:], split.features["label"].names)
learnt = dict(zip(splits["train"]["label"], encoded["train"]["label"]))
predicted = [learnt[name] for name in splits["test"]["label"]]
scores = [p == y for p, y in zip(predicted, encoded["test"]["label"])]
print("accuracy of a model without errors:", sum(scores) / len(scores))
sys.exit(encoded["test"]["label"][:] != [1, 0] or any(scores))
PY
"$folder/venv/bin/python" "$folder/try.py"
