"""Folders of libraries that weightops doesn't know: files keep their names, and all goes along."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from torch import nn

from weightops import TaskVector, merge, open_checkpoint
from weightops.errors import CheckpointError, MismatchError


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("adapter_like.safetensors", "adapter_like.safetensors"),
    ],
)
def test_a_component_keeps_its_file_name_and_config(
    given: str, written: str, tmp_path: Path
) -> None:
    config = {"_class_name": "UNet2DConditionModel", "sample_size": 8}
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save = torch.save if given.endswith(".bin") else save_file
        save({"conv_in.weight": torch.full((4, 4), float(i))}, tmp_path / name / given)
    merged = merge([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "out")
    assert {path.name for path in merged.iterdir()} == {"config.json", "recipe.yaml", written}
    assert json.loads((merged / "config.json").read_text()) == config
    assert torch.equal(load_file(merged / written)["conv_in.weight"], torch.full((4, 4), 0.5))
    with pytest.raises(CheckpointError, match="of a library that weightops doesn't know"):
        open_checkpoint(merged).model()


class Mixed(nn.Module, PyTorchModelHubMixin):
    """A model of the Hub's mixin."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)


def test_a_folder_of_the_hubs_mixin_loads_there(tmp_path: Path) -> None:
    for name in "ab":
        Mixed(width=3).save_pretrained(tmp_path / name)
    merged = merge([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "out")
    models = [Mixed.from_pretrained(path) for path in (tmp_path / "a", tmp_path / "b", merged)]
    a, b, mean = (model.layer.weight for model in models)
    assert torch.allclose((a + b) / 2, mean)


def pipeline(path: Path, seed: int, *, variant: str = "", shards: bool = False) -> dict[str, Any]:
    """Write a pipeline of diffusers, and return its tensors by component."""
    torch.manual_seed(seed)
    listed = {"unet": ["diffusers", "UNet2DModel"], "text_encoder": ["transformers", "T5"]}
    index = {"_class_name": "P", **listed, "scheduler": ["diffusers", "DDIM"], "vae": [None, None]}
    for place, content in {
        "model_index.json": index,
        "unet/config.json": {"_class_name": "UNet2DModel", "sample_size": 8},
        "text_encoder/config.json": {"model_type": "t5", "tie_word_embeddings": True},
        "scheduler/scheduler_config.json": {"beta_start": 0.1},
        "tokenizer/vocab.json": {"a": 0},
    }.items():
        (path / place).parent.mkdir(parents=True, exist_ok=True)
        (path / place).write_text(json.dumps(content))
    shared = torch.randn(5, 4)
    tensors = {
        "unet": {"conv.weight": torch.randn(4, 3, 3, 3), "out.bias": torch.randn(3)},
        "text_encoder": {"shared.weight": shared, "wo.weight": torch.randn(4, 4)},
    }
    files = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
    for component, stem in files.items():
        folder, state = path / component, tensors[component]
        if not shards:
            alias = {"encoder.embed_tokens.weight": "shared.weight"} if stem == "model" else {}
            save_file(state, folder / f"{stem}{variant}.safetensors", metadata=alias)
            continue
        placed = {name: f"{stem}-0000{i + 1}-of-00002.safetensors" for i, name in enumerate(state)}
        for name, file in placed.items():
            save_file({name: state[name]}, folder / file)
        index = {"weight_map": placed}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("given", [{}, {"variant": ".fp16"}, {"shards": True}])
@pytest.mark.parametrize("limit", [None, 100])
def test_pipelines_are_edited_component_by_component(
    given: dict[str, Any], limit: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pipeline(tmp_path / "a", 0, **given), pipeline(tmp_path / "b", 1)
    if "variant" not in given:
        (tmp_path / "a" / "unet" / "diffusion_pytorch_model.bin").write_text("left from before")
    opened = open_checkpoint(tmp_path / "a")
    assert torch.equal(opened["unet.conv.weight"], a["unet"]["conv.weight"])
    merged = merge([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "out", max_shard_size=limit)
    names = {path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file()}
    variant = given.get("variant", "")
    assert {n for n in names if not n.endswith((".safetensors", ".index.json"))} == {
        *("model_index.json", "unet/config.json", "text_encoder/config.json"),
        *("scheduler/scheduler_config.json", "tokenizer/vocab.json", "recipe.yaml"),
    }
    for component, stem in {"unet": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        index = merged / component / f"{stem}{variant}.safetensors.index.json"
        files = [index.with_name(f"{stem}{variant}.safetensors")]
        if limit:
            listed = json.loads(index.read_text())["weight_map"]
            files = [index.with_name(name) for name in sorted(set(listed.values()))]
            assert len(files) == 2
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert set(tensors) == set(a[component])
        for name, tensor in tensors.items():
            mean = (a[component][name] + b[component][name]) / 2
            assert torch.allclose(tensor, mean, atol=1e-6), name
    assert not caplog.text
    same = merge([tmp_path / "a", tmp_path / "a"]).save(tmp_path / "same")
    assert all(torch.equal(t, opened[n]) for n, t in open_checkpoint(same).items())
    if not given and not limit:
        aliases = open_checkpoint(merged).source.ties
        assert aliases == {"text_encoder.encoder.embed_tokens.weight": "text_encoder.shared.weight"}
    with pytest.raises(CheckpointError, match="a pipeline of several models"):
        open_checkpoint(merged).model()


def test_vectors_of_pipelines_resume_and_say_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, b = (pipeline(tmp_path / name, seed) for seed, name in enumerate("ab"))
    vector = TaskVector(tmp_path / "a", tmp_path / "b")
    vector.select("unet.*").save(tmp_path / "unet.safetensors")
    half = TaskVector.load(tmp_path / "unet.safetensors").apply(tmp_path / "a")
    half.save(tmp_path / "half")
    assert half.save(tmp_path / "half", resume=True) == tmp_path / "half"
    unet = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.allclose(unet["out.bias"], b["unet"]["out.bias"])
    config = {"_class_name": "UNet3DModel", "sample_size": 8}
    (tmp_path / "b" / "unet" / "config.json").write_text(json.dumps(config))
    (tmp_path / "b" / "scheduler" / "scheduler_config.json").write_text('{"beta_start": 0.2}')
    with caplog.at_level(logging.WARNING, "weightops"):
        merge([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "out")
    assert "unet._class_name: UNet3DModel / UNet2DModel" in caplog.text
    assert f"taken from {tmp_path / 'a'}; others have another {tmp_path / 'b'}/sch" in caplog.text


def test_a_component_that_only_one_pipeline_has_is_an_error(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        pipeline(tmp_path / name, seed)
    (tmp_path / "b" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(MismatchError, match=r"text_encoder\.shared\.weight"):
        merge([tmp_path / "a", tmp_path / "b"])


def test_what_a_folder_is_made_of_is_within_it(tmp_path: Path) -> None:
    pipeline(tmp_path / "elsewhere", 0)
    for file, content in {
        "model_index.json": {"../elsewhere/unet": ["diffusers", "UNet2DModel"]},
        "modules.json": [{"path": "../elsewhere/unet"}],
        "router_config.json": {"types": {"..": "x"}},
    }.items():
        folder = tmp_path / file.partition(".")[0]
        folder.mkdir()
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="outside of it"):
            open_checkpoint(folder)


def sentences(path: Path, seed: int) -> dict[str, torch.Tensor]:
    """Write a model of sentence-transformers with a projection, and return all its tensors."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=32, num_hidden_layers=1, **sizes))
    bert.save_pretrained(path)
    dense = {"linear.weight": torch.randn(8, 16), "linear.bias": torch.randn(8)}
    places = ("", "1_Pooling", "2_Dense")
    for place in places[1:]:
        (path / place).mkdir()
        (path / place / "config.json").write_text(json.dumps({"in_features": 16}))
    (path / "modules.json").write_text(json.dumps([{"path": place} for place in places]))
    save_file(dense, path / "2_Dense" / "model.safetensors")
    return {
        **load_file(path / "model.safetensors"),
        **{f"2_Dense.{n}": t for n, t in dense.items()},
    }


def test_modules_of_sentence_transformers_take_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = (sentences(tmp_path / name, seed) for seed, name in enumerate("ab"))
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in b.items()}
    root = {n: t for n, t in old.items() if not n.startswith("2_")}
    save_file(root, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    merged = merge([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "out", max_shard_size=2000)
    assert not caplog.text
    dense = load_file(merged / "2_Dense" / "model.safetensors")
    written = dict(open_checkpoint(merged))
    assert set(written) == set(a)
    for name, tensor in a.items():
        assert torch.allclose(written[name], (tensor + b[name]) / 2, atol=1e-6), name
    assert set(dense) == {"linear.weight", "linear.bias"}
    assert (merged / "model.safetensors.index.json").is_file()
    assert (merged / "1_Pooling" / "config.json").is_file()
    module = open_checkpoint(merged).model()
    assert "the module has nothing of 2_Dense.linear.bias" in caplog.text
    query = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(module.state_dict()[query], written[query])


@pytest.mark.parametrize("content", ["{}", "[1]", "not JSON"])
def test_a_file_of_another_program_describes_nothing(content: str, tmp_path: Path) -> None:
    for name in ("config.json", "modules.json", "router_config.json", "model_index.json"):
        (tmp_path / name).write_text("{}" if name == "config.json" else content)
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["w"]
