"""Merge language models with TIES, and write the merge as a recipe.

python merge_language_models.py BASE MODEL [MODEL ...] OUT

Each model is a folder of transformers or a repository of the Hub. Memory stays small whatever the
models' size: tensors are read, merged and written piece by piece.
"""

import sys
from pathlib import Path

from weightops import Recipe

base, *models, out = sys.argv[1:]
recipe = Recipe(
    models=tuple(models),
    method="ties",
    base=base,
    alpha=[0.8, 1.0],  # from the first layer to the last
    options={"density": 0.2},
)
Path(f"{out}.yaml").write_text(recipe.to_yaml(), encoding="utf-8")

merged = recipe.merge()
takes = merged.estimate(out)
print(f"reads {takes.bytes_read / 1e6:,.0f} MB, writes {takes.bytes_written / 1e6:,.0f} MB")
merged.save(out, max_shard_size=5_000_000_000)
print(f"{out}: {recipe.method} of {len(models)} models; {out}.yaml is the recipe")
