"""Quantised weights are read as their own libraries read them: formulas element by element."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing._internal.two_tensor import TwoTensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from weightops import CheckpointError, MismatchError, TaskVector, merge, open_checkpoint
from weightops.cli.main import run

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def read(state: State, path: Path) -> State:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return open_checkpoint(f"dequantized:{path}").state_dict()


def packed(codes: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Pack the columns of a matrix into int32, the lowest bits first."""
    per_word = 32 // bits
    order = order or list(range(per_word))
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // per_word), dtype=torch.int64)
    for column in range(codes.shape[1]):
        shift = bits * order[column % per_word]
        words[:, column // per_word] |= codes[:, column].long() << shift
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def test_mxfp4(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 6, 3), dtype=torch.uint8)
    got = read(
        {"up_blocks": blocks, "up_scales": scales, "b": torch.ones(2)}, tmp_path / "m.safetensors"
    )
    assert got.keys() == {"up", "b"}
    assert torch.equal(got["up"], convert_moe_packed_tensors(blocks.clone(), scales.clone()))
    code, exponent = int(blocks[1, 4, 2, 5]) >> 4, int(scales[1, 4, 2])
    sign, rest = -1 if code & 8 else 1, code & 7
    value = rest * 0.5 if rest < 2 else (1 + 0.5 * (rest & 1)) * 2.0 ** ((rest >> 1) - 1)
    assert got["up"][1, 2 * 32 + 2 * 5 + 1, 4].item() == sign * value * 2.0 ** (exponent - 127)


@pytest.mark.parametrize(
    ("scales", "name", "at"),
    [
        (torch.rand(3, 2) + 0.1, "weight_scale_inv", lambda i, j: (i // 128, j // 128)),
        (torch.rand(300, 1) + 0.1, "weight_scale", lambda i, _: (i, 0)),
        (torch.rand(300).bfloat16() + 0.1, "weight_scale", lambda i, _: (i,)),
        (torch.rand(()) + 0.1, "weight_scale", lambda *_: ()),
    ],
    ids=["blocks", "rows", "flat rows", "tensor"],
)
def test_float8(
    scales: torch.Tensor, name: str, at: Callable[[int, int], tuple[int, ...]], tmp_path: Path
) -> None:
    codes = torch.randn(300, 200).to(torch.float8_e4m3fn)
    state = {"l.weight": codes, f"l.{name}": scales, "l.input_scale": torch.ones(1)}
    got = read(state, tmp_path / "m.safetensors")
    assert got.keys() == {"l.weight"}
    for i, j in ((0, 0), (127, 128), (128, 127), (299, 199)):
        expected = codes[i, j].float() * scales[at(i, j)].float()
        assert got["l.weight"][i, j] == expected.to(scales.dtype).bfloat16()


def test_bitsandbytes_in_8_bits(tmp_path: Path) -> None:
    codes = torch.randint(-127, 128, (4, 6), dtype=torch.int8)
    largest = torch.rand(4)
    state = {
        "l.weight": codes,
        "l.SCB": largest,
        "l.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    got = read(state, tmp_path / "m.safetensors")
    assert got.keys() == {"l.weight"}
    assert torch.equal(got["l.weight"], (codes * largest[:, None] * (1 / 127)).bfloat16())


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_in_4_bits(nested: bool, tmp_path: Path) -> None:
    table, count = torch.linspace(-1, 1, 16), 5 * 64
    codes = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [10, 32]}
    stored = {"l.weight": codes, "l.weight.quant_map": table}
    largest = torch.rand(5)
    if nested:
        coarse_table, fine = (
            torch.linspace(-1, 1, 256),
            torch.randint(0, 256, (5,), dtype=torch.uint8),
        )
        coarse = torch.tensor([0.5, 0.25, 0.125])
        largest = torch.tensor(
            [float(coarse_table[fine[i].item()] * coarse[i // 2]) + 0.75 for i in range(5)]
        )
        state |= {"nested_blocksize": 2, "nested_dtype": "float32", "nested_offset": 0.75}
        stored |= {"l.weight.nested_absmax": coarse, "l.weight.nested_quant_map": coarse_table}
        stored["l.weight.absmax"] = fine
    else:
        stored["l.weight.absmax"] = largest
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    stored["l.weight.quant_state.bitsandbytes__nf4"] = text
    got = read(stored, tmp_path / "m.safetensors")
    assert got.keys() == {"l.weight"}
    for k in (0, 1, 63, 64, 191, count - 1):
        byte = int(codes[k // 2])
        code = byte >> 4 if k % 2 == 0 else byte & 15
        expected = (table[code] * largest[k // 64]).bfloat16()
        assert got["l.weight"].flatten()[k] == expected


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits: int, tmp_path: Path) -> None:
    rows, columns, groups = 64, 32, 4
    codes, zeros = (
        torch.randint(0, 2**bits, (rows, columns)),
        torch.randint(0, 2**bits, (groups, columns)),
    )
    scales, index = torch.rand(groups, columns).half(), torch.randperm(rows) % groups
    state = {
        "l.qweight": packed(codes.T, bits).T,
        "l.qzeros": packed(zeros, bits),
        "l.scales": scales,
        "l.g_idx": index.int(),
    }
    got = read(state, tmp_path / "m.safetensors")["l.weight"]
    for i, j in ((0, 0), (7, 31), (8, 9), (63, 17)):
        g = int(index[i])
        expected = scales[g, j] * (codes[i, j] - (zeros[g, j] + 1)).half()
        assert got[j, i] == expected.bfloat16()


def test_awq(tmp_path: Path) -> None:
    codes, zeros = torch.randint(0, 16, (64, 32)), torch.randint(0, 16, (2, 32))
    scales, order = torch.rand(2, 32).half(), [0, 4, 1, 5, 2, 6, 3, 7]
    state = {
        "l.qweight": packed(codes, 4, order),
        "l.qzeros": packed(zeros, 4, order),
        "l.scales": scales,
    }
    got = read(state, tmp_path / "m.safetensors")["l.weight"]
    for i, j in ((0, 0), (31, 5), (32, 6), (63, 31)):
        expected = (codes[i, j] - zeros[i // 32, j]).half() * scales[i // 32, j]
        assert got[j, i] == expected.bfloat16()


@pytest.mark.parametrize("columns", [64, 60])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_pack_quantized(columns: int, asymmetric: bool, tmp_path: Path) -> None:
    codes, scales = torch.randint(0, 16, (16, columns)), torch.rand(16, 4).bfloat16()
    state = {
        "l.weight_packed": packed(codes, 4),
        "l.weight_scale": scales,
        "l.weight_shape": torch.tensor([16, columns]),
    }
    zeros = torch.full((16, 4), 8)
    if asymmetric:
        zeros = torch.randint(0, 16, (16, 4))
        state["l.weight_zero_point"] = packed(zeros.T, 4).T
    got = read(state, tmp_path / "m.safetensors")["l.weight"]
    for i, j in ((0, 0), (7, 17), (15, columns - 1)):
        group = j // (columns // 4)
        assert got[i, j] == (codes[i, j] - zeros[i, group]).bfloat16() * scales[i, group]


def test_a_folder_loads_in_transformers_as_what_it_is(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "base")
    quantised, largest = {}, {}
    for name, tensor in open_checkpoint(tmp_path / "base").state_dict().items():
        if name.endswith("_proj.weight"):
            largest = tensor.float().abs().amax(1)
            codes = (tensor.float() / largest[:, None] * 127).round().to(torch.int8)
            quantised |= {name: codes, name.replace("weight", "SCB"): largest}
        else:
            quantised[name] = tensor
    folder = tmp_path / "int8"
    folder.mkdir()
    save_file(quantised, folder / "model.safetensors")
    content = json.loads((tmp_path / "base" / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    assert run(["merge", f"dequantized:{folder}", str(tmp_path / "base"), "-o", str(out)]) == 0
    assert run(["merge", str(folder), str(tmp_path / "base"), "-o", str(tmp_path / "refused")]) == 1
    line = ["merge", str(folder), str(tmp_path / "base"), "--dequantize", "-o"]
    assert run([*line, str(tmp_path / "same")]) == 0
    wanted = (out / "model.safetensors").read_bytes()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == wanted
    assert run(["vector", str(folder), str(tmp_path / "base"), "--dequantize"]) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    merged, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    name = "model.layers.0.mlp.up_proj.weight"
    codes, rows = quantised[name], quantised[name.replace("weight", "SCB")]
    mean = ((codes * rows[:, None] / 127).bfloat16().float() + model.state_dict()[name].float()) / 2
    assert torch.allclose(merged.state_dict()[name].float(), mean, atol=1e-3, rtol=1e-2)
    change = TaskVector(f"dequantized:{folder}", tmp_path / "base").norm()
    assert math.isfinite(change)
    assert change > 0


def test_weights_that_are_not_quantised(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights that are quantised in a known layout"):
        open_checkpoint(f"dequantized:{tmp_path / 'm.safetensors'}")


def test_a_folder_of_another_library_keeps_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    codes, largest = torch.ones(2, 2, dtype=torch.int8), torch.ones(2)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({"l.weight": codes, "l.SCB": largest}, file)
    (folder / "config.json").write_text('{"_class_name": "X", "quantization_config": {"a": 1}}')
    out = open_checkpoint(f"dequantized:{folder}").save(tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == {"_class_name": "X"}
    assert open_checkpoint(out / file.name)["l.weight"].dtype == torch.bfloat16


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    codes, file = torch.ones(64, 32).to(torch.float8_e4m3fn), tmp_path / "m.safetensors"
    for scale in (torch.ones(7), torch.ones(5, 1), torch.ones(1, 3)):
        save_file({"l.weight": codes, "l.weight_scale": scale}, file)
        with pytest.raises(
            CheckpointError, match=r"l\.weight_scale of .* doesn't divide l\.weight"
        ):
            open_checkpoint(f"dequantized:{file}")
    save_file({"l.weight": codes, "l.weight_scale": torch.ones(1), "m.weight": codes.clone()}, file)
    with pytest.raises(CheckpointError, match=r"no scales for 1 float8 tensors: m\.weight"):
        open_checkpoint(f"dequantized:{file}")


@pytest.mark.parametrize(
    "other",
    [
        {"m.weight": torch.ones(8, 4, dtype=torch.uint8), "m.weight_scale_2": torch.ones(())},
        {"m.weight_packed": torch.ones(8, 4, dtype=torch.uint8)},
        {"m.weight": torch.ones(8, 8, dtype=torch.int8), "m.weight_scale": torch.ones(8, 1)},
    ],
    ids=["NVFP4", "nvfp4-pack-quantized", "int-quantized"],
)
def test_a_layout_that_is_not_read_beside_one_that_is(other: State, tmp_path: Path) -> None:
    """Layers in several layouts: none is written as codes without what says that they are."""
    mixed = {"l.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), "l.weight_scale": torch.ones(1)}
    save_file({**mixed, **other}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"1 u?int8 tensors in no layout .*: m\.weight"):
        open_checkpoint(f"dequantized:{tmp_path / 'm.safetensors'}")


def test_awqs_other_layouts_are_refused(tmp_path: Path) -> None:
    """The layout 'gemv' has a row for each output, where 'gemm' has one for each input."""
    shapes = {"l.qweight": (16, 128), "l.qzeros": (16, 1)}
    state = {name: torch.ones(shape, dtype=torch.int32) for name, shape in shapes.items()}
    save_file({**state, "l.scales": torch.ones(16, 8).half()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"l\.qweight of shape \(16, 128\).*'gemm'"):
        open_checkpoint(f"dequantized:{tmp_path / 'm.safetensors'}")


def test_nothing_that_is_written_says_quantised(tmp_path: Path) -> None:
    """Settings lie in the text model's configuration, and in files of their own."""
    codes = torch.randn(256, 192).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2) + 0.1  # blocks of 96, which only the configuration says
    state = {"l.weight": codes, "l.weight_scale_inv": scales, "l.k_scale": torch.ones(())}
    save_file(state, tmp_path / "model.safetensors")
    blocks = {"quant_method": "fp8", "weight_block_size": [96, 96]}
    config = {"model_type": "other", "text_config": {"depth": 1, "quantization_config": blocks}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("hf_quant_config.json", "quantize_config.json", "processor.json"):
        (tmp_path / name).write_text("{}")
    out = tmp_path / "out"
    open_checkpoint(f"dequantized:{tmp_path}").save(out)
    assert json.loads((out / "config.json").read_text())["text_config"] == {"depth": 1}
    assert not list(out.glob("*quant*"))
    assert (out / "processor.json").is_file()
    written = open_checkpoint(out)
    assert [*written] == ["l.weight"]
    expected = codes[200, 100].float() * scales[2, 1]
    assert written["l.weight"][200, 100] == expected.bfloat16()


@pytest.mark.parametrize(
    "stored",
    [
        {"l.weight": torch.ones(8, 8, dtype=torch.int8), "l.SCB": torch.ones(8)},
        {"l.weight": torch.ones(32, 1, dtype=torch.uint8), "l.weight.absmax": torch.ones(1)},
        {"l.qweight": torch.ones(1, 8, dtype=torch.int32), "l.scales": torch.ones(1, 8)},
        {"l.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), "l.weight_scale": torch.ones(1)},
    ],
)
def test_every_refusal_names_the_remedy(stored: dict[str, torch.Tensor], tmp_path: Path) -> None:
    plain = {"l.weight": torch.randn(8, 8)}
    other = {n: (t.float() + 1).to(t.dtype) for n, t in stored.items()}
    for merging in (
        lambda: merge([stored, plain]),
        lambda: merge([plain, stored], base=plain),
        lambda: TaskVector(stored, other),
    ):
        with pytest.raises(MismatchError, match="hint: dequantized: before a path reads"):
            merging()
    if stored.keys() > plain.keys() and stored["l.weight"].shape == (8, 8):
        with pytest.raises(MismatchError, match="hint: dequantized: before a path reads"):
            TaskVector(plain, {"l.weight": torch.ones(8, 8)}).apply(stored)


def test_layouts_that_are_not_read_are_called_by_their_library(tmp_path: Path) -> None:
    codes = torch.ones(8, 8, dtype=torch.int8)
    known = {"l._weight_qdata": "torchao", "l.W_q": "HQQ", "l.weight._data": "quanto"}
    for name, library in known.items():
        save_file({name: codes}, tmp_path / "m.safetensors")
        with pytest.raises(CheckpointError, match=f"known layout; they are those of {library}"):
            open_checkpoint(f"dequantized:{tmp_path / 'm.safetensors'}")


def test_tensors_that_wrap_others_are_refused() -> None:
    wrapped = TwoTensor(torch.ones(2), torch.ones(2))
    with pytest.raises(CheckpointError, match=r"a TwoTensor tensor at w\nhint: .*dequantize\(\)"):
        open_checkpoint({"w": wrapped})


STATE = {"blocksize": 64, "dtype": "bfloat16", "shape": [10, 32]}
UNSOUND = {
    "no JSON": b"[" * 3000,
    "no shape": b'{"blocksize": 64, "dtype": "bfloat16"}',
    "a shape of texts": json.dumps(STATE | {"shape": ["x"]}).encode(),
    "gigabytes": json.dumps(STATE | {"shape": [2**20, 2**20]}).encode(),
    "blocks of a terabyte": json.dumps(STATE | {"blocksize": 2**40}).encode(),
    "blocks of nothing": json.dumps(STATE | {"blocksize": 0}).encode(),
    "another shape": json.dumps(STATE | {"shape": [10, 30]}).encode(),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_what_is_said_of_quantised_weights_is_unsound(kind: str, tmp_path: Path) -> None:
    stored = {
        "l.weight": torch.zeros(160, 1, dtype=torch.uint8),
        "l.weight.quant_map": torch.linspace(-1, 1, 16),
        "l.weight.absmax": torch.ones(5),
        "l.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(UNSOUND[kind])).byte(),
    }
    with pytest.raises(CheckpointError, match=r"l\.weight of .* isn't soundly quantised"):
        read(stored, tmp_path / "m.safetensors")
