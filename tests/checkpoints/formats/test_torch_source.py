"""Files of torch of every age: the same tensors as torch reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.torch_archives import tar
from torch import nn

from weightops import TaskVector, open_checkpoint


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def varied_tensors() -> dict[str, torch.Tensor]:
    weight = torch.randn(6, 8)
    kinds = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
    return {
        "weight": weight,
        "tied": weight,
        "rows": weight[1:4],
        "strided": weight[::2, 1::3],
        "turned": torch.randn(3, 4).T,
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
        "wide": torch.ones(1).expand(5),
        "flag": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "parameter": nn.Parameter(torch.randn(3)),
        "long": torch.arange(4),
        **{str(kind): torch.arange(5).to(kind) for kind in kinds},
    }


@pytest.mark.parametrize("new", [True, False])
def test_all_that_torch_reads(tmp_path: Path, new: bool) -> None:
    torch.save(varied_tensors(), tmp_path / "w.pt", _use_new_zipfile_serialization=new)
    expected = torch.load(tmp_path / "w.pt", weights_only=True)
    source = open_checkpoint(tmp_path / "w.pt").source
    assert list(source.specs) == list(expected)
    for name, tensor in expected.items():
        read = source.read(name)
        assert (read.dtype, read.shape, read.stride()) == (
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        ), name
        assert bits(read) == bits(tensor), name
    assert source.ties == {"tied": "weight"}
    assert source.skipped == ()


def test_dtypes_that_torch_keeps_without_a_type(tmp_path: Path) -> None:
    kinds = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
    state = {str(kind): torch.arange(5).to(kind) for kind in kinds}
    for new in (True, False):
        torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
        source = open_checkpoint(tmp_path / "w.pt").source
        assert {name: bits(source.read(name)) for name in source.specs} == {
            n: bits(t) for n, t in state.items()
        }


def test_only_the_bytes_of_a_tensor_are_read(tmp_path: Path) -> None:
    """A view is read without the rest of its storage, and in memory of its own."""
    whole = torch.randn(1000, 1000)
    torch.save({"part": whole[7:9, 3:5], "turned": whole[:4, :6].T}, tmp_path / "w.pt")
    source = open_checkpoint(tmp_path / "w.pt").source
    for name, tensor in (("part", whole[7:9, 3:5]), ("turned", whole[:4, :6].T)):
        read = source.read(name)
        assert torch.equal(read, tensor)
        assert read.untyped_storage().nbytes() < 20_000
        assert read.data_ptr() != source.read(name).data_ptr()


def test_the_oldest_format(tmp_path: Path) -> None:
    state = {
        "w": torch.randn(3, 4),
        "part": torch.randn(5, 5)[1:, 2:],
        "turned": torch.randn(2, 3).T,
    }
    tar(tmp_path / "old.pth", state)
    torch_reads = torch.load(tmp_path / "old.pth", weights_only=False)
    read = open_checkpoint(tmp_path / "old.pth")
    assert list(read) == list(torch_reads)
    assert all(torch.equal(read[name], torch_reads[name]) for name in read)
    assert TaskVector(tmp_path / "old.pth", state).norm() == 0
