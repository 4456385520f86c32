"""The layout of safetensors files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load

from weightops import open_checkpoint
from weightops.algebra.source import Spec
from weightops.engine.layout import layout
from weightops.errors import OptionError


def state() -> dict[str, torch.Tensor]:
    """Tensors of several widths, and two names of one tensor."""
    tensors = {f"half{i}": torch.ones(i, 3, dtype=torch.bfloat16) for i in range(4)}
    tensors |= {"flag": torch.ones(3, dtype=torch.bool), "wide": torch.ones(7).double()}
    return tensors | {"tied": tensors["half3"], "single": torch.ones(5)}


@pytest.mark.parametrize("max_shard_size", [None, 1, 40, 1000])
def test_shards_hold_each_tensor_once(max_shard_size: int | None) -> None:
    form = open_checkpoint(state()).form
    files = layout(form, "model.safetensors", {"format": "pt"}, max_shard_size=max_shard_size)
    stored = [name for file in files for name in file.offsets]
    assert sorted(stored) == sorted(set(form.specs) - {"tied"})
    for file in files:
        content = load(file.header + bytes(file.size - len(file.header)))
        assert {n: Spec(tuple(t.shape), t.dtype) for n, t in content.items()} == {
            n: form.specs[n] for n in file.offsets
        }
        assert all(offset % form.specs[n].dtype.itemsize == 0 for n, offset in file.offsets.items())
        data_bytes = sum(form.specs[n].nbytes for n in file.offsets)
        assert file.size == len(file.header) + data_bytes
        if max_shard_size:
            assert data_bytes <= max_shard_size or len(file.offsets) == 1
        metadata = json.loads(file.header[8:])["__metadata__"]
        assert metadata.get("tied") == ("half3" if "half3" in file.offsets else None)
    assert (len(files) == 1) == (max_shard_size in (None, 1000))
    assert files[0].name == (
        "model.safetensors" if len(files) == 1 else f"model-00001-of-{len(files):05}.safetensors"
    )


def test_a_dtype_that_safetensors_lacks() -> None:
    form = open_checkpoint({"w": torch.ones(2, dtype=torch.complex128)}).form
    with pytest.raises(OptionError, match="w is complex128, which safetensors can't hold"):
        layout(form, "model.safetensors", {})
