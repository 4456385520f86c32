"""Tensors that arithmetic can't combine: quantised weights, codes and indices."""

from __future__ import annotations

import re
from collections.abc import Mapping

from weightops.algebra.same_bits import same_sample
from weightops.algebra.source import Source, Spec

_SCALE = re.compile(r"scale|zero|absmax|codebook|biases|quant|scb", re.IGNORECASE)

_INDICES = ("int64", "bool")

REMEDY = "dequantized: before a path reads quantised weights as bfloat16"
"""What to do about quantised weights, where their layout is known."""


def differing_codes(specs: Mapping[str, Spec], a: Source, b: Source) -> list[str]:
    """Return the codes that differ between two sources, and the scales beside codes that differ.

    Quantised weights are codes, whose dtype can't be edited, and so are indices from tokens to
    rows. Packed codes that are equal stand for other numbers where their scales, zeros or codebooks
    differ. A single number, such as a counter of batches, may differ.

    Args:
        specs: name -> shape and dtype of the tensors to compare.
        a: one source.
        b: another one.
    """
    both = [name for name in specs if name in a.specs and name in b.specs]
    codes = [n for n in both if not specs[n].is_editable and specs[n].numel > 1]
    places = {name.rpartition(".")[0] for name in codes if is_packed(specs[name])}
    scales = [n for n in both if specs[n].is_editable and _is_scale(n, places)]
    return [name for name in (*codes, *scales) if not same_sample(a, b, name)]


def is_packed(spec: Spec) -> bool:
    """Return whether a tensor has the form of quantised weights: a matrix of codes."""
    is_code = not spec.is_editable and spec.dtype_name not in _INDICES
    return is_code and len(spec.shape) > 1 and spec.numel > 1


def _is_scale(name: str, places: set[str]) -> bool:
    """Return whether a tensor is beside codes, or below their name, and is called a scale."""
    place, _, leaf = name.rpartition(".")
    return bool(_SCALE.search(leaf)) and (place in places or place.rpartition(".")[0] in places)
