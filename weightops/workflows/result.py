"""The edit that a workflow chooses, and its one measurement on test data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightops.search.goal import Coefficients
from weightops.search.session import EditSession, Measured, Vectors, weighted_sum
from weightops.task_vector import TaskVector
from weightops.tasks.task import Task


@dataclass
class EditResult:
    """The vectors that a workflow has learned, and the coefficients that it has chosen.

    Attributes:
        vectors: name -> vector; the edit is their sum, weighted by ``alpha``.
        alpha: one coefficient for each vector.
        why: the reason for these coefficients, in one sentence.
        sweep: all edits that were measured in full on validation data.
        rivals: name -> the vectors, each with its tasks, that test data compare the edit with.
        more: further entries of the summary.
    """

    vectors: Vectors
    alpha: Coefficients
    why: str
    sweep: list[Measured]
    rivals: dict[str, list[tuple[TaskVector, list[Task]]]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def edit(self) -> TaskVector:
        """Return the chosen edit."""
        return weighted_sum(self.vectors, self.alpha)

    @property
    def named_alpha(self) -> float | dict[str, float]:
        """Return the one coefficient, or name -> coefficient for several."""
        if len(self.alpha) == 1:
            return self.alpha[0]
        return dict(zip(self.vectors, self.alpha, strict=True))


def confirm(
    session: EditSession, result: EditResult, word: str = "edited", *, with_base: bool = True
) -> dict[str, Measured]:
    """Measure the base, the rivals and the edit on the test splits: the only use of these.

    Args:
        session: the session.
        result: the edit and its rivals.
        word: the name of the edit.
        with_base: whether what the session edits is a base, not just the first of several models.

    Returns:
        Name of a model -> its measured scores, those of ``word`` last.
    """
    measured = {}
    if with_base:
        zero = (0.0,) * len(result.alpha)
        base = weighted_sum(result.vectors, zero)
        measured["base"] = session.measure(base, "test", coefficients=zero)
    for name, parts in result.rivals.items():
        measured[name] = _measure_rival(session, result, parts)
    measured[word] = session.measure(result.edit, "test", coefficients=result.alpha)
    return measured


def _measure_rival(
    session: EditSession, result: EditResult, parts: Sequence[tuple[TaskVector, list[Task]]]
) -> Measured:
    """Measure each vector of a rival on its own tasks, and join the scores."""
    measured = []
    for vector, tasks in parts:
        is_own = [other is vector for other in result.vectors.values()]
        coefficients = tuple(map(float, is_own)) if any(is_own) else ()
        measured.append(session.measure(vector, "test", tasks, coefficients))
    return Measured(
        measured[0].coefficients if len(parts) == 1 else (),
        _joined(m.scores for m in measured),
        _joined(m.hits for m in measured),
        _joined(m.guesses for m in measured),
        measured[0].fingerprint,
    )


def _joined(mappings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for mapping in mappings for key, value in mapping.items()}
