"""The tasks of the built-in analogy: two halves of the alphabet in two styles."""

from __future__ import annotations

from weightops.tasks.derived import with_classes
from weightops.tasks.striped import STRIPED_LETTERS
from weightops.tasks.table import find_task

PLAIN = find_task("letters")
ANALOGY = tuple(
    with_classes(style, half, f"{style.name} {half[0]}-{half[-1]}")
    for half in (PLAIN.classes[:13], PLAIN.classes[13:])
    for style in (PLAIN, STRIPED_LETTERS)
)
"""Plain letters a-m are to striped letters a-m as plain letters n-z are to striped letters n-z."""
