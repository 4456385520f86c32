"""The pictures that an edit changed the guess of, by task and by what happened to them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.errors import printable
from weightops.support.lazy import torch
from weightops.support.text import file_name
from weightops.tasks.task import Images, Task

if TYPE_CHECKING:
    from weightops.search.session import Measured

ALL_PICTURES = "changed.html"
"""The name of the page with all of the pictures."""

FEW = 8
"""The largest number of pictures of a group that the page of the result shows."""

_SIDE, _SMALL = 96, 64
"""Pixels of a picture's longer side, and up to which it is stored without loss."""


@dataclass(frozen=True)
class Picture:
    """A picture whose guess an edit has changed.

    Attributes:
        truth: the name of its class.
        before: the base's guess.
        after: the edit's guess.
        image: the picture as an address.
    """

    truth: str
    before: str
    after: str
    image: str


@dataclass(frozen=True)
class Group:
    """The pictures of a task to which the edit did the same.

    Attributes:
        key: its place in a page's address.
        heading: the number and what happened, such as "mnist: 281 fixed".
        count: the number of all of them.
        pictures: some of them.
    """

    key: str
    heading: str
    count: int
    pictures: Sequence[Picture]


class Changes:
    """Changes of the guesses on the test images of a task, by an edit.

    Args:
        task: the task.
        base: the scores of the base.
        edited: the scores of the edited model.
        forget: whether the edit was to make the task's accuracy low.

    Attributes:
        task: the task.
        forget: whether the edit was to make the task's accuracy low.
    """

    def __init__(self, task: Task, base: Measured, edited: Measured, *, forget: bool) -> None:
        self.task, self.forget = task, forget
        self._guesses = base.guesses[task.name], edited.guesses[task.name]
        change = edited.hits[task.name].int() - base.hits[task.name].int()
        self._indices = [_where(change == sign) for sign in ((-1, 1) if forget else (1, -1))]

    @property
    def words(self) -> tuple[str, str]:
        """The word for what was asked for, and for its opposite."""
        return ("forgotten", "remembered") if self.forget else ("fixed", "broken")

    @property
    def counts(self) -> tuple[int, int]:
        """The number of pictures for which what was asked for happened, and the opposite."""
        asked, opposite = map(len, self._indices)
        return asked, opposite

    @property
    def text(self) -> str:
        """The counts in words, such as "281 fixed, 4 broken"."""
        return ", ".join(f"{n:,} {word}" for n, word in zip(self.counts, self.words, strict=True))

    def groups(self, most: int = FEW) -> list[Group]:
        """Return the groups that have pictures, with at most so many of these each."""
        return [
            Group(
                f"{file_name(self.task.name)}-{word}",
                f"{self.task.name}: {len(indices):,} {word}",
                len(indices),
                [self._picture(i) for i in _spread(indices, most)],
            )
            for word, indices in zip(self.words, self._indices, strict=True)
            if indices
        ]

    def write_all(self) -> Iterator[str]:
        """Yield the HTML of all groups, one picture after another."""
        for group, indices in zip(self.groups(0), filter(None, self._indices), strict=True):
            yield f'<section><h2 id="{escape(group.key)}">{escape(printable(group.heading))}</h2>\n'
            yield '<div class="pictures">\n'
            for i in indices:
                yield figure(self._picture(i)) + "\n"
            yield "</div></section>\n"

    @cached_property
    def _images(self) -> Images:
        return self.task.load("test")

    def _picture(self, index: int) -> Picture:
        images, classes = self._images, self.task.classes
        before, after = (classes[int(guesses[index])] for guesses in self._guesses)
        truth = classes[int(images.labels[index])]
        return Picture(truth, before, after, data_url(images[index]))


def _spread(indices: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the indices, evenly spread."""
    count = min(most, len(indices))
    return [indices[k * len(indices) // count] for k in range(count)]


def _where(mask: torch.Tensor) -> list[int]:
    found: list[int] = mask.nonzero().flatten().tolist()
    return found


def write_all_pictures(path: Path, title: str, style: str, changes: Sequence[Changes]) -> None:
    """Write the page of all pictures, one picture after another."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = escape(printable(title))
    with path.open("w", encoding="utf-8") as file:
        file.write(f'<!doctype html>\n<html lang="en"><head>{head}<title>{title}</title>\n')
        file.write(f"<style>{style}</style></head>\n<body><main>\n<h1>{title}</h1>\n")
        file.write('<p><a href="report.html">Back to the results</a></p>\n')
        for one in changes:
            file.writelines(one.write_all())
        file.write("</main></body></html>\n")


def figure(picture: Picture) -> str:
    """Return the HTML of a picture, with its truth and both guesses in words."""
    truth, before, after = (
        escape(printable(text)) for text in (picture.truth, picture.before, picture.after)
    )
    taken = f"taken for {after}" if picture.truth != picture.after else f"taken for {before} before"
    marks = ["right" if guess == truth else "wrong" for guess in (before, after)]
    return (
        f'<figure><img loading="lazy" alt="{truth}, {taken}" src="{picture.image}">'
        f'<figcaption>{truth}<br><span class="{marks[0]}">{before}</span> → '
        f'<span class="{marks[1]}">{after}</span></figcaption></figure>'
    )


def data_url(image: Any) -> str:
    """Return a small copy of an image that a page can contain."""
    return "data:image/webp;base64," + base64.b64encode(thumbnail(image)).decode()


def thumbnail(image: Any) -> bytes:
    """Return a small copy of an image as WebP."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    lossless: Mapping[str, Any] = {"lossless": max(small.size) <= _SMALL}
    small.save(content, "WEBP", quality=80, **lossless)
    return content.getvalue()
