"""The same weights in every format, from the papers' pickles to adapters, in every use."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from weightops import (
    TASKS,
    Checkpoint,
    TaskVector,
    evaluate,
    finetune,
    merge,
    open_checkpoint,
    patch,
)
from weightops.checkpoints.matching import convert_to
from weightops.checkpoints.renaming import rename_to_match
from weightops.cli.main import run
from weightops.search.strategies import SearchOptions
from weightops.training.config import config_for

PICKLED = """
import sys, types, torch
from weightops import open_checkpoint
module = types.ModuleType("src.modeling")
exec("import torch\\nclass ImageEncoder(torch.nn.Module): pass", module.__dict__)
sys.modules |= {"src": types.ModuleType("src"), "src.modeling": module}
module.ImageEncoder.__module__ = "src.modeling"
encoder = module.ImageEncoder()
weights = open_checkpoint(sys.argv[1] + "/x.safetensors")
encoder.model = weights.load_into(open_checkpoint("embedded").model())
delattr(encoder.model, "transformer")
torch.save(encoder, sys.argv[1] + "/encoder.pt")
parallel = torch.nn.DataParallel(encoder)
torch.save(parallel, sys.argv[1] + "/parallel.pt", _use_new_zipfile_serialization=False)
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The embedded model with its image encoder fine-tuned for a moment, in every format."""
    from helpers.hub_cache import repository
    from huggingface_hub import constants

    folder = tmp_path_factory.mktemp("formats")
    base = open_checkpoint("embedded")
    short = config_for(base, steps=8, batch_size=64, lr=1e-3)
    state = finetune("embedded", "mnist", short, out=folder / "tuned", device="cpu").state_dict()
    paths = {
        "safetensors": open_checkpoint(state).save(folder / "x.safetensors"),
        "shards": open_checkpoint(state).save(folder / "shards", max_shard_size=2_000_000),
        **torch_files(state, folder),
        **built_from_a_model(base, state, folder),
        **library_folders(base, state, folder),
        **deltas(base, state, folder),
    }
    content = {path.name: path.read_bytes() for path in paths["open_clip directory"].iterdir()}
    repository(folder / "hub", "org/formats", content)
    paths["Hub name"] = Path("org/formats")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield paths


def torch_files(state: dict[str, torch.Tensor], folder: Path) -> dict[str, Path]:
    """Write a state dict with torch of several ages, and in modules whose classes are gone."""
    from helpers.torch_archives import tar

    torch.save({"state_dict": state, "epoch": 1}, folder / "x.pt")
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(wrapped, folder / "old.pt", _use_new_zipfile_serialization=False)
    tar(folder / "oldest.pth", state)
    subprocess.run([sys.executable, "-c", PICKLED, str(folder)], check=True)
    return {
        "torch zip": folder / "x.pt",
        "torch stream": folder / "old.pt",
        "oldest tar": folder / "oldest.pth",
        "pickled encoder": folder / "encoder.pt",
        "pickled DataParallel": folder / "parallel.pt",
    }


def built_from_a_model(
    base: Checkpoint, state: dict[str, torch.Tensor], folder: Path
) -> dict[str, Path]:
    """Write a distributed checkpoint and TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state}, checkpoint_id=str(folder / "dcp"))
        model = base.model()
        model.load_state_dict(state)
        script = torch.jit.trace_module(Traceable(model), {"forward": torch.zeros(1, 3, 32, 32)})
        torch.jit.save(script, str(folder / "script.pt"))
    return {"distributed": folder / "dcp", "TorchScript": folder / "script.pt"}


def library_folders(
    base: Checkpoint, state: dict[str, torch.Tensor], folder: Path
) -> dict[str, Path]:
    """Write folders of open_clip and transformers."""
    directory = TaskVector(base, state).apply(base).save(folder / "open_clip")
    converted = convert_to(open_checkpoint(directory), "transformers")
    config = base.known_architecture().config["model_cfg"]
    return {
        "open_clip directory": directory,
        "transformers directory": converted.save(folder / "transformers"),
        "transformers encoder": save_encoder(config, state, folder / "encoder"),
    }


def deltas(base: Checkpoint, state: dict[str, torch.Tensor], folder: Path) -> dict[str, Path]:
    """Write an adapter and task vectors."""
    vector = TaskVector(base, state)
    vector.save_lora(folder / "adapter", 4)
    return {
        "LoRA adapter": folder / "adapter",
        "task vector": vector.save(folder / "vector.safetensors"),
        "compressed task vector": vector.save(folder / "small.safetensors", compress="int8"),
    }


class Traceable(nn.Module):
    """A model's tensors under its own names, with a ``forward`` that TorchScript can trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * sum(parameter.sum() for parameter in self.parameters())


def save_encoder(config: dict[str, Any], state: dict[str, torch.Tensor], folder: Path) -> Path:
    """Write the image encoder alone as a folder of transformers."""
    from transformers import CLIPConfig, CLIPVisionModel

    vision = config["vision_cfg"]
    settings = {
        "hidden_size": vision["width"],
        "intermediate_size": int(vision.get("mlp_ratio", 4) * vision["width"]),
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision.get("head_width", 64),
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
    }
    model = CLIPVisionModel(CLIPConfig(vision_config=settings).vision_config)
    wanted = {
        f"vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in model.state_dict().items()
    }
    visual = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith("visual.") and name != "visual.proj"
    }
    renamed = rename_to_match(open_checkpoint(visual).form, open_checkpoint(wanted).form)
    content = {name: t.contiguous() for name, t in Checkpoint(renamed).state_dict().items()}
    folder.mkdir()
    save_file(content, folder / "model.safetensors")
    described = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    (folder / "config.json").write_text(json.dumps({**described, **settings}))
    return folder


NAMES = [
    "safetensors",
    "shards",
    "torch zip",
    "torch stream",
    "oldest tar",
    "pickled encoder",
    "pickled DataParallel",
    "distributed",
    "TorchScript",
    "open_clip directory",
    "transformers directory",
    "transformers encoder",
    "Hub name",
    "LoRA adapter",
    "task vector",
    "compressed task vector",
]
APPROXIMATE = ("transformers encoder", "LoRA adapter", "compressed task vector")
"""Formats that don't hold all of the weights: without projection, in four ranks, in eight bits."""


@pytest.mark.parametrize("name", NAMES)
def test_arithmetic_merging_and_inspection(
    stored: dict[str, Path], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, path = open_checkpoint("embedded"), stored[name]
    edited = TaskVector("embedded", path).apply("embedded", 0.5)
    changed = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    delta = open_checkpoint(stored["safetensors"])[changed].double() - base[changed].double()
    if name == "LoRA adapter":
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        delta = u[:, :4] * s[:4] @ vh[:4]
    assert delta.norm() > 0
    again = pickle.loads(pickle.dumps(edited))
    assert torch.equal(again[changed], edited[changed])
    assert torch.allclose(
        edited[changed].double(),
        base[changed] + delta / 2,
        atol=1e-4 if "compressed" in name else 1e-6,
    )
    assert torch.equal(edited["ln_final.weight"], base["ln_final.weight"])
    assert set(merge([path, path], "ties", base="embedded")) == set(base)
    saved = edited.save(tmp_path / "out")
    assert open_checkpoint(saved).model() is not None
    assert run(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"]
    options = ["--method", "ties", "--base", "embedded", "-o", str(tmp_path / "m")]
    assert run(["merge", str(path), "embedded", *options]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_evaluation(stored: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--base",
        "embedded",
        "--tasks",
        "digits",
        "--split",
        "validation",
        "--device",
        "cpu",
        "--json",
    ]
    assert run(["evaluate", str(stored[name]), *options]) == 0
    [result] = json.loads(capsys.readouterr().out)
    equal = stored[name if name in APPROXIMATE else "safetensors"]
    form = TaskVector("embedded", equal).apply("embedded").form
    weights = Checkpoint(form, open_checkpoint("embedded").architecture)
    expected = evaluate(weights, "digits", split="validation", device="cpu")
    assert result["metrics"] == expected["digits"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A few images of two tasks, in folders."""
    folder = tmp_path_factory.mktemp("pictures")
    for task in (TASKS["mnist"], TASKS["digits"]):
        for split, (first, last) in {"train": (0, 2), "val": (0, 6), "test": (6, 12)}.items():
            images = task.load("validation")
            for label, name in enumerate(task.classes):
                place = folder / task.name / split / name
                place.mkdir(parents=True)
                for i in np.flatnonzero(np.asarray(images.labels) == label)[first:last]:
                    images[int(i)].save(place / f"{i}.png")
        (folder / task.name / "prompts.txt").write_text("\n".join(task.templates), encoding="utf-8")
    return folder / "mnist", folder / "digits"


@pytest.mark.parametrize("name", NAMES)
def test_patching(
    stored: dict[str, Path], name: str, pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    patching, supported = map(str, pictures)
    summary = patch(
        patching,
        tmp_path / "out",
        finetuned=stored[name],
        supported=[supported],
        search=SearchOptions((0.5,)),
        max_supported_drop=1.0,
        device="cpu",
    )
    assert summary["finetuned"].endswith(stored[name].name)
    patched = TaskVector("embedded", stored[name]).apply("embedded", summary["alpha"])
    written = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(written[name], patched[name]) for name in patched)
