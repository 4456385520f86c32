"""Alignment: permuted models are found again, and the function stays the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from helpers.clip_models import of_hf
from helpers.clip_models import of_open_clip as clip_of_open_clip
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from timm.models.resnet import Bottleneck, ResNet
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from weightops.checkpoints.matching import convert_to
from weightops.checkpoints.opening import open_checkpoint
from weightops.cli.main import run
from weightops.errors import MismatchError, NonfiniteError, OptionError, RecipeError
from weightops.merging.alignment.aligned import align
from weightops.merging.alignment.axes import Heads, find_axes
from weightops.merging.alignment.matching import permuted
from weightops.merging.merge import merge
from weightops.merging.recipe import Recipe
from weightops.tasks.table import as_tasks

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGES = {**SIZES, "image_size": 32, "patch_size": 16}
WORDS = {**SIZES, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**WORDS, "num_key_value_heads": 2}
TOKENS = torch.arange(3, 15)[None]
PICTURE = torch.linspace(-1, 1, 3 * 64 * 64).sin().reshape(1, 3, 64, 64).double()


def of_open_clip(vision: CLIPVisionCfg) -> nn.Module:
    return CLIP(16, vision, CLIPTextCfg(width=24, heads=3, layers=2, vocab_size=60))


def similarities(model: Any) -> torch.Tensor:
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    picture = nn.functional.interpolate(PICTURE, (size, size))
    image = model.encode_image(picture, normalize=True)
    words = torch.nn.functional.pad(TOKENS, (0, 77 - TOKENS.shape[1]))
    return image @ model.encode_text(words, normalize=True).T  # type: ignore[no-any-return]


def of_pictures(model: Any) -> torch.Tensor:
    return model(PICTURE[..., :32, :32]).logits  # type: ignore[no-any-return]


def of_words(model: Any) -> torch.Tensor:
    return model(TOKENS).logits  # type: ignore[no-any-return]


def of_both(model: Any) -> torch.Tensor:
    return model(TOKENS, PICTURE[..., :32, :32]).logits_per_image  # type: ignore[no-any-return]


def clip_of_transformers() -> nn.Module:
    config = transformers.CLIPConfig(
        vision_config=IMAGES, text_config={**WORDS, "num_attention_heads": 2}, projection_dim=16
    )
    return transformers.CLIPModel(config)


t = transformers
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], torch.Tensor]]] = {
    "open_clip": (
        lambda: of_open_clip(
            CLIPVisionCfg(2, 32, 16, image_size=32, patch_size=16, ls_init_value=0.5)
        ),
        similarities,
    ),
    "open_clip resnet": (
        lambda: of_open_clip(CLIPVisionCfg((1, 2, 1, 1), 8, 64, image_size=64, patch_size=None)),
        similarities,
    ),
    "clip of transformers": (clip_of_transformers, of_both),
    "timm vit": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=4, img_size=64, num_classes=5
        ),
        lambda model: model(PICTURE),
    ),
    "resnet18": (lambda: timm.create_model("resnet18", num_classes=5), lambda m: m(PICTURE)),
    "resnet with bottlenecks": (
        lambda: ResNet(Bottleneck, (2, 2, 2, 2), num_classes=5, channels=(16, 32, 64, 128)),
        lambda m: m(PICTURE),
    ),
    "resnet of transformers": (
        lambda: t.ResNetForImageClassification(
            t.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 24, 32],
                depths=[2, 2, 1, 1],
                layer_type="basic",
            )
        ),
        lambda m: m(PICTURE).logits,
    ),
    "vit": (lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGES)), of_pictures),
    "vit features": (
        lambda: t.ViTModel(t.ViTConfig(**IMAGES)),
        lambda m: m(PICTURE[..., :32, :32]).last_hidden_state,
    ),
    "bert": (lambda: t.BertForSequenceClassification(t.BertConfig(**WORDS)), of_words),
    "bert words": (lambda: t.BertForMaskedLM(t.BertConfig(**WORDS)), of_words),
    "bert tokens": (lambda: t.BertForTokenClassification(t.BertConfig(**WORDS)), of_words),
    "bert features": (
        lambda: t.BertModel(t.BertConfig(**WORDS)),
        lambda m: torch.cat([m(TOKENS).last_hidden_state[0, 0], m(TOKENS).pooler_output[0]]),
    ),
    "roberta": (lambda: t.RobertaForMaskedLM(t.RobertaConfig(**WORDS)), of_words),
    "gpt2": (
        lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)),
        of_words,
    ),
    "distilbert": (
        lambda: t.DistilBertForSequenceClassification(
            t.DistilBertConfig(vocab_size=60, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
        ),
        of_words,
    ),
    "opt": (
        lambda: t.OPTForCausalLM(
            t.OPTConfig(**WORDS, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
        ),
        of_words,
    ),
    "siglip": (
        lambda: t.SiglipModel(
            t.SiglipConfig(vision_config=dict(IMAGES), text_config={**WORDS, "projection_size": 32})
        ),
        of_both,
    ),
    "open_clip with timm": (
        lambda: of_open_clip(
            CLIPVisionCfg(
                image_size=224, timm_model_name="vit_tiny_patch16_224", timm_proj="linear"
            )
        ),
        similarities,
    ),
    "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)), of_words),
    "qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED, head_dim=12)), of_words),
    "gemma2": (lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED, head_dim=8)), of_words),
}


def built(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name][0]().eval().double()
    state = model.state_dict()
    for tensor in state.values():  # so that no bias is 0, and no statistic is its default
        if tensor.dtype.is_floating_point:
            tensor += 0.1 * torch.rand_like(tensor)
    model.load_state_dict(state)
    return model


def shuffled_heads(heads: Heads) -> dict[str, torch.Tensor]:
    """Return orders of an attention: of its groups, of heads in each, and of units in each."""
    orders: dict[str, list[torch.Tensor]] = {part: [] for part in "qkvo"}
    for value in torch.randperm(heads.values).tolist():
        rotary = heads.rotary or heads.per_value > 1
        keys = torch.arange(heads.width) if rotary else torch.randperm(heads.width)
        units = torch.randperm(heads.value_width)
        orders["k"].append(value * heads.width + keys)
        orders["v"].append(value * heads.value_width + units)
        for query in (value * heads.per_value + torch.randperm(heads.per_value)).tolist():
            orders["q"].append(query * heads.width + keys)
            orders["o"].append(query * heads.value_width + units)
    found = {part: torch.cat(order) for part, order in orders.items()}
    if len(found["q"]) == len(found["k"]) == len(found["v"]):
        found["qkv"] = torch.cat([found[p] + i * len(found[p]) for i, p in enumerate("qkv")])
    return found


def shuffle(model: nn.Module) -> dict[str, tuple[str | None, ...]]:
    """Permute all that may be permuted in a model, and return the labels."""
    checkpoint = open_checkpoint(model)
    axes = find_axes(checkpoint, checkpoint.memory.specs)
    orders = {label: torch.randperm(size) for label, size in axes.sizes.items() if ":" not in label}
    for group, heads in axes.heads.items():
        orders |= {f"{group}:{part}": order for part, order in shuffled_heads(heads).items()}
    state = model.state_dict()
    for name, labels in axes.labels.items():
        state[name] = permuted(state[name], labels, orders)
    model.load_state_dict(state)
    return dict(axes.labels)


@pytest.mark.parametrize("name", MODELS)
def test_a_shuffled_model_is_found_again(name: str) -> None:
    model, other = built(name, 0), built(name, 0)
    outputs = MODELS[name][1]
    labels = shuffle(other)
    moved = [
        key for key in labels if not torch.equal(model.state_dict()[key], other.state_dict()[key])
    ]
    assert len(moved) > len(labels) / 3
    with torch.no_grad():
        torch.testing.assert_close(outputs(other), outputs(model), rtol=1e-5, atol=1e-5)
    start = open_checkpoint(model)
    aligned = align(open_checkpoint(other), start)
    for key, tensor in start.items():
        assert torch.equal(aligned[key], tensor), key


@pytest.mark.parametrize("name", MODELS)
def test_another_models_function_stays_the_same(name: str) -> None:
    model, other = built(name, 0), built(name, 1)
    outputs = MODELS[name][1]
    aligned = align(open_checkpoint(other), open_checkpoint(model))
    with torch.no_grad():
        before = outputs(other)
        apart = [
            sum(float((state[key] - tensor).square().sum()) for key, tensor in of_model.items())
            for of_model in [{k: v.clone() for k, v in model.state_dict().items()}]
            for state in (other.state_dict(), aligned)
        ]
        aligned.load_into(other)
        torch.testing.assert_close(outputs(other), before, rtol=1e-5, atol=1e-5)
    assert apart[1] < apart[0]


def test_models_of_two_libraries_are_aligned(tmp_path: Path) -> None:
    model, other = of_hf(0), clip_of_open_clip(1)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    same = convert_to(open_checkpoint(tmp_path), "open_clip").model()
    shuffle(same)
    for start, moved in ((model, same), (same, model)):
        want = open_checkpoint(start)
        merged = open_checkpoint(merge([start, moved], align=True))
        assert all(torch.equal(merged[name], tensor) for name, tensor in want.items())
    apart = [
        sum(float((merged[name] - tensor).square().sum()) for name, tensor in want.items())
        for merged in (
            open_checkpoint(merge([model, other], align=align)) for align in (False, True)
        )
        for want in [open_checkpoint(model)]
    ]
    assert apart[1] < apart[0]


@pytest.mark.parametrize("with_base", [False, True])
def test_folders_are_aligned_by_command_and_recipe(tmp_path: Path, with_base: bool) -> None:
    model, other = built("gpt2", 0).to(torch.bfloat16), built("gpt2", 0).to(torch.bfloat16)
    shuffle(other)
    for name, module in (("a", model), ("b", other)):
        module.save_pretrained(tmp_path / name)  # type: ignore[operator]
    a, b, out = str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out")
    models = [b, b] if with_base else [a, b]
    base = ["--base", a] if with_base else []
    assert run(["merge", *models, "--align", *base, "-o", out]) == 0
    merged = open_checkpoint(out)
    for key, tensor in open_checkpoint(a).items():
        assert torch.equal(merged[key], tensor), key
    recipe = Recipe(tuple(models), base=a if with_base else None, align=True)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.read(tmp_path / "recipe.yaml") == recipe
    assert merged.source.made_from["recipe"]["align"] is True
    assert torch.equal(recipe.merge()["transformer.wte.weight"], merged["transformer.wte.weight"])


def test_what_cant_be_aligned_is_refused() -> None:
    loose = {
        "blocks.0.attn.qkv.weight": torch.ones(6, 2),
        "blocks.0.attn.proj.weight": torch.eye(2),
    }
    with pytest.raises(MismatchError, match="how many heads"):
        merge([loose, loose], align=True)
    with pytest.raises(MismatchError, match="which axes of w permute"):
        merge([{"w": torch.eye(2)}] * 2, align=True)
    grouped = timm.create_model("resnext26ts", num_classes=2)
    with pytest.raises(MismatchError, match="can't be aligned"):
        merge([grouped, grouped], align=True)
    wide = timm.create_model("resnext50_32x4d", num_classes=2)
    with pytest.raises(MismatchError, match="units"):
        merge([wide, wide], align=True)
    model, broken = built("llama", 0), built("llama", 1)
    with torch.no_grad():
        broken.get_parameter("model.norm.weight")[3] = torch.nan
    with pytest.raises(NonfiniteError, match=r"model\.norm\.weight holds NaN"):
        merge([model, broken], align=True).state_dict()
    with pytest.raises(OptionError, match="statistics"):
        merge([model, model], "regmean", align=True, statistics=[{}, {}])
    with pytest.raises(RecipeError, match="align is 3"):
        Recipe.of({"models": ["a", "b"], "align": 3})
    with pytest.raises(RecipeError, match="not of a part"):
        Recipe.of({"modules": {"text": {"models": ["a", "b"], "align": True}}})
    with pytest.raises(RecipeError, match="not of the layers"):
        Recipe.of({"slices": [{"models": [{"model": "a", "layers": [0, 1]}], "align": True}]})


def learn(seed: int, images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 8}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(120):
        chosen = torch.arange(step * 64, step * 64 + 64) % len(images)
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_models_from_different_starts_are_merged_at_less_loss() -> None:
    train = as_tasks(["mnist"])[0].load("train")
    pictures = [pil_to_tensor(train[i].convert("RGB").resize((32, 32))) for i in range(640)]
    images = torch.stack(pictures).float() / 128 - 1
    labels = torch.from_numpy(train.labels[:640])
    models = [learn(seed, images, labels) for seed in (0, 1)]

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(nn.functional.cross_entropy(model(images), labels))

    ends = sum(map(loss, models)) / 2
    barriers = [loss(merge(models, align=align)) - ends for align in (False, True)]
    assert 0 < barriers[1] < 0.8 * barriers[0]
