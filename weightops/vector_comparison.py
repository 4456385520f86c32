"""How task vectors lie to each other: lengths, angles, conflicts of sign, spectra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from weightops.algebra.names import layer_of
from weightops.checkpoints.opening import CheckpointLike, open_ref
from weightops.engine.reduce import gram
from weightops.errors import WeightopsError
from weightops.task_vector import TaskVector

_SHOWN = 64  # singular values of a spectrum; matrices with fewer are left out
_RANK = 8  # directions of a matrix of which principal angles are taken


@dataclass(frozen=True)
class Comparison:
    """Several task vectors side by side.

    Attributes:
        names: of the vectors.
        grams: inner products at each tensor, shape ``(k, k)``.
        conflicts: share of the elements that both of two vectors change which they move in opposite directions, ``(k, k)``.
        spectra: mean share of the first 64 singular values' squares, by vector, over the matrices that have as many; empty if not asked for.
        overlaps: mean squared cosine of the principal angles between the spaces of the 8 first left singular vectors, ``(k, k)``, over
            the matrices; None if not asked for. Chance gives 8 over the height.
    """

    names: tuple[str, ...]
    grams: dict[str, torch.Tensor]
    conflicts: torch.Tensor
    spectra: dict[str, list[float]]
    overlaps: torch.Tensor | None

    @property
    def total(self) -> torch.Tensor:
        """Inner products of the whole vectors, shape ``(k, k)``."""
        return sum(self.grams.values(), torch.zeros_like(self.conflicts))

    @property
    def cosines(self) -> torch.Tensor:
        """Cosines of the angles between the whole vectors, shape ``(k, k)``; NaN for a vector that is zero."""
        return cosines(self.total)

    @property
    def norms(self) -> list[float]:
        """The length of each vector."""
        return self.total.diagonal().sqrt().tolist()

    def layers(self) -> dict[str, torch.Tensor]:
        """Inner products by layer: the part of a name up to its first number, or its first two parts."""
        found: dict[str, torch.Tensor] = {}
        for name, g in self.grams.items():
            layer = layer_of(name)
            key = f"{layer.before}{layer.number}" if layer else ".".join(name.split(".")[:2])
            found[key] = found[key] + g if key in found else g
        return found


def cosines(g: torch.Tensor) -> torch.Tensor:
    """Cosines from inner products."""
    norms = g.diagonal().sqrt()
    return g / (norms[:, None] * norms)


def compare(
    models: Sequence[CheckpointLike | TaskVector],
    *,
    base: CheckpointLike | None = None,
    spectra: bool = False,
) -> Comparison:
    """Compare task vectors, in three streaming passes.

    Args:
        models: task vectors (or files of them), or fine-tuned weights.
        base: what the weights are fine-tuned from.
        spectra: also decompose every matrix into singular values, which takes far longer.

    Raises:
        WeightopsError: for weights without a base, or fewer than two vectors without one.

    >>> base, a, b = ({"w": torch.tensor(x)} for x in ([0.0, 0.0], [3.0, 4.0], [4.0, -3.0]))
    >>> found = compare([a, b], base=base)
    >>> found.norms, round(found.cosines[0, 1].item(), 6), found.conflicts[0, 1].item()
    ([5.0, 5.0], 0.0, 0.5)
    """
    vectors = [_vector(model, base) for model in models]
    if len(vectors) < (2 if base is None else 1):
        raise WeightopsError(
            "a comparison needs at least two task vectors, or a base and what it is compared with"
        )
    forms = [vector.form for vector in vectors]
    total = torch.zeros(len(forms), len(forms), dtype=torch.float64)
    signed = sum(gram(forms, torch.sign).values(), total)
    both = sum(gram(forms, lambda x: x.sign().abs()).values(), total)
    decomposed = _decompose(vectors) if spectra else ([[] for _ in vectors], None)
    names = _distinct([_name(model, i) for i, model in enumerate(models)])
    return Comparison(
        names,
        gram(forms),
        (both - signed) / 2 / both.clamp(min=1),
        dict(zip(names, decomposed[0], strict=True)) if spectra else {},
        decomposed[1],
    )


def _vector(model: CheckpointLike | TaskVector, base: CheckpointLike | None) -> TaskVector:
    if isinstance(model, TaskVector):
        return model
    if isinstance(model, (str, Path)) and open_ref(model).form.space == "delta":
        return TaskVector.load(model)
    if base is None:
        raise WeightopsError(
            f"{_name(model, 0)} holds weights: say which base they are fine-tuned from (--base)"
        )
    return TaskVector(base, model)


def _name(model: object, index: int) -> str:
    return (
        Path(model).name.removesuffix(".safetensors")
        if isinstance(model, (str, Path))
        else f"vector {index + 1}"
    )


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names))


def _decompose(vectors: Sequence[TaskVector]) -> tuple[list[list[float]], torch.Tensor]:
    """Mean spectra, and overlaps of the spaces of the first left singular vectors."""
    k = len(vectors)
    spectra = [torch.zeros(_SHOWN, dtype=torch.float64) for _ in vectors]
    overlaps, matrices = torch.zeros(k, k, dtype=torch.float64), 0
    for name, spec in vectors[0].specs.items():
        if (
            len(spec.shape) != 2
            or min(spec.shape) < _SHOWN
            or any(name not in vector for vector in vectors)
        ):
            continue
        parts = [torch.linalg.svd(vector[name].float(), full_matrices=False) for vector in vectors]
        if any(s[0] == 0 for _, s, _ in parts):
            continue
        matrices += 1
        for spectrum, (_, s, _) in zip(spectra, parts, strict=True):
            spectrum += (s.double().square() / s.double().square().sum())[:_SHOWN]
        for i, (u, _, _) in enumerate(parts):
            for j, (v, _, _) in enumerate(parts):
                overlaps[i, j] += (u[:, :_RANK].T @ v[:, :_RANK]).double().square().sum() / _RANK
    return [(spectrum / max(matrices, 1)).tolist() for spectrum in spectra], overlaps / max(
        matrices, 1
    )
