#!/bin/sh
# tqdm==4.70.1. A bar with delay=60 and leave=False, updated three times at once, with set_postfix after each step.
# Expected: nothing is written, as without set_postfix: the bar isn't shown in its first 60 seconds, and is cleared at
# its end.
# Seen: set_postfix (and set_description) draw the bar at once, whatever the delay. And as `close` takes a bar that ends
# before its delay for one that was never drawn, it doesn't clear it: "100%|###| 3/3 [..., loss=2]" stays in the line.
# Each short run of a training loop that shows its loss leaves a bar behind.
# Exits 1 if the behaviour has changed.
set -e
work=$(mktemp -d)
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tqdm==4.70.1
"$work/venv/bin/python" - <<'EOF'
import io
import sys

from tqdm import tqdm


def written(postfix):
    text = io.StringIO()
    with tqdm(total=3, file=text, delay=60, leave=False, ncols=60) as bar:
        for step in range(3):
            bar.update()
            if postfix:
                bar.set_postfix(loss=step)
    return text.getvalue()


plain, with_postfix = written(False), written(True)
last = with_postfix.split("\r")[-1]
print("without set_postfix:", repr(plain))
print("with set_postfix, what is left in the line:", repr(last))
sys.exit(not (plain == "" and "3/3" in last))
EOF
