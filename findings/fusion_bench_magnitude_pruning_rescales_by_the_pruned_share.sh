#!/bin/sh
# fusion_bench==0.2.33, torch==2.13.0, CPU. MagnitudeDiffPruningAlgorithm(prune_ratio, rescale): of the difference
# between a fine-tuned model and its base, the smallest elements are dropped.
# Expected: prune_ratio 0.1 drops a tenth, and rescale=True divides the rest by the share that is kept, 0.9, as DARE
# does, so that little pruning means little rescaling; rescale=False doesn't rescale.
# Seen: rescale=True divides by the share that is dropped: with a tenth pruned the difference is 10 times what was
# trained, with nine tenths pruned 1.11 times. rescale=False multiplies it by False, so the result is the base, whatever
# prune_ratio. rescale=None doesn't rescale. No error, no warning. Exits 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q fusion_bench==0.2.33 torch==2.13.0 transformers==5.24.0
cat > "$folder/try.py" <<'PY'
import copy
import sys

import torch
from fusion_bench import BaseModelPool
from fusion_bench.method.pruning.magnitude_diff_pruning import MagnitudeDiffPruningAlgorithm

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(20, 8))
tuned = copy.deepcopy(base)
tuned[0].weight.data += 0.01 * torch.randn(8, 20)
trained = (tuned[0].weight - base[0].weight).detach()
lines, as_said = [], []
for ratio in (0.1, 0.5, 0.9):
    for rescale in (None, True, False):
        pool = BaseModelPool({"_pretrained_": copy.deepcopy(base), "tuned": copy.deepcopy(tuned)})
        pruned = MagnitudeDiffPruningAlgorithm(prune_ratio=ratio, rescale=rescale).run(pool)
        change = (pruned[0].weight - base[0].weight).detach()
        kept = change != 0
        share = float(kept.float().mean())
        times = float((change[kept] / trained[kept]).median()) if share else 0.0
        lines.append(f"pruned {ratio}, rescale {rescale}: {share:.0%} left, {times:.2f} times what was trained")
        want = {None: 1, True: 1 / ratio, False: 0}[rescale]
        as_said.append(abs(times - want) < 0.01 and (rescale is False or abs(share - 1 + ratio) < 0.01))
print("\n".join(lines))
sys.exit(not all(as_said))
PY
"$folder/venv/bin/python" "$folder/try.py"
