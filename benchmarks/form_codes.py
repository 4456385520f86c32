"""Write tiny quantised layers, as they are or with the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from form_writers import State, Writer
from safetensors.torch import load_file, save_file


def quantised(codes: str, dtype: torch.dtype, scale: str) -> Writer:
    """Return a writer of a quantised layer."""

    def write(seed: int, path: Path) -> tuple[str, State]:
        torch.manual_seed(seed)
        numbers = torch.randint(0, 100, (8, 8))
        state = {codes: numbers.to(dtype), scale: torch.ones(8, 1), "norm.weight": torch.ones(8)}
        save_file(state, path)
        return str(path), state

    return write


def dequantised(make: Callable[[], tuple[State, torch.Tensor]]) -> Writer:
    """Return a writer of a quantised layer that is read as numbers."""

    def write(seed: int, path: Path) -> tuple[str, State]:
        torch.manual_seed(seed)
        state, numbers = make()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        return f"dequantized:{path}", {"l.weight": numbers.bfloat16()}

    return write


def of_two_layouts(seed: int, path: Path) -> tuple[str, State]:
    """Write a layer in float8 and one in NVFP4, as ModelOpt has them."""
    torch.manual_seed(seed)
    state, _ = float8()
    codes = torch.randint(0, 256, (8, 16)).byte()
    fine = {"m.weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn)}
    state |= {"m.weight": codes, "m.weight_scale_2": torch.ones(()), **fine}
    save_file(state, path)
    return f"dequantized:{path}", state


def int8() -> tuple[State, torch.Tensor]:
    """Return a layer as bitsandbytes has it in 8 bits, and its numbers."""
    codes, largest = torch.randint(-127, 128, (8, 8)).char(), 127 * _powers(8)
    return {"l.weight": codes, "l.SCB": largest}, codes * largest[:, None] / 127


def float8() -> tuple[State, torch.Tensor]:
    """Return a layer in float8 with a scale for each row, and its numbers."""
    codes, scale = torch.randn(8, 8).to(torch.float8_e4m3fn), _powers(8, 1)
    return {"l.weight": codes, "l.weight_scale": scale}, codes.float() * scale


def mxfp4() -> tuple[State, torch.Tensor]:
    """Return experts in MXFP4, and what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = torch.randint(0, 256, (2, 8, 1, 16)).byte(), torch.full((2, 8, 1), 125).byte()
    numbers = convert_moe_packed_tensors(blocks.clone(), scales.clone())
    return {"l.weight_blocks": blocks, "l.weight_scales": scales}, numbers


def gptq() -> tuple[State, torch.Tensor]:
    """Return a layer as GPTQ packs it in 4 bits, and its numbers."""
    codes, zeros = torch.randint(0, 16, (32, 8)), torch.randint(1, 16, (2, 8))
    scales, shifts = _powers(2, 8).half(), 4 * torch.arange(8)
    words = (codes.view(4, 8, 8) << shifts[:, None]).sum(1)
    offsets = ((zeros - 1) << shifts).sum(1, keepdim=True)
    packed = {"l.qweight": _int32(words), "l.qzeros": _int32(offsets), "l.scales": scales}
    groups = torch.arange(32) // 16
    return packed, ((codes - zeros[groups]).half() * scales[groups]).T


def load_layer(path: Path) -> Any:
    """Load a layer into torch's, or experts, which are several, into a mapping."""
    state = load_file(path / "model.safetensors")
    return {"l.weight": state["l.weight"]}


def _powers(*shape: int) -> torch.Tensor:
    """Return powers of two, by which products are exact in bfloat16."""
    return 2.0 ** -torch.randint(0, 4, shape)


def _int32(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).int()
