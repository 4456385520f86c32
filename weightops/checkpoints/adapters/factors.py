"""Deltas that are computed from factors: LoRA, LoHa, LoKr and whole differences.

With the scale ``s = alpha / rank`` (1 where no alpha is stored):

* LoRA (arXiv 2106.09685): ``s * up @ down``; with a core of a convolution, the Tucker product of
  core, up and down.
* LoHa (arXiv 2108.06098): ``s * (w1_a @ w1_b) * (w2_a @ w2_b)``.
* LoKr (arXiv 2212.10650): ``s * kron(w1, w2)``, where either may be a product of two factors. If
  neither is, alpha has no part in it.

DoRA (arXiv 2402.09353) stores the norm that each row, or each column, of the edited weight has.
LyCORIS (arXiv 2309.14859) describes them for convolutions, and gives the factors their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from weightops.support.lazy import torch

ByEnd: TypeAlias = "Mapping[str, torch.Tensor]"
"""The factors of an edit by what they are, such as "down"."""

BESIDE = ("alpha", "magnitude", "magnitude of rows")
"""What is stored beside the factors of a delta."""
ENDS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    **{f".hada_{factor}": factor for factor in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{f}": f"kron_{f}" for f in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude of rows",
    ".lora_magnitude_vector.weight": "magnitude of rows",
    ".diff": "difference",
    ".diff_b": "difference of bias",
    ".w_norm": "difference",
    ".b_norm": "difference of bias",
}
"""End of a stored name -> the factor that it is."""


def _lora(factors: ByEnd) -> torch.Tensor:
    up, down = factors["up"].flatten(1), factors["down"]
    if "mid" in factors:
        return _tucker(factors["mid"], up.T, down.flatten(1))
    return up @ down.flatten(1)


def _loha(factors: ByEnd) -> torch.Tensor:
    if "t1" in factors or "t2" in factors:
        first = _tucker(factors["t1"], factors["w1_a"], factors["w1_b"])
        return first * _tucker(factors["t2"], factors["w2_a"], factors["w2_b"])
    return (factors["w1_a"] @ factors["w1_b"]) * (factors["w2_a"] @ factors["w2_b"])


def _lokr(factors: ByEnd) -> torch.Tensor:
    w1 = factors.get("kron_w1")
    w2 = factors.get("kron_w2")
    if w1 is None:
        w1 = factors["kron_w1_a"] @ factors["kron_w1_b"]
    if w2 is None:
        a, b = factors["kron_w2_a"], factors["kron_w2_b"]
        core = factors.get("kron_t2")
        w2 = (a @ b.flatten(1)).reshape(-1, *b.shape[1:]) if core is None else _tucker(core, a, b)
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - w1.dim())), w2.contiguous())


def _tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``sum_ij core[i, j] a[i, out] b[j, in]``, at each place of a kernel."""
    return torch.einsum("ij...,io,jn->on...", core, a, b)


def _difference(factors: ByEnd) -> torch.Tensor:
    [difference] = factors.values()
    return difference


class Kind(NamedTuple):
    """A way to compute a delta from factors.

    Attributes:
        name: its name for people.
        factors: the factors that it takes.
        rank_of: a factor with a row for each rank, by which alpha is divided.
        compute: returns the delta, not scaled.
    """

    name: str
    factors: tuple[str, ...]
    rank_of: str
    compute: Callable[[ByEnd], torch.Tensor]


KINDS = (
    Kind("LoRA", ("up", "down", "mid"), "down", _lora),
    Kind("LoHa", ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"), "w1_b", _loha),
    Kind("LoKr", ("kron_w1", "kron_w2_a", "kron_w2_b", "kron_t2"), "kron_w2_b", _lokr),
    Kind("LoKr", ("kron_w1", "kron_w2"), "", _lokr),
    Kind("LoKr", ("kron_w1_a", "kron_w1_b", "kron_w2"), "kron_w1_b", _lokr),
    Kind(
        "LoKr", ("kron_w1_a", "kron_w1_b", "kron_w2_a", "kron_w2_b", "kron_t2"), "kron_w2_b", _lokr
    ),
    Kind("difference", ("difference",), "", _difference),
    Kind("difference", ("difference of bias",), "", _difference),
)


def with_norms(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Return a weight whose rows, or columns, have the norms that a DoRA stores.

    Args:
        weight: the edited weight, of shape ``(out, in, ...)``.
        magnitude: of shape ``(out, 1, ...)`` for rows or ``(1, in, ...)`` for columns.

    >>> with_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[10.0], [1.0]]))
    tensor([[6., 8.],
            [0., 1.]])
    """
    others = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return weight * (magnitude / norms)
