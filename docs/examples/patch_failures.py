"""Patch a CLIP model on a folder of pictures that it gets wrong.

python patch_failures.py MODEL FAILURES OUT SUPPORTED [SUPPORTED ...] [--steps N]

FAILURES holds a folder for each right answer: FAILURES/CLASS/*.png. Each SUPPORTED is a folder
like it, or the name of a task, that must stay as good. Their mean may drop by at most one point.
"""

import argparse

from weightops import NothingSatisfiesError, config_for, patch

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("failures")
parser.add_argument("out")
parser.add_argument("supported", nargs="+")
parser.add_argument("--steps", type=int)
parser.add_argument("--max-supported-drop", type=float, default=0.01)
arguments = parser.parse_args()

try:
    summary = patch(
        arguments.failures,
        arguments.out,
        model=arguments.model,
        supported=arguments.supported,
        max_supported_drop=arguments.max_supported_drop,
        training=config_for(arguments.model, steps=arguments.steps),
    )
except NothingSatisfiesError as error:
    raise SystemExit(f"no patch: {error}") from None

print(f"alpha {summary['alpha']}: {summary['why']}")
for name, task in summary["tasks"].items():
    before, after = task["base"]["acc1"], task["patched"]["acc1"]
    print(f"{name} ({task['role']}): {before:.1%} before, {after:.1%} after")
