"""Compare `dequantized:` with the libraries that quantise: are the numbers the same, to the bit?

    pip install bitsandbytes==0.50.2 compressed-tensors==0.20.0 autoawq==0.2.9 \
        auto-gptq==0.7.1 transformers
    python benchmarks/dequantised.py

A library that isn't installed is left out, which the table says.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from weightops import open_checkpoint

State = dict[str, torch.Tensor]
Case = tuple[str, State, torch.Tensor]


def bitsandbytes() -> Iterator[Case]:
    """Yield weights in 4 bits, with and without double quantisation, and in 8 bits."""
    import bitsandbytes as bnb

    for kind, nested, dtype in (
        ("nf4", False, torch.bfloat16),
        ("nf4", True, torch.float32),
        ("fp4", True, torch.float16),
    ):
        layer = bnb.nn.Linear4bit(512, 96, bias=False)
        settings = {"compress_statistics": nested, "quant_type": kind, "module": layer}
        weight = torch.randn(96, 512).to(dtype)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **settings)
        layer = layer.to("cpu")
        expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        yield f"bitsandbytes {kind}{' twice' * nested}", layer.state_dict(), expected
    layer = bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(
        torch.randn(96, 64).half(), requires_grad=False, has_fp16_weights=False
    )
    state = layer.to("cpu").state_dict()
    expected = bnb.functional.int8_vectorwise_dequant(state["weight"], state["SCB"])
    yield "bitsandbytes int8", state, expected


def compressed_tensors() -> Iterator[Case]:
    """Yield packed weights of 4 and 8 bits, symmetric and not."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for bits, symmetric, size in ((4, True, 32), (4, False, 32), (8, True, None)):
        strategy = "group" if size else "channel"
        numbers = QuantizationArgs(
            num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=numbers)
        weight = torch.randn(48, 128).bfloat16()
        groups = weight.float().reshape(48, 128 // size if size else 1, -1)
        low, high = groups.amin(-1), groups.amax(-1)
        state = {"weight": weight, "weight_scale": ((high - low) / (2**bits - 1)).bfloat16()}
        if not symmetric:
            zero = (-low / state["weight_scale"].float()).round() - 2 ** (bits - 1)
            state["weight_zero_point"] = zero.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).char()
        packed = PackedQuantizationCompressor.compress(state, scheme)
        expected = PackedQuantizationCompressor.decompress(dict(packed), scheme)["weight"]
        kind = "symmetric" if symmetric else "asymmetric"
        yield f"compressed-tensors {bits} bits, {kind}", packed, expected


def part_of(package: str, place: str) -> Any:
    """Return a module of a package whose own import asks for what transformers no longer has."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0], place)
    loaded = importlib.util.spec_from_file_location(file.stem, file)
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module


def gptq() -> Iterator[Case]:
    """Yield integers of 2, 4 and 8 bits that auto-gptq packs, with its own reading of them."""
    linear_of = part_of("auto_gptq", "nn_modules/qlinear/qlinear_cuda.py").QuantLinear
    for bits in (2, 4, 8):
        linear, layer = (
            torch.nn.Linear(64, 96, bias=False).half(),
            linear_of(bits, 32, 64, 96, False),
        )
        zeros = torch.randint(1, 2**bits, (96, 2)).float()
        order = torch.randperm(64) // 32
        layer.pack(linear, torch.rand(96, 2).add(0.1).half(), zeros, order.int())
        state = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
        yield f"GPTQ {bits} bits", state, layer(torch.eye(64).half()).T


def awq() -> Iterator[Case]:
    """Yield integers of 4 bits in AWQ's order."""
    packing = part_of("awq", "utils/packing_utils.py")
    words = [torch.randint(-(2**31), 2**31, (rows, 6)).int() for rows in (128, 4)]
    scales = torch.rand(4, 48).half()
    state = {"qweight": words[0], "qzeros": words[1], "scales": scales}
    yield "AWQ", state, packing.dequantize_gemm(*words, scales, 4, 32).T


def transformers() -> Iterator[Case]:
    """Yield MXFP4 and float8 in blocks."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 8, 2, 16)).byte()
    scales = torch.randint(100, 140, (3, 8, 2)).byte()
    expected = convert_moe_packed_tensors(blocks.clone(), scales.clone())
    yield "transformers MXFP4", {"weight_blocks": blocks, "weight_scales": scales}, expected
    codes, factors = torch.randn(256, 384).to(torch.float8_e4m3fn), torch.rand(2, 3)
    expected = Fp8Dequantize(None)._dequantize_one(codes, factors)
    yield "transformers float8", {"weight": codes, "weight_scale_inv": factors}, expected


SOURCES: dict[str, Callable[[], Iterator[Case]]] = {
    "bitsandbytes": bitsandbytes,
    "compressed_tensors": compressed_tensors,
    "auto_gptq": gptq,
    "awq": awq,
    "transformers": transformers,
}


def main() -> None:
    """Print a row for each layout."""
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        for package, cases in SOURCES.items():
            if importlib.util.find_spec(package) is None:
                print(f"{package}: not installed")
                continue
            for name, state, expected in cases():
                stored = {f"layer.{part}": tensor.contiguous() for part, tensor in state.items()}
                save_file(stored, file)
                got = open_checkpoint(f"dequantized:{file}")["layer.weight"]
                same = torch.equal(got, expected.to(torch.bfloat16))
                print(f"{name:36} {'the same bits' if same else 'DIFFERS'}")


if __name__ == "__main__":
    main()
