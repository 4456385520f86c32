"""Texts as tasks: what language models are edited for, and measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from weightops.errors import TaskError
from weightops.tasks.task import SPLITS, Task

STRETCHES = 40
"""The parts that a text is cut into, which are dealt out to the splits."""
DEAL = ("train", "train", "validation", "test")
"""The splits of four stretches in a row."""


@dataclass(frozen=True, eq=False)
class TextTask(Task):
    """A text, for language models: the lower its perplexity, the better.

    Attributes:
        text: returns the text of a split; ``sizes`` are in characters.
    """

    text: Callable[[str], str] = str

    def reading(self, *splits: str) -> dict[str, Any]:
        return {"source": self.source}


def text_task(path: Path) -> TextTask:
    """Return the task of a text in UTF-8.

    The text is cut at line ends into 40 stretches of about equal length. Of each four in a row, two
    are for training, one is for validation and one is the test, whatever the text is used for.

    Raises:
        TaskError: if the file can't be read, or isn't a text of UTF-8.
    """
    text = read_text(path)
    parts = _dealt(text)

    def refuse(split: str) -> Any:
        raise TaskError(f"{path} is a text, and has no images", hint="a language model reads it")

    return TextTask(
        name=path.name,
        classes=(),
        templates=(),
        load=refuse,
        sizes={split: len(part) for split, part in parts.items()},
        source=f"the text {path} (sha256 {sha256(text.encode()).hexdigest()[:8]})",
        license="unknown",
        text=parts.__getitem__,
    )


def refuse_texts(tasks: Iterable[Task], why: str, hint: str = "") -> None:
    """Refuse texts where images are needed.

    Args:
        tasks: the tasks.
        why: why images are needed.
        hint: what to do instead.

    Raises:
        TaskError: naming the first text.
    """
    for task in tasks:
        if isinstance(task, TextTask):
            raise TaskError(f"{task.name} is a text, and {why}", hint=hint)


def joined_texts(tasks: Sequence[TextTask]) -> TextTask:
    """Return several texts as one."""
    return replace(
        tasks[0],
        name="+".join(task.name for task in tasks),
        sizes={split: sum(task.sizes[split] for task in tasks) for split in SPLITS},
        source="; ".join(task.source for task in tasks),
        text=lambda split: "\n".join(task.text(split) for task in tasks),
    )


def read_text(path: str | Path) -> str:
    """Return the content of a text file.

    Raises:
        TaskError: if the file can't be read, or isn't a text of UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TaskError(f"{path} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} can't be read as a text of UTF-8: {error}") from error


def _dealt(text: str) -> dict[str, str]:
    """Return the text of each split."""
    dealt: dict[str, list[str]] = {split: [] for split in DEAL}
    for i, stretch in enumerate(_stretches(text)):
        dealt[DEAL[i % len(DEAL)]].append(stretch)
    return {split: "".join(stretches) for split, stretches in dealt.items()}


def _stretches(text: str) -> Iterator[str]:
    """Yield stretches of about equal length, each to the end of a line if it has one."""
    start = 0
    for i in range(1, STRETCHES + 1):
        stop = max(start, i * len(text) // STRETCHES)
        longest = (i + 1) * len(text) // STRETCHES
        line_end = text.find("\n", max(stop - 1, 0), longest) + 1
        stop = len(text) if i == STRETCHES else line_end or stop
        yield text[start:stop]
        start = stop
