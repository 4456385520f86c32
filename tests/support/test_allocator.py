import subprocess
import sys

import pytest

from weightops.support.allocator import keep_freed_memory

_COUNT = """
import resource, sys
import torch
from weightops.algebra.precision import computed_in

if sys.argv[1] == "kept":
    with computed_in("float32", torch.device("cpu")):
        pass
torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", _COUNT, how], check=True, capture_output=True, text=True
    )
    return int(run.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library isn't GNU's")
def test_what_a_pass_frees_is_there_for_the_next() -> None:
    assert faults("kept") * 4 < faults("plain")
