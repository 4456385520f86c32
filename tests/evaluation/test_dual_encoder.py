"""SigLIP and relatives of CLIP in folders of transformers: features as transformers has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from weightops import ImageModel, TaskVector, evaluate
from weightops.cli.main import run
from weightops.errors import CheckpointError

WORDS = [
    "a",
    "photo",
    "of",
    "an",
    "image",
    "picture",
    "the",
    "circle",
    "square",
    "red",
    "blue",
    "dog",
    ".",
    "!",
    "é",
]
PROMPTS = ["a photo of a dog", "A Picture of a RED circle!", "dog"]


def tokenizer(folder: Path, kind: str, **settings: Any) -> None:
    """Write a small tokenizer of words, without a length where none is given."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = {"siglip": ["<pad>", "</s>", "<unk>"], "altclip": ["<s>", "<pad>", "</s>", "<unk>"]}
    marks |= {"metaclip_2": ["<s>", "<pad>", "</s>", "<unk>"]}
    marks |= {"chinese_clip": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]}
    names = marks[kind]
    roles = {name.strip("<>[]").lower(): name for name in names}
    start, end = roles.get("s") or roles.get("cls"), roles.get("/s") or roles["sep"]
    whole = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*names, *WORDS])}, roles["unk"])
    )
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = [(name, names.index(name)) for name in names]
    form = f"$A {end}" if start is None else f"{start} $A {end}"
    whole.post_processor = processors.TemplateProcessing(single=form, special_tokens=ids)
    PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token=roles["pad"], unk_token=roles["unk"], **settings
    ).save_pretrained(folder)


def model_of(kind: str) -> Any:
    """Return a small model with random weights."""
    import transformers as t

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4}
    vision = {**small, "image_size": 32, "patch_size": 8}
    text = {**small, "vocab_size": 24}
    if kind == "siglip":
        text |= {"max_position_embeddings": 12, "pad_token_id": 0, "eos_token_id": 1}
        text |= {"bos_token_id": None, "projection_size": 32}
        return t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision)).eval()
    common = {"projection_dim": 24}
    if kind == "metaclip_2":
        text |= {"max_position_embeddings": 12, "eos_token_id": 2, "pad_token_id": 1, **common}
        vision |= common
        config = t.MetaClip2Config(text_config=text, vision_config=vision, **common)
        return t.MetaClip2Model(config).eval()
    if kind == "altclip":
        text |= {"max_position_embeddings": 14, "project_dim": 24, "pad_token_id": 1}
        config = t.AltCLIPConfig(text_config=text, vision_config={**vision, **common}, **common)
        return t.AltCLIPModel(config).eval()
    text |= {"max_position_embeddings": 12, "pad_token_id": 0}
    config = t.ChineseCLIPConfig(text_config=text, vision_config={**vision, **common}, **common)
    return t.ChineseCLIPModel(config).eval()


def saved(folder: Path, kind: str, processor: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Write a whole folder, and return the model."""
    model = model_of(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(folder)
    tokenizer(folder, kind, **settings)
    import transformers as t

    names = {"siglip": "SiglipImageProcessor", "chinese_clip": "ChineseCLIPImageProcessor"}
    square = {"height": 32, "width": 32}
    sizes = {"size": square} if kind == "siglip" else {"size": {"shortest_edge": 32}}
    sizes |= {} if kind == "siglip" else {"crop_size": square}
    image_processor = getattr(t, names.get(kind, "CLIPImageProcessor"))
    image_processor(**{**sizes, **(processor or {})}).save_pretrained(folder)
    return model


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    waves = [rng.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in range(4)]
    return [Image.fromarray(w).resize((57, 43), Image.Resampling.BICUBIC) for w in waves]


def theirs(folder: Path, kind: str, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features of pictures and texts by transformers alone."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(pictures(), return_tensors="pt")
    how = {"padding": "max_length", "max_length": 12} if kind == "siglip" else {"padding": True}
    inputs = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", **how)
    given = {"input_ids": inputs["input_ids"]}
    if kind != "siglip":
        given["attention_mask"] = inputs["attention_mask"]
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=pixels["pixel_values"]).pooler_output
        read = model.get_text_features(**given).pooler_output
    return tuple(torch.nn.functional.normalize(part, dim=-1) for part in (seen, read))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((1 - (one * other).sum(1)).max())


@pytest.mark.parametrize("kind", ["siglip", "metaclip_2", "altclip", "chinese_clip"])
def test_features_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    saved(tmp_path / "model", kind)
    ours = ImageModel.open(str(tmp_path / "model"), "cpu", precision="float32")
    texts = [text.lower() for text in PROMPTS]
    seen, read = theirs(tmp_path / "model", kind, texts)
    with torch.no_grad():
        found = ours.encode_image(torch.stack([ours.preprocess(p) for p in pictures()]))
        given = ours.encode_text(ours.tokenizer(PROMPTS if kind == "siglip" else texts))
    assert distance(seen, found) < 1e-5
    assert distance(read, given) < 1e-5
    assert distance(seen[:2], seen[2:]) > 1e-4  # pictures make a difference


@pytest.mark.parametrize("kind", ["siglip", "metaclip_2"])
def test_scored_trained_and_edited(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    saved(folder, kind)
    command = ["finetune", "--model", str(folder), "--task", "digits", "--steps", "2"]
    assert run([*command, "--batch-size", "8", "--lr", "0.001", "-o", str(tmp_path / "tuned")]) == 0
    vector = TaskVector(str(folder), str(tmp_path / "tuned"))
    moved = {name.partition(".")[0] for name, delta in vector.items() if delta.any()}
    parts = {"vision_model"} | ({"visual_projection"} if kind == "metaclip_2" else set())
    assert moved == parts
    edited = vector.apply(str(folder), 0.5).save(tmp_path / "edited")
    scores = [
        evaluate(str(path), "digits", split="validation", device="cpu")["digits"]["acc1"]
        for path in (folder, tmp_path / "tuned", edited)
    ]
    assert all(0 <= score <= 1 for score in scores)
    from transformers import AutoModel

    state = AutoModel.from_pretrained(edited).state_dict()
    halves = TaskVector(str(folder), str(edited))
    assert halves.norm() == pytest.approx(vector.norm() / 2, rel=1e-4)
    assert state.keys() >= set(vector)


def test_settings_of_processors(tmp_path: Path) -> None:
    saved(tmp_path / "bare", "siglip")
    path = tmp_path / "bare" / "preprocessor_config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({"image_processor_type": whole["image_processor_type"]}))
    bare = ImageModel.open(str(tmp_path / "bare"), "cpu")
    path.write_text(json.dumps(whole))
    full = ImageModel.open(str(tmp_path / "bare"), "cpu")
    assert all(torch.equal(bare.preprocess(p), full.preprocess(p)) for p in pictures())
    path.write_text(json.dumps({**whole, "resample": 1}))
    with pytest.raises(CheckpointError, match="image processor's resample"):
        ImageModel.open(str(tmp_path / "bare"), "cpu")


def test_other_kinds_are_refused_by_their_names(tmp_path: Path) -> None:
    import transformers as t

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 4}
    text = {**small, "vocab_size": 24, "max_position_embeddings": 12, "projection_size": 32}
    config = t.Siglip2Config(text_config=text, vision_config={**small, "num_patches": 16})
    t.Siglip2Model(config).save_pretrained(tmp_path / "flexible")
    with pytest.raises(CheckpointError, match="Siglip2Model, whose image and text encoders"):
        ImageModel.open(str(tmp_path / "flexible"), "cpu")
