#!/bin/sh
# datasets==5.2.0. cast_column("label", ClassLabel(names=["dog", "cat"])) of a column with the classes ["cat", "dog"],
# to give two fine-tuning sets the same class order.
# Expected: a cat stays a cat, as it does when the column holds the names as strings; or a refusal, as
# concatenate_datasets refuses to join the two orders.
# Seen: the numbers stay and get the other names, so every cat is a dog now; without a warning.
# align_labels_with_mapping is right.
# Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 numpy
cat > "$folder/try.py" <<'PY'
import sys

from datasets import ClassLabel, Dataset, concatenate_datasets

other_order = ClassLabel(names=["dog", "cat"])
strings = Dataset.from_dict({"label": ["cat", "dog", "dog"]})
classes = strings.cast_column("label", ClassLabel(names=["cat", "dog"]))


def names(data):
    return data.features["label"].int2str(data["label"][:])


seen = {
    "from strings": names(strings.cast_column("label", other_order)),
    "from classes": names(classes.cast_column("label", other_order)),
    "aligned": names(classes.align_labels_with_mapping({"dog": 0, "cat": 1}, "label")),
}
print(seen)
refused = False
try:
    concatenate_datasets([classes, strings.cast_column("label", other_order)])
except ValueError:
    refused = True
print("concatenate_datasets refuses:", refused)
right, wrong = ["cat", "dog", "dog"], ["dog", "cat", "cat"]
sys.exit(not (refused and seen == {"from strings": right, "from classes": wrong, "aligned": right}))
PY
HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" "$folder/try.py"
