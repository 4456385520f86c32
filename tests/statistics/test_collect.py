"""Statistics of models on data, against hooks and gradients of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data_sets import paint
from torch import nn

from weightops import ImageModel, collect, open_checkpoint
from weightops.checkpoints.matching import convert_to
from weightops.errors import NonfiniteError, OptionError, TaskError, UnknownNameError
from weightops.statistics.recording import GramRecorder
from weightops.statistics.statistic import record_of
from weightops.tasks.folder import folder_task
from weightops.tasks.table import find_task

COUNT = 10


def images_of(model: ImageModel, task: Any, count: int = COUNT) -> tuple[torch.Tensor, Any]:
    """Return the images that a statistic uses, and their labels."""
    pixels = model.pixels(task, "train")
    order = np.random.default_rng(0).permutation(len(pixels))[:count]
    return pixels.batch(order), pixels.labels[torch.from_numpy(order)]


def inputs_of(module: nn.Module, run: Any, *names: str) -> dict[str, torch.Tensor]:
    """Return the inputs of some modules, in float64, one in each row."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].double()})
        )
        for name in names
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return {name: x.reshape(-1, x.shape[-1]) for name, x in seen.items()}


def mean_square(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.mT @ inputs / len(inputs)


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((got.double() - wanted).abs().max() < 1e-5 * wanted.abs().max())


def test_grams_of_open_clip() -> None:
    grams = collect("embedded", "mnist", images=COUNT, batch_size=4)
    model = ImageModel.open("embedded", "cpu")
    images, _ = images_of(model, find_task("mnist"))
    block = "visual.transformer.resblocks.1"
    names = [f"{block}.mlp.c_fc", f"{block}.mlp.c_proj", f"{block}.attn", "visual.ln_post"]
    inputs = inputs_of(model.module, lambda: model.encode_image(images), *names)
    for name, weight in zip(
        names, ("c_fc.weight", "c_proj.weight", "in_proj_weight"), strict=False
    ):
        full = f"{name}.{weight}" if weight == "in_proj_weight" else f"{name}.weight"
        assert close(grams[full], mean_square(inputs[name]))
    size = model.module.visual.conv1.weight.shape[-1]
    patches = images.double().unfold(2, size, size).unfold(3, size, size)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * size * size)
    assert close(grams["visual.conv1.weight"], mean_square(patches))
    norm = model.module.visual.ln_post.double()
    tokens = norm(inputs["visual.ln_post"]).detach().view(COUNT, -1, norm.normalized_shape[0])
    pooled = tokens[:, 0] if model.module.visual.pool_type == "tok" else tokens[:, 1:].mean(1)
    assert close(grams["visual.proj"], mean_square(pooled))
    assert record_of(grams)["input_first"] == ["visual.proj"]


def test_batch_sizes_agree_and_files_keep_the_record(tmp_path: Path) -> None:
    one, other = (collect("embedded", "mnist", images=6, batch_size=size) for size in (1, 6))
    assert all(close(one[name], other[name].double()) for name in one)
    saved = open_checkpoint(one.save(tmp_path / "gram.safetensors"))
    assert record_of(saved) == record_of(one)
    assert record_of(saved)["count"] == 6
    assert all(torch.equal(saved[name], one[name]) for name in one)


def test_transformers_names_and_shared_inputs(tmp_path: Path) -> None:
    """A CLIP model of transformers has q, k and v apart, which share a matrix, also in a file."""
    folder = convert_to(open_checkpoint("embedded"), "transformers").save(tmp_path / "hf")
    own, fused = collect(folder, "mnist", images=3), collect("embedded", "mnist", images=3)
    layer = "vision_model.encoder.layers.2.self_attn"
    for part in "qkv":
        packed = fused["visual.transformer.resblocks.2.attn.in_proj_weight"]
        assert torch.equal(own[f"{layer}.{part}_proj.weight"], packed)
    assert len(own.source.ties) == 2 * 4
    size = own.save(tmp_path / "gram.safetensors").stat().st_size
    assert size < 1.01 * sum(own.specs[n].nbytes for n in own if n not in own.source.ties)
    assert record_of(own)["input_first"] == []  # visual_projection is a linear layer there
    fisher, of_packed = (collect(m, "mnist", "fisher", images=2) for m in (folder, "embedded"))
    stacked = torch.cat([fisher[f"{layer}.{part}_proj.weight"] for part in "qkv"])
    name = "visual.transformer.resblocks.2.attn.in_proj_weight"
    assert torch.allclose(stacked, of_packed[name], rtol=1e-3, atol=1e-9)


@pytest.fixture
def vit(tmp_path: Path) -> tuple[Path, Any]:
    """A classifier of timm for three classes, and a task."""
    import timm

    for split, count in (("train", 20), ("val", 4), ("test", 4)):
        for i in range(count):
            paint(tmp_path / "set" / split / "abc"[i % 3] / f"{i}.png", i)
    (tmp_path / "vit").mkdir()
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "vit", safe_serialization=True)
    return tmp_path / "vit", folder_task(tmp_path / "set")


def test_a_classifier_of_timm(vit: tuple[Path, Any]) -> None:
    folder, task = vit
    grams = collect(folder, task, images=COUNT)
    model = ImageModel.open(folder, "cpu")
    images, labels = images_of(model, task)
    inputs = inputs_of(
        model.module, lambda: model.encode_image(images), "blocks.0.attn.qkv", "head"
    )
    for name, x in inputs.items():
        assert close(grams[f"{name}.weight"], mean_square(x))
    for kind in ("model", "true"):
        fisher = collect(folder, task, "fisher", images=COUNT, labels=kind)
        wanted = {name: torch.zeros_like(p) for name, p in model.module.named_parameters()}
        for image, label in zip(images, labels, strict=True):
            for y in range(3):
                model.module.zero_grad()
                logs = model.module(image[None]).log_softmax(-1)[0]
                logs[y].backward()
                share = float(logs[y].detach().exp()) if kind == "model" else float(y == label)
                for name, parameter in model.module.named_parameters():
                    wanted[name] += share * parameter.grad**2 / COUNT
        for name, value in wanted.items():
            assert torch.allclose(fisher[name], value, rtol=1e-3, atol=1e-9), name


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A GPT-2, whose linear maps are Conv1D, with a tokenizer of letters."""
    from helpers.transformers_folders import save_letters, saved, small_gpt2

    torch.manual_seed(0)
    folder = saved(small_gpt2(), tmp_path / "gpt2")
    save_letters(folder, "?abcdefghijklmno")
    (tmp_path / "text.txt").write_text("abcdefgh" * 3 + "ahbgcfde" * 4)
    return folder


def test_a_language_model(gpt2: Path) -> None:
    text = gpt2.parent / "text.txt"
    grams = collect(gpt2, text=text, images=4)
    checkpoint = open_checkpoint(gpt2)
    module = checkpoint.model()
    blocks = checkpoint.known_architecture().tokens(text.read_text())[: 4 * 8].view(4, 8)
    names = ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj", "lm_head"]
    inputs = inputs_of(module, lambda: module(input_ids=blocks), *names)
    for name, x in inputs.items():
        key = "transformer.wte" if name == "lm_head" else name
        assert close(grams[f"{key}.weight"], mean_square(x))
    first = record_of(grams)["input_first"]
    assert "transformer.h.0.attn.c_attn.weight" in first
    assert "transformer.wte.weight" not in first
    fisher = collect(gpt2, text=text, kind="fisher", images=4, labels="true")
    wanted = torch.zeros_like(module.transformer.ln_f.weight)
    for block in blocks:
        module.zero_grad()
        logs = module(input_ids=block[None]).logits[0, :-1].log_softmax(-1)
        logs.gather(1, block[1:, None]).sum().backward()
        wanted += module.transformer.ln_f.weight.grad**2 / 4
    assert torch.allclose(fisher["transformer.ln_f.weight"], wanted, rtol=1e-3)
    again, drawn = (collect(gpt2, text=text, kind="fisher", images=2) for _ in range(2))
    assert all(torch.equal(again[name], drawn[name]) for name in drawn)


class Maps(nn.Module):
    """Linear maps as they come: packed, with inputs of their own, and by bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(6, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 6, 5))
        self.rows = nn.Parameter(torch.randn(3, 4, 5))
        self.conv = nn.Conv1d(4, 2, 3, padding=1, stride=2)
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4)

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> Any:
        mixed, _ = self.cross(query, key, key, need_weights=False)
        routed = torch.bmm(mixed.transpose(0, 1), self.experts)  # one expert for each place
        outputs = [nn.functional.linear(x, w) for x, w in zip(routed, self.rows, strict=True)]
        stacked = torch.stack(outputs).permute(1, 2, 0)
        return self.conv(stacked), self.depthwise(stacked), mixed, routed, stacked


@torch.no_grad()
def test_maps_below_modules() -> None:
    torch.manual_seed(0)
    module, query, key = Maps().eval(), torch.randn(7, 3, 6), torch.randn(7, 5, 6)
    torch.backends.mha.set_fastpath_enabled(False)
    with GramRecorder(module) as recorder:
        _, _, mixed, routed, stacked = module(query, key)
    torch.backends.mha.set_fastpath_enabled(True)
    grams = recorder.grams()
    q, k = (mean_square(x.double().reshape(-1, 6)) for x in (query, key))
    assert close(grams["cross.in_proj_weight"].tensor, torch.stack([q, k, k]))
    experts = torch.stack([mean_square(mixed[:, i].double()) for i in range(3)])
    assert close(grams["experts"].tensor, experts)
    assert grams["experts"].input_first
    rows = torch.stack([mean_square(x.double()) for x in routed])
    assert close(grams["rows"].tensor, rows)
    assert not grams["rows"].input_first
    windows = nn.functional.pad(stacked.double(), (1, 1)).unfold(2, 3, 2)  # (n, channels, out, 3)
    assert close(grams["conv.weight"].tensor, mean_square(windows.transpose(1, 2).reshape(-1, 12)))
    assert "depthwise.weight" not in grams


@pytest.mark.skipif(
    not hasattr(torch.ops.aten, "_grouped_mm"), reason="older torch runs experts one by one"
)
def test_packed_experts() -> None:
    """Each expert's matrix is of the tokens that are routed to it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    module = MixtralForCausalLM(MixtralConfig(vocab_size=50, **sizes, **heads)).eval()
    tokens = torch.randint(0, 50, (4, 9))
    block = "model.layers.0.mlp"
    inputs = inputs_of(module, lambda: module(input_ids=tokens), f"{block}.gate")
    [x] = (value.float() for value in inputs.values())
    routed = module.model.layers[0].mlp.gate.weight @ x.mT
    chosen = routed.topk(2, dim=0).indices
    with torch.no_grad(), GramRecorder(module) as recorder:
        module(input_ids=tokens)
    gram = recorder.grams()[f"{block}.experts.gate_up_proj"]
    wanted = [mean_square(x[(chosen == expert).any(0)].double()) for expert in range(3)]
    assert close(gram.tensor, torch.stack(wanted))
    assert not gram.input_first


def test_refusals(vit: tuple[Path, Any]) -> None:
    folder, task = vit
    with pytest.raises(OptionError, match="of a task, or of a text"):
        collect("embedded")
    with pytest.raises(UnknownNameError, match="no kind 'grams'"):
        collect("embedded", "mnist", "grams")
    with pytest.raises(OptionError, match="a gram is of inputs, which have no labels") as caught:
        collect("embedded", "mnist", "gram", labels="true")
    assert "fisher" in caught.value.hint
    with pytest.raises(OptionError, match="images is 0"):
        collect("embedded", "mnist", images=0)
    with pytest.raises(TaskError, match="a head for 3 classes, and mnist has 10"):
        collect(folder, "mnist")
    state = open_checkpoint(folder).state_dict()
    state["head.bias"][0] = torch.nan
    architecture = open_checkpoint(folder).architecture
    broken = open_checkpoint(folder).with_form(open_checkpoint(state).form, architecture)
    with pytest.raises(NonfiniteError, match="fisher statistic of a state dict holds NaN"):
        collect(broken, task, "fisher", images=2)


def test_a_text_is_no_task_of_images(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a line\n" * 400, encoding="utf-8")
    with pytest.raises(TaskError, match="is a text, and embedded a model of images"):
        collect("embedded", str(tmp_path / "text.txt"), images=2)
