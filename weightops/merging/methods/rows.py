"""Methods that treat each row or column of a tensor by itself: NuSLERP and Model Stock."""

from __future__ import annotations

from typing import Literal

from weightops.errors import OptionError
from weightops.merging.methods.averaging import stock_ratio
from weightops.merging.methods.inputs import TensorInputs
from weightops.merging.methods.method import chunks
from weightops.support.lazy import torch

Along = Literal["last", "first"]

_PARALLEL = 1e-16
"""The squared sine up to which an arc is treated as a straight line."""


def vector_length(inputs: TensorInputs) -> int:
    """Return the length of the tensor's last dimension."""
    return inputs.shape[-1] if inputs.shape else 1


def _rows(values: torch.Tensor, length: int) -> torch.Tensor:
    """Return whole rows as vectors along the last dimension, shape ``(k, vectors, length)``."""
    return values.reshape(len(values), -1, length)


def _products(inputs: TensorInputs, *, of_columns: bool) -> torch.Tensor:
    """Return the inner products of the inputs, or of their columns: float64, ``(n, k, k)``."""
    totals = torch.zeros(inputs.width if of_columns else 1, inputs.k, inputs.k, dtype=torch.float64)
    for chunk in inputs:
        values = chunk.values.double()
        pattern = "irw,jrw->wij" if of_columns else "irw,jrw->ij"
        totals += torch.einsum(pattern, values, values).cpu()
    return totals


def column_products(inputs: TensorInputs, along: Along, whole: bool) -> torch.Tensor | None:
    """Return the inner products of the columns of the inputs, shape ``(width, k, k)``.

    A tensor of one dimension, or one that is taken as a whole, is one column. None where rows are
    what counts.
    """
    if along == "last" and not whole:
        return None
    return _products(inputs, of_columns=len(inputs.shape) > 1 and not whole)


def whole_products(inputs: TensorInputs, whole: bool) -> torch.Tensor | None:
    """Return the inner products of the inputs, ``(1, k, k)``; None where rows are what counts."""
    return _products(inputs, of_columns=False) if whole else None


def _arcs(gram: torch.Tensor, t: float) -> torch.Tensor:
    """Return the coefficients of points on great circles, ``(n, 2)``, from ``(n, 2, 2)``."""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp(min=1e-7)
    cosine = (gram[:, 0, 1] / norms.prod(-1)).clamp(-1, 1)
    straight = 1 - cosine.square() <= _PARALLEL
    angle = torch.acos(cosine.masked_fill(straight, 0.0))
    sine = torch.sin(angle)
    first = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine)
    second = torch.where(straight, t, torch.sin(t * angle) / sine)
    return torch.stack([first, second], dim=-1)


@chunks(by_rows=True, on_deltas=True, length=vector_length, columns=column_products)
def nuslerp_rows(
    models: torch.Tensor,
    weights: torch.Tensor,
    length: int,
    columns: torch.Tensor | None,
    *,
    along: Along = "last",
    whole: bool = False,
) -> torch.Tensor:
    """Interpolate two models along great circles, each row or column by itself (NuSLERP).

        merged_r = slerp(theta_1r, theta_2r) at t = w_2 / (w_1 + w_2)

    Parallel rows are interpolated linearly.

    Source: Shoemake, 1985, for each row.

    Args:
        models: shape ``(2, rows, width)``.
        weights: shape ``(2,)``.
        length: the length of the last dimension.
        columns: the inner products of the columns.
        along: the dimension of the vectors: "last" takes rows, "first" columns, as mergekit's
            ``nuslerp_row_wise`` does.
        whole: take the tensor as one vector, as nuslerp does.

    Raises:
        OptionError: for other than two models.
    """
    if len(models) != 2:
        raise OptionError(f"nuslerp_rows goes between two models, and here are {len(models)}")
    total = float(weights.sum())
    t = float(weights[1]) / total if abs(total) >= 1e-6 else 0.5
    if columns is not None:
        coefficients = _arcs(columns, t).T.to(models.device, models.dtype)
        return (models * coefficients[:, None]).sum(0)
    vectors = _rows(models, length)
    wide = vectors.double()
    gram = torch.einsum("irw,jrw->rij", wide, wide)
    coefficients = _arcs(gram, t).T.to(models.dtype)
    return (vectors * coefficients[..., None]).sum(0).reshape(models.shape[1:])


@chunks(by_rows=True, length=vector_length, products=whole_products)
def model_stock_rows(
    deltas: torch.Tensor,
    length: int,
    products: torch.Tensor | None,
    *,
    cosine_floor: float = 0.0,
    whole: bool = False,
) -> torch.Tensor:
    """Shrink the mean of the deltas by the angle between them, each row by itself (Model Stock).

        merged_r = t_r mean_i tau_ir
        t_r = k cos_r / (1 + (k - 1) cos_r)

    cos_r is the mean cosine of two deltas' rows r. Where the denominator is 0, t is 0.

    Source: arXiv 2403.19522, for each filter, as mergekit's ``filter_wise``.

    Args:
        deltas: shape ``(k, rows, width)``.
        length: the length of the last dimension.
        products: the inner products of whole deltas.
        cosine_floor: the least product of two norms that a cosine is divided by; mergekit has 1e-6.
        whole: take the tensor as one row, as model_stock does.

    Raises:
        OptionError: for fewer than two models.
    """
    if len(deltas) < 2:
        raise OptionError("model_stock_rows needs at least two models beside the base")
    vectors = _rows(deltas, length)
    if products is None:
        wide = vectors.double()
        products = torch.einsum("irw,jrw->rij", wide, wide)
    ratio = stock_ratio(products, cosine_floor).to(deltas.device, deltas.dtype)
    return (vectors.mean(0) * ratio[:, None]).reshape(deltas.shape[1:])
