"""A form as a mapping of names to tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.source import Spec
from weightops.engine.evaluate import allocate, materialize
from weightops.support.lazy import torch


class Tensors(Mapping[str, "torch.Tensor"]):
    """A read-only mapping from names to tensors, each of them computed at each access."""

    __slots__ = ()
    form: LinearForm

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Name -> shape and dtype of each tensor."""
        return self.form.specs

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.form.specs:
            raise KeyError(name)
        form = self.form.part([name])
        out = allocate(form)
        materialize(form, out)
        return out[name]

    def __contains__(self, name: object) -> bool:
        return name in self.form.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.form.specs)

    def __len__(self) -> int:
        return len(self.form.specs)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__
