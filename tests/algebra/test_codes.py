"""Quantised weights and indices are compared, and refused where they differ."""

from __future__ import annotations

import logging

import pytest
import torch

from weightops import TaskVector, merge
from weightops.errors import MismatchError

CODES = torch.randint(0, 255, (8, 4), generator=torch.Generator().manual_seed(0))
ONES = torch.ones(8, 1)

LAYOUTS = {
    "mlx": ({"l.weight": CODES.to(torch.uint32)}, "l.scales"),
    "bitsandbytes": ({"l.weight": CODES.to(torch.uint8)}, "l.weight.absmax"),
    "int8": ({"l.weight": (CODES - 128).to(torch.int8)}, "l.SCB"),
    "gptq": ({"l.qweight": CODES.to(torch.int32)}, "l.scales"),
    "fp8": ({"l.weight": (CODES / 100).to(torch.float8_e4m3fn)}, "l.weight_scale_inv"),
    "quanto": ({"l.weight._data": (CODES - 128).to(torch.int8)}, "l.weight._scale"),
    "aqlm": ({"l.codes": (CODES - 128).to(torch.int8)}, "l.codebooks"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantised_weights_are_refused_where_they_differ(layout: str) -> None:
    codes, scale = LAYOUTS[layout]
    (name, packed), rest = next(iter(codes.items())), {"norm.weight": torch.ones(4)}
    model = {name: packed, scale: ONES, **rest}
    other_codes = {**model, name: packed.flip(0).contiguous()}
    other_scale = {**model, scale: 2 * ONES}
    for other, differing in ((other_codes, name), (other_scale, scale)):
        for call in (lambda o: merge([model, o]), lambda o: TaskVector(model, o)):
            with pytest.raises(MismatchError, match=f"can't be averaged.*{differing}"):
                call(other)
    same = merge([model, {**model, "norm.weight": torch.zeros(4)}]).state_dict()
    assert torch.equal(same["norm.weight"], torch.full((4,), 0.5))
    assert torch.equal(same[name].view(torch.uint8), packed.view(torch.uint8))


def test_a_scale_beside_indices_is_a_weight(caplog: pytest.LogCaptureFixture) -> None:
    models = [{"ids": torch.arange(4), "scale": torch.tensor([s])} for s in (1.0, 3.0)]
    with caplog.at_level(logging.WARNING, "weightops"):
        assert merge(models)["scale"].item() == 2.0


def test_positions_of_other_dtypes_are_the_same() -> None:
    kinds = (torch.int64, torch.float32)
    models = [
        {"w": torch.full((2,), float(i)), "e.position_ids": torch.arange(4)[None].to(kind)}
        for i, kind in enumerate(kinds)
    ]
    for first, second in (models, models[::-1]):
        merged = merge([first, second]).state_dict()
        assert merged["w"].tolist() == [0.5, 0.5]
        assert torch.equal(merged["e.position_ids"], first["e.position_ids"])
    with pytest.raises(MismatchError, match=r"differ in 1 int64 tensors.*position_ids"):
        merge([models[0], {**models[1], "e.position_ids": torch.ones(1, 4)}])
