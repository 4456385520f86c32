"""A model's weights with the rows of its embedding and head in the order of another vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from threading import Lock

from weightops.algebra.dtypes import accumulator
from weightops.algebra.kernels import PIECE
from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.algebra.provenance import provenance
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import ExpressionSource, Source, Spec
from weightops.engine.evaluate import buffered, reader
from weightops.engine.plan import plan
from weightops.support.lazy import torch

_ROWS = 4096
"""Rows that are summed at once for the mean of a table."""

_GAP = 16
"""Rows between two that are read rather than left out."""


class TokenRows(ExpressionSource):
    """Weights whose rows follow the tokens of another vocabulary.

    Args:
        form: the weights.
        own: the row in the form for each new row; -1 where the row comes from the donors.
        donors: forms, and their row for each new row, or -1. A new row that the form lacks is the
            mean of the donors' rows, or 0 where there is no donor.
        known: the number of rows that have a token; those after it are the mean of those before.
        names: the tensors that have a row for each token.
    """

    def __init__(
        self,
        form: LinearForm,
        own: torch.Tensor,
        donors: Sequence[tuple[LinearForm, torch.Tensor]],
        known: int,
        names: Sequence[str],
    ) -> None:
        self._form, self._own, self._donors, self._known = form, own, donors, known
        self._names = set(names)
        self.ref = " + ".join(source.ref for source in form.sources)
        self.specs = {
            name: Spec((len(own), *spec.shape[1:]), spec.dtype) if name in self._names else spec
            for name, spec in form.specs.items()
        }
        self.ties = tied_names(form)
        self._means: dict[str, torch.Tensor] = {}
        self._lock = Lock()

    def combination(self, name: str, scratch: Scratch) -> Mapping[Source, float] | None:
        return None if name in self._names else self._form.coefficients(name)

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        working = accumulator(self.specs[name].dtype)
        if name not in self._names:
            dtype = self.specs[name].dtype
            dtype = working if dtype.is_floating_point else dtype
            return buffered(reader(plan(self._form, [name]), scratch), dtype, scratch)
        rows = self._opened_rows(name, scratch.nested(self))
        width = self.specs[name].numel // max(len(self._own), 1)

        def elements(start: int, stop: int) -> torch.Tensor:
            first = start // width
            flat = rows(first, -(-stop // width)).reshape(-1)
            return flat[start - first * width : stop - first * width]

        return elements

    def _opened_rows(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        """Return a function that returns new rows ``start`` to ``stop``, in working precision."""
        working = accumulator(self.specs[name].dtype)
        table = rows_reader(self._form, name, scratch)
        donors = [(rows_reader(form, name, scratch), index) for form, index in self._donors]

        def rows(start: int, stop: int) -> torch.Tensor:
            own = self._own[start:stop]
            out = table(own.clamp(min=0))
            missing = (own < 0).nonzero().squeeze(1)
            if len(missing):
                total = torch.zeros((len(missing), *out.shape[1:]), dtype=working)
                count = torch.zeros(len(missing), dtype=working)
                for donor, index in donors:
                    there = index[start:stop][missing]
                    has = (there >= 0).nonzero().squeeze(1)
                    total[has] += donor(there[has])
                    count[has] += 1
                out[missing] = total / count.clamp(min=1).view(-1, *[1] * (total.dim() - 1))
            if stop > self._known and self._known:
                padding = slice(max(self._known - start, 0), None)
                out[padding] = self._mean(name, rows).to(working)
            return out

        return rows

    def _mean(self, name: str, rows: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """Return the mean of the rows that have a token."""
        with self._lock:
            if name not in self._means:
                starts = range(0, self._known, _ROWS)
                total = sum(
                    rows(start, min(start + _ROWS, self._known)).sum(0, dtype=torch.float64)
                    for start in starts
                )
                assert isinstance(total, torch.Tensor)
                self._means[name] = total / self._known
            return self._means[name]

    @property
    def leaves(self) -> list[Source]:
        forms = [self._form, *(form for form, _ in self._donors)]
        return list(dict.fromkeys(leaf for form in forms for leaf in form.leaves))

    def working_bytes(self, name: str) -> int:
        return 4 * 4 * PIECE if name in self._names else 0

    def describe(self) -> dict[str, object]:
        """Return the provenance of the weights and of the donors, and a digest of the rows."""
        digest = sha256(self._own.numpy().tobytes())
        for _, index in self._donors:
            digest.update(index.numpy().tobytes())
        return {
            "rows": digest.hexdigest()[:16],
            "of": provenance(self._form),
            "donors": [provenance(form) for form, _ in self._donors],
        }


def rows_reader(
    form: LinearForm, name: str, scratch: Scratch
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that reads rows of a tensor by their indices, in working precision.

    Rows near each other are read together, and what lies between them.
    """
    spec = form.specs[name]
    working, width = accumulator(spec.dtype), spec.numel // max(spec.shape[0], 1)
    coefficients = form.coefficients(name)
    source, coefficient = next(iter(coefficients.items()))
    if len(coefficients) == 1 and coefficient == 1 and not source.computed:
        read = source.open(name, scratch)
    else:
        read = buffered(reader(plan(form, [name]), scratch), working, scratch)

    def rows(indices: torch.Tensor) -> torch.Tensor:
        wanted, places = torch.unique(indices, return_inverse=True)
        ends = (wanted.diff() > _GAP).nonzero().squeeze(1) + 1
        parts = torch.tensor_split(wanted, ends.tolist()) if len(wanted) else ()
        held = sum(int(part[-1] - part[0]) + 1 for part in parts)
        found = torch.empty((held, width), dtype=working)
        begin = 0
        for part in parts:
            first, end = int(part[0]), begin + int(part[-1] - part[0]) + 1
            found[begin:end].view(-1).copy_(read(first * width, (first + end - begin) * width))
            part += begin - first  # from a row of the tensor to one of those found, in `wanted`
            begin = end
        return found.index_select(0, wanted[places]).view(-1, *spec.shape[1:])

    return rows
