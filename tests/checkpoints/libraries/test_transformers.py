"""Folders of transformers: opened, edited, saved back, built, and evaluated with open_clip."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.transformers_folders import saved, small_clip, small_gpt2
from PIL import Image
from safetensors.torch import load_file, save_file

from weightops import TaskVector, evaluate, merge, open_checkpoint
from weightops.cli.main import run
from weightops.errors import CheckpointError
from weightops.evaluation.image_model import ImageModel
from weightops.merging.mergekit import translate
from weightops.merging.recipe import Recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A CLIP model, and an image encoder that was tuned from it."""
    from transformers import CLIPImageProcessor, CLIPVisionModel

    root = tmp_path_factory.mktemp("transformers")
    model = small_clip(0)
    saved(model, root / "base")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(root / "base")
    (root / "base" / "vocab.json").write_text("{}")
    encoder = CLIPVisionModel(model.config.vision_config)
    torch.manual_seed(1)
    start = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in model.vision_model.state_dict().items()
    }
    encoder.load_state_dict(
        {
            name: start[name.removeprefix("vision_model.")] + 0.1 * torch.randn_like(t)
            for name, t in encoder.state_dict().items()
        }
    )
    return root / "base", saved(encoder, root / "tuned")


def test_saved_folders_load_in_transformers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import CLIPModel

    base, tuned = folders
    out = TaskVector(base, tuned).apply(base, 0.5).save(tmp_path / "edited")
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "preprocessor_config.json",
        "vocab.json",
        "model.safetensors",
    }
    edited, start = CLIPModel.from_pretrained(out).eval(), CLIPModel.from_pretrained(base).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = open_checkpoint(out).model()
        assert torch.equal(ours.vision_model(pixels)[0], edited.vision_model(pixels)[0])
        assert not torch.allclose(start.vision_model(pixels)[0], edited.vision_model(pixels)[0])
    bias = "vision_model.pre_layrnorm.bias"
    moved = open_checkpoint(tuned)[
        "pre_layrnorm.bias" if "pre_layrnorm.bias" in open_checkpoint(tuned) else bias
    ]
    assert torch.allclose(edited.state_dict()[bias], (start.state_dict()[bias] + moved) / 2)
    assert torch.equal(edited.text_projection.weight, start.text_projection.weight)


def test_shards_and_bins(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base = open_checkpoint(folders[0])
    sharded = saved(small_clip(0), tmp_path / "sharded", max_shard_size="50KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    assert TaskVector(base, sharded).norm() == 0
    written = base.save(tmp_path / "ours", max_shard_size=50_000)
    assert (written / "model.safetensors.index.json").is_file()
    state = small_clip(0).state_dict()
    (tmp_path / "bin").mkdir()
    where = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(where.values()):
        torch.save(
            {name: tensor for name, tensor in state.items() if where[name] == file},
            tmp_path / "bin" / file,
        )
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": where})
    )
    assert TaskVector(base, tmp_path / "bin").norm() == 0
    assert len(merge([written, tmp_path / "bin", sharded])) == len(base)


def test_evaluated_by_open_clip_with_the_same_features(folders: tuple[Path, Path]) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    base, tuned = folders
    ours = ImageModel.open(str(base), "cpu")
    theirs = CLIPModel.from_pretrained(base).eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    pixels = CLIPImageProcessor.from_pretrained(base)(image, return_tensors="pt")["pixel_values"]
    tokens = ours.tokenizer(["a red circle", "two dogs"])
    with torch.no_grad():
        expected = theirs.get_image_features(pixel_values=pixels)
        text = theirs.get_text_features(input_ids=tokens.long())
        assert torch.allclose(
            ours.module.encode_image(pixels),
            getattr(expected, "pooler_output", expected),
            atol=1e-5,
        )
        assert torch.allclose(
            ours.module.encode_text(tokens), getattr(text, "pooler_output", text), atol=1e-5
        )
    assert (ours.preprocess(image) - pixels[0]).abs().mean() < 0.02  # resized by two libraries
    assert ours.base.known_architecture().config["model_cfg"]["quick_gelu"] is True
    result = evaluate(base, "counting", split="validation")
    assert result["counting"]["n"] == 500
    options = ["--tasks", "counting", "--split", "validation", "--json"]
    assert run(["evaluate", str(tuned), "--base", str(base), *options]) == 0
    with pytest.raises(CheckpointError, match="image and text encoders aren't known"):
        ImageModel.open(str(tuned))


def test_language_models_with_tied_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pre, ft = small_gpt2(), small_gpt2()
    saved(pre, tmp_path / "pre")
    saved(ft, tmp_path / "ft")
    assert "lm_head.weight" not in load_file(tmp_path / "pre" / "model.safetensors")
    edited = TaskVector(tmp_path / "pre", tmp_path / "ft").apply(tmp_path / "pre", 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = edited.model()
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens).logits, ft(tokens).logits)
    assert TaskVector(pre, tmp_path / "ft").norm() == pytest.approx(TaskVector(pre, ft).norm())
    assert TaskVector(tmp_path / "pre", ft).norm() == pytest.approx(TaskVector(pre, ft).norm())


def test_names_of_the_inside_of_a_model(tmp_path: Path) -> None:
    """GPT-2 on the Hub has no head, names without the prefix of the whole model, and masks."""
    pre, ft = small_gpt2(layers=2), small_gpt2(layers=2)
    saved(ft, tmp_path / "ft")
    hub = saved(pre, tmp_path / "hub")
    inside = {
        name.removeprefix("transformer."): t
        for name, t in load_file(hub / "model.safetensors").items()
    }
    for i in range(2):
        inside |= {
            f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril().bool(),
            f"h.{i}.attn.masked_bias": torch.tensor(-1e4),
        }
    save_file(inside, hub / "model.safetensors", {"format": "pt", "title": "wte.weight"})
    assert "title" not in open_checkpoint(hub)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(open_checkpoint(hub).model()(tokens).logits, pre(tokens).logits)
    for a, b in ((hub, tmp_path / "ft"), (pre, tmp_path / "ft"), (hub, ft)):
        assert TaskVector(a, b).norm() == pytest.approx(TaskVector(pre, ft).norm())
    edited = TaskVector(hub, tmp_path / "ft").apply(hub, 1.0)
    assert torch.equal(edited.model()(tokens).logits, ft(tokens).logits)


def test_the_configuration_names_the_dtype_that_is_written(tmp_path: Path) -> None:
    folder = saved(small_clip(0), tmp_path / "x")
    open_checkpoint(folder).save(tmp_path / "half", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_a_stack_of_layers_is_a_model_before_it_is_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    folder = str(saved(LlamaForCausalLM(config), tmp_path / "a"))
    sources = [
        {"sources": [{"model": folder, "layer_range": range_}]} for range_ in ([0, 2], [1, 2])
    ]
    stack = Recipe.of(translate({"merge_method": "passthrough", "slices": sources})).merge()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        ours = stack.model()(tokens).logits
        written = AutoModelForCausalLM.from_pretrained(stack.save(tmp_path / "stack")).eval()
        assert written.config.num_hidden_layers == 3
        assert torch.equal(ours, written(tokens).logits)


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = saved(small_clip(0), tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"},
        "model_type": "evil",
        "architectures": ["Evil"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'SENTINEL')!r}, 'w')")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(
        CheckpointError, match="names the architecture Evil, which transformers doesn't have"
    ):
        checkpoint.model()
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["CLIPModel"]}))
    with pytest.raises(CheckpointError, match="sets auto_map to code for the model_type 'evil'"):
        open_checkpoint(folder).model()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Model", None]}})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoImageProcessor": "evil.Model"}})
    )
    for part in (checkpoint.tokenizer, checkpoint.preprocess):
        with pytest.raises(CheckpointError, match="that transformers loads"):
            part()
    clip = open_checkpoint("embedded").save(tmp_path / "clip")
    (clip / "merges.txt.gz").unlink()
    content = json.loads((clip / "open_clip_config.json").read_text())
    for name in ("tokenizer_config.json", "evil.py"):
        (clip / name).write_bytes((folder / name).read_bytes())
    for settings, message in (
        ({"trust_remote_code": True}, "trust_remote_code, which may run code and isn't allowed"),
        ({}, "can't make the tokenizer"),
    ):
        content["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": settings}
        (clip / "open_clip_config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(clip).tokenizer()
    assert not (tmp_path / "SENTINEL").exists()


def test_a_link_to_elsewhere_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for folder, name in (
        (saved(small_clip(0), tmp_path / "x"), "vocab_more.txt"),
        (open_checkpoint("embedded").save(tmp_path / "y"), "vocab_more.txt"),
    ):
        (folder / name).symlink_to(tmp_path / "secret")
        with pytest.raises(
            CheckpointError, match=r"vocab_more.txt, a link to .*secret, outside its folder"
        ):
            open_checkpoint(folder).save(tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_quantised_weights_are_not_built_as_if_they_were_numbers(tmp_path: Path) -> None:
    folder = saved(small_gpt2(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds quantised weights: .*c_fc\.weight"):
        open_checkpoint(folder).model()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"holds quantised weights \(fp8\)"):
        open_checkpoint(folder).model()
