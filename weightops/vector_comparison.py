"""Compare task vectors: lengths, angles, conflicts of sign, spectra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.names import in_order, layer_of
from weightops.checkpoints.matching import in_common_names
from weightops.checkpoints.opening import CheckpointLike, open_ref
from weightops.engine.reduce import gram
from weightops.errors import OptionError
from weightops.support.lazy import torch
from weightops.task_vector import TaskVector

_SPECTRUM_LENGTH = 64
"""The number of singular values of a spectrum; matrices with fewer are skipped."""
_SUBSPACE_RANK = 8
"""The number of a matrix's directions between which principal angles are taken."""


@dataclass(frozen=True)
class Comparison:
    """Several task vectors side by side.

    Attributes:
        names: the names of the vectors.
        grams: inner products at each tensor, shape ``(k, k)``.
        shared: numbers of the elements at each tensor that both of two vectors change, shape
            ``(k, k)``.
        opposed: numbers of those that they move in opposite directions, shape ``(k, k)``.
        spectra: vector -> shares of the first 64 singular values in the sum of squares, the mean
            over the matrices that have as many; empty if not asked for.
        overlaps: mean squared cosine of the principal angles between the spaces of the first 8 left
            singular vectors, the mean over these matrices, shape ``(k, k)``; None if not asked for.
            Random spaces have 8 over the height of the matrix.
    """

    names: tuple[str, ...]
    grams: dict[str, torch.Tensor]
    shared: dict[str, torch.Tensor]
    opposed: dict[str, torch.Tensor]
    spectra: dict[str, list[float]]
    overlaps: torch.Tensor | None

    @property
    def total(self) -> torch.Tensor:
        """Inner products of the vectors over all tensors, shape ``(k, k)``."""
        return self._total(self.grams)

    @property
    def cosines(self) -> torch.Tensor:
        """Cosines between the vectors, shape ``(k, k)``; NaN for a vector that is zero."""
        return cosines(self.total)

    @property
    def norms(self) -> list[float]:
        """The norm of each vector."""
        return self.total.diagonal().sqrt().tolist()

    @property
    def conflicts(self) -> torch.Tensor:
        """Of the elements that both of two vectors change, the share that they move in opposite
        directions, shape ``(k, k)``; NaN if they change none.
        """
        return self._total(self.opposed) / self._total(self.shared)

    def _total(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        k = len(self.names)
        return sum(values.values(), torch.zeros(k, k, dtype=torch.float64))

    def layers(self) -> dict[str, torch.Tensor]:
        """Return inner products by layer, shape ``(k, k)``.

        A layer is the part of a name up to its first number, or else its first two parts.
        """
        return self.by_layer.grams

    @cached_property
    def by_layer(self) -> Comparison:
        """The comparison with layers in place of tensors, see `layers`."""
        grams, shared, opposed = map(_joined, (self.grams, self.shared, self.opposed))
        return replace(self, grams=grams, shared=shared, opposed=opposed)

    @property
    def parts(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of each tensor that a vector changes: inner products, cosines and shares of signs in
        conflict, shape ``(k, k)``.
        """
        return {
            name: (gram, cosines(gram), self.opposed[name] / self.shared[name])
            for name, gram in self.grams.items()
            if bool(gram.any())
        }


def _joined(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the sums by layer, in the order of the model."""
    totals: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        layer = layer_of(name)
        key = f"{layer.before}{layer.number}" if layer else ".".join(name.split(".")[:2])
        totals[key] = totals[key] + value if key in totals else value
    return {key: totals[key] for key in in_order(totals)}


def cosines(products: torch.Tensor) -> torch.Tensor:
    """Return the cosines of inner products, both of shape ``(k, k)``."""
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms)


def compare(
    models: Sequence[CheckpointLike | TaskVector],
    *,
    base: CheckpointLike | None = None,
    spectra: bool = False,
    strict: bool = False,
) -> Comparison:
    """Compare task vectors, in three streaming passes.

    Args:
        models: task vectors (or files of them), or fine-tuned weights.
        base: the model that the weights are fine-tuned from.
        spectra: also decompose every matrix into singular values, which takes far longer.
        strict: refuse weights that are configured differently from the base, instead of warning.

    Raises:
        OptionError: for weights without a base, or fewer than two vectors without one.
        MismatchError: if the vectors have no tensor in common, or have one in several shapes.

    >>> base, a, b = ({"w": torch.tensor(x)} for x in ([0.0, 0.0], [3.0, 4.0], [4.0, -3.0]))
    >>> comparison = compare([a, b], base=base)
    >>> comparison.norms, round(comparison.cosines[0, 1].item(), 6)
    ([5.0, 5.0], 0.0)
    >>> comparison.conflicts[0, 1].item()
    0.5
    """
    vectors = [_vector(model, base, strict) for model in models]
    if len(vectors) < (2 if base is None else 1):
        raise OptionError(
            "a comparison needs at least two task vectors",
            hint="or the model that one is fine-tuned from: base=...",
        )
    forms = in_common_names([vector.form for vector in vectors])
    signed = gram(forms, torch.sign)
    shared = gram(forms, lambda values: values.sign().abs())
    names = _distinct([_name(model, i) for i, model in enumerate(models)])
    shares, overlaps = _decompose(forms) if spectra else ([], None)
    return Comparison(
        names,
        gram(forms),
        shared,
        {name: (shared[name] - agreeing) / 2 for name, agreeing in signed.items()},
        dict(zip(names, shares, strict=True)) if spectra else {},
        overlaps,
    )


def _vector(
    model: CheckpointLike | TaskVector, base: CheckpointLike | None, strict: bool
) -> TaskVector:
    if isinstance(model, TaskVector):
        return model
    if isinstance(model, (str, Path)) and open_ref(model).form.space == "delta":
        return TaskVector.load(model)
    if base is None:
        raise OptionError(
            f"{_name(model, 0)} holds weights, and there is no base",
            hint="name the model that they are fine-tuned from: base=...",
        )
    return TaskVector(base, model, same_config=strict)


def _name(model: object, index: int) -> str:
    if isinstance(model, (str, Path)):
        return Path(model).name.removesuffix(".safetensors")
    return f"vector {index + 1}"


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)
    )


def _decompose(forms: Sequence[LinearForm]) -> tuple[list[list[float]], torch.Tensor]:
    """Return the mean spectrum of each vector, and the mean overlaps of their subspaces."""
    vectors = [TaskVector.of_form(form, None) for form in forms]
    k = len(vectors)
    spectra = torch.zeros(k, _SPECTRUM_LENGTH, dtype=torch.float64)
    overlaps, count = torch.zeros(k, k, dtype=torch.float64), 0
    for name, spec in vectors[0].specs.items():
        large = len(spec.shape) == 2 and min(spec.shape) >= _SPECTRUM_LENGTH
        if not large or any(name not in vector for vector in vectors):
            continue
        factors = [
            torch.linalg.svd(vector[name].float(), full_matrices=False)[:2] for vector in vectors
        ]
        if any(values[0] == 0 for _, values in factors):
            continue
        count += 1
        for i, (left, values) in enumerate(factors):
            squares = values.double().square()
            spectra[i] += (squares / squares.sum())[:_SPECTRUM_LENGTH]
            for j, (other, _) in enumerate(factors):
                cosines = left[:, :_SUBSPACE_RANK].T @ other[:, :_SUBSPACE_RANK]
                overlaps[i, j] += cosines.double().square().sum() / _SUBSPACE_RANK
    return (spectra / max(count, 1)).tolist(), overlaps / max(count, 1)
