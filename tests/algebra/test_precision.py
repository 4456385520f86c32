"""Which precision is meant, and that float32 is what a module computes without us."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from weightops.algebra import precision
from weightops.algebra.precision import computed_in, pick_precision
from weightops.errors import UnknownNameError

CPU = torch.device("cpu")


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("WEIGHTOPS_PRECISION")
    monkeypatch.setattr(precision, "_CPU_INFO", tmp_path / "cpuinfo")
    precision._cpu_has_bfloat16.cache_clear()
    yield tmp_path / "cpuinfo"
    precision._cpu_has_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("line", "used"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", "bfloat16"),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile", "bfloat16"),
        ("Features\t: fp asimd sve bf16 i8mm", "bfloat16"),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", "float32"),
        ("Features\t: fp asimd sve svebf16", "float32"),
        ("model name\t: bf16", "float32"),
        (None, "float32"),
    ],
)
def test_auto_is_what_the_processor_computes_in(
    processor: Path, line: str | None, used: str
) -> None:
    if line is not None:
        processor.write_text(f"processor\t: 0\n{line}\nbogomips\t: 1\n")
    assert pick_precision("auto", CPU) == used
    assert pick_precision("bfloat16", CPU) == "bfloat16"
    assert pick_precision("float32", CPU) == "float32"


def test_a_machine_may_say_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for used in ("float32", "bfloat16"):
        monkeypatch.setenv("WEIGHTOPS_PRECISION", used)
        assert pick_precision("auto", CPU) == used


def test_other_precisions_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"'half'(?s:.*)auto, float32, bfloat16"):
        pick_precision("half", CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEIGHTOPS_PRECISION")
    native = torch.cuda.get_device_capability() >= (8, 0)
    assert pick_precision("auto", torch.device("cuda")) == ("bfloat16" if native else "float32")


def test_float32_is_the_bare_module() -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(4, 5, 32)
    with computed_in("float32", CPU):
        assert torch.equal(module(x), module(x.clone()))
        ours = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    bare = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    assert all(map(torch.equal, ours, bare))


@pytest.mark.parametrize("learning", [False, True])
def test_bfloat16_is_near_float32(learning: bool) -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(4, 5, 32)
    with torch.set_grad_enabled(learning), computed_in("bfloat16", CPU):
        assert torch.backends.cuda.flash_sdp_enabled() is not learning  # which holds for CPU, too
        lower = module(x)
    assert not torch.equal(lower.float(), module(x))
    torch.testing.assert_close(lower.float(), module(x), atol=0.1, rtol=0.1)
