"""Models whose tensors have other names in memory than in their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_transformers import MODELS
from safetensors.torch import load_file, save_file

from weightops import TaskVector, merge, open_checkpoint

transformers = pytest.importorskip("transformers", minversion="5")


def edited_by_hand(base: Any, tuned: Any, alpha: float) -> Any:
    """Set a model to ``base + alpha (tuned - base)`` in its own names."""
    with torch.no_grad():
        for parameter, other in zip(base.parameters(), tuned.parameters(), strict=True):
            parameter.lerp_(other, alpha)
    return base


def loaded(kind: str, folder: Path) -> Any:
    """Load a folder with transformers, which must find all that it needs and no more."""
    model, told = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_edits_of_folders_and_modules_are_the_models_that_are_meant(
    name: str, tmp_path: Path
) -> None:
    tiny = MODELS[name]
    base, tuned = tiny.build(0), tiny.build(1)
    folders = [tmp_path / "base", tmp_path / "tuned"]
    for model, folder in zip((base, tuned), folders, strict=True):
        model.save_pretrained(folder)
    assert torch.equal(tiny.outputs(open_checkpoint(folders[1]).model()), tiny.outputs(tuned))
    of_folders = TaskVector(*folders).apply(folders[0], 0.4)
    of_module = TaskVector(folders[0], tuned).apply(folders[0], 0.4)
    module = TaskVector(base, folders[1]).apply(base, 0.4)
    expected = tiny.outputs(edited_by_hand(base, tuned, 0.4))
    for i, checkpoint in enumerate((of_folders, of_module)):
        written = loaded(tiny.kind, checkpoint.save(tmp_path / f"edited{i}"))
        torch.testing.assert_close(tiny.outputs(written), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tiny.outputs(module), expected, atol=1e-5, rtol=1e-4)


def packed(tensors: dict[str, torch.Tensor], module: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def with_gamma_and_beta(tensors: dict[str, torch.Tensor], module: Any) -> dict[str, torch.Tensor]:
    return {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in tensors.items()
    }


def with_prefix(tensors: dict[str, torch.Tensor], module: Any) -> dict[str, torch.Tensor]:
    return {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in tensors.items()}


def wrapped(tensors: dict[str, torch.Tensor], module: Any) -> dict[str, torch.Tensor]:
    return {f"module.{name}": tensor.clone() for name, tensor in module.state_dict().items()}


OTHER_NAMES = {
    "mixtral": packed,
    "qwen3_moe": wrapped,
    "bert": with_gamma_and_beta,
    "clip_vision": with_prefix,
    "vit": wrapped,
    "dinov2": packed,
    "llava": packed,
}
"""Model -> how another program would name the tensors of its file."""


@pytest.mark.parametrize("name", OTHER_NAMES)
@pytest.mark.parametrize("swapped", [False, True])
def test_two_files_of_one_class_without_a_common_name(
    name: str, swapped: bool, tmp_path: Path
) -> None:
    tiny = MODELS[name]
    models = [tiny.build(0), tiny.build(1)]
    folders = [tmp_path / "plain", tmp_path / "other"]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    file = folders[1] / "model.safetensors"
    tensors = OTHER_NAMES[name](load_file(file), models[1])
    tensors = {n: t for n, t in tensors.items() if n != "cls.predictions.decoder.weight"}
    save_file(tensors, file, metadata={"format": "pt"})
    if swapped:
        folders, models = folders[::-1], models[::-1]
    expected = tiny.outputs(edited_by_hand(*models, 0.5))
    merged = merge(folders).save(tmp_path / "merged")
    assert (
        load_file(merged / "model.safetensors").keys()
        == load_file(folders[0] / "model.safetensors").keys()
    )
    built = open_checkpoint(merged).model()
    torch.testing.assert_close(tiny.outputs(built), expected, atol=1e-5, rtol=1e-4)
    if not (swapped and OTHER_NAMES[name] is wrapped):  # which transformers doesn't load
        written = loaded(tiny.kind, merged)
        torch.testing.assert_close(tiny.outputs(written), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "vit", "dinov2"])
def test_a_saved_vector_of_modules_applies_to_a_folder_and_the_reverse(
    name: str, tmp_path: Path
) -> None:
    tiny = MODELS[name]
    base, tuned = tiny.build(0), tiny.build(1)
    for model, folder in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(tmp_path / folder)
    of_modules, of_folders = tmp_path / "modules.safetensors", tmp_path / "folders.safetensors"
    TaskVector(base, tuned).save(of_modules)
    TaskVector(tmp_path / "base", tmp_path / "tuned").save(of_folders)
    total = TaskVector.load(of_folders) + TaskVector(base, tuned)
    written = TaskVector.load(of_modules).apply(tmp_path / "base", 0.4, strict=True)
    module = TaskVector.load(of_folders).apply(base, 0.4, strict=True)
    twice = (total / 2).apply(tmp_path / "base", 0.4).model()
    folder = written.save(tmp_path / "edited")
    expected = tiny.outputs(edited_by_hand(base, tuned, 0.4))
    for model in (loaded(tiny.kind, folder), module, twice):
        torch.testing.assert_close(tiny.outputs(model), expected, atol=1e-5, rtol=1e-4)
