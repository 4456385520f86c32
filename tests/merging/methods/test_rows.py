"""NuSLERP and Model Stock of rows and columns, against the methods of whole tensors."""

from __future__ import annotations

import pytest
import torch
from helpers.merges import family

from weightops.errors import OptionError
from weightops.merging.merge import merge

SHAPES = {"matrix": (6, 4), "packed": (2, 3, 5), "vector": (7,), "wide": (3, 300_000)}


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("along", ["last", "first"])
def test_rows_and_columns_of_nuslerp(along: str, with_base: bool) -> None:
    base, models = family(2, shapes=SHAPES)
    given = {"base": base} if with_base else {}
    merged = merge(models, "nuslerp_rows", weights=[1, 3], along=along, **given)
    for name in SHAPES:

        def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
            if along == "first" and tensor.dim() > 1:
                return [tensor.reshape(len(tensor), -1)[:, i] for i in range(4)]
            return list(tensor.reshape(-1, tensor.shape[-1]))

        states = [{str(i): p for i, p in enumerate(parts(m[name]))} for m in (base, *models)]
        start = {"base": states[0]} if with_base else {}
        whole = merge(states[1:], "nuslerp", weights=[1, 3], **start)
        for i, part in enumerate(parts(merged[name])):
            assert torch.allclose(part, whole[str(i)], atol=1e-5), (name, i)


def test_rows_of_model_stock() -> None:
    base, models = family(3, shapes=SHAPES)
    merged = merge(models, "model_stock_rows", base=base)
    for name in SHAPES:
        rows = [dict(enumerate(m[name].reshape(-1, m[name].shape[-1]))) for m in (base, *models)]
        named = [{str(i): row for i, row in state.items()} for state in rows]
        whole = merge(named[1:], "model_stock", base=named[0])
        for i, row in enumerate(merged[name].reshape(-1, merged[name].shape[-1])):
            assert torch.allclose(row, whole[str(i)], atol=1e-5), (name, i)


def test_tensors_as_a_whole() -> None:
    base, models = family(2, shapes=SHAPES)
    for rows, method, given in (
        ("nuslerp_rows", "nuslerp", {"weights": [1, 3]}),
        ("model_stock_rows", "model_stock", {"base": base}),
    ):
        some = {"matrix": True, "*": False}
        merged = merge(models, rows, whole=some, **given)
        whole, apart = merge(models, method, **given), merge(models, rows, **given)
        assert torch.allclose(merged["matrix"], whole["matrix"], atol=1e-6)
        assert torch.equal(merged["packed"], apart["packed"])


def test_numbers_of_models() -> None:
    base, models = family(3)
    with pytest.raises(OptionError, match="goes between two models, and here are 3"):
        merge(models, "nuslerp_rows")["matrix"]
    with pytest.raises(OptionError, match="at least two models"):
        merge(models[:1], "model_stock_rows", base=base)["matrix"]
