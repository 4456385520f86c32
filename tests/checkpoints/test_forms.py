"""The same weights in every form, from the papers' pickles to an adapter: what one can do with one, one can do with all."""

from __future__ import annotations

import json
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
from weightops.training.config import config_for

PICKLED = """
import sys, types, torch
from weightops import open_checkpoint
module = types.ModuleType("src.modeling")
exec("import torch\\nclass ImageEncoder(torch.nn.Module): pass", module.__dict__)
sys.modules |= {"src": types.ModuleType("src"), "src.modeling": module}
module.ImageEncoder.__module__ = "src.modeling"
encoder = module.ImageEncoder()
encoder.model = open_checkpoint(sys.argv[1] + "/x.safetensors").load_into(open_checkpoint("embedded").model())
delattr(encoder.model, "transformer")
torch.save(encoder, sys.argv[1] + "/encoder.pt")
torch.save(torch.nn.DataParallel(encoder), sys.argv[1] + "/parallel.pt", _use_new_zipfile_serialization=False)
"""


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The embedded model with its image encoder fine-tuned for a moment, in every form."""
    from helpers.hub_cache import repository
    from helpers.torch_archives import tar
    from huggingface_hub import constants
    from transformers import CLIPConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("forms")
    base = open_checkpoint("embedded")
    short = config_for(base, steps=8, batch_size=64, lr=1e-3)
    state = finetune("embedded", "mnist", short, out=folder / "tuned", device="cpu").state_dict()
    made: dict[str, Path] = {}
    made["safetensors"] = open_checkpoint(state).save(folder / "x.safetensors")
    made["shards"] = open_checkpoint(state).save(folder / "shards", max_shard_size=2_000_000)
    torch.save({"state_dict": state, "epoch": 1}, folder / "x.pt")
    torch.save(
        {f"module.{name}": t for name, t in state.items()},
        folder / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    made |= {"torch zip": folder / "x.pt", "torch stream": folder / "old.pt"}
    subprocess.run([sys.executable, "-c", PICKLED, str(folder)], check=True)
    made |= {
        "pickled encoder": folder / "encoder.pt",
        "pickled DataParallel": folder / "parallel.pt",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state}, checkpoint_id=str(folder / "dcp"))
        model = base.model()
        model.load_state_dict(state)
        script = torch.jit.trace_module(_Plain(model), {"forward": torch.zeros(1, 3, 32, 32)})
        torch.jit.save(script, str(folder / "script.pt"))
    made |= {"distributed": folder / "dcp", "TorchScript": folder / "script.pt"}
    made["open_clip directory"] = TaskVector(base, state).apply(base).save(folder / "open_clip")
    config = base.architecture.config["model_cfg"]  # type: ignore[union-attr]
    made["transformers encoder"] = _encoder(
        config, state, folder / "encoder", CLIPConfig, CLIPVisionModel
    )
    made["transformers directory"] = convert_to(
        open_checkpoint(made["open_clip directory"]), "transformers"
    ).save(folder / "transformers")
    tar(folder / "oldest.pth", state)
    made["oldest tar"] = folder / "oldest.pth"
    content = {path.name: path.read_bytes() for path in made["open_clip directory"].iterdir()}
    repository(folder / "hub", "org/forms", content)
    made["Hub name"] = Path("org/forms")
    TaskVector(base, state).save_lora(folder / "adapter", 4)
    made["LoRA adapter"] = folder / "adapter"
    made["task vector"] = TaskVector(base, state).save(folder / "vector.safetensors")
    made["compressed task vector"] = TaskVector(base, state).save(
        folder / "small.safetensors", compress="int8"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield made


class _Plain(nn.Module):
    """A model's tensors under its own names, for TorchScript, which wants something to trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        used = sum(p.sum() for p in self.parameters())
        return images * used


def _encoder(
    config: dict[str, Any],
    state: dict[str, torch.Tensor],
    folder: Path,
    config_class: Any,
    model_class: Any,
) -> Path:
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
    model = model_class(config_class(vision_config=settings).vision_config)
    names = [
        name if name.startswith("vision_model.") else f"vision_model.{name}"
        for name in model.state_dict()
    ]
    wanted = open_checkpoint(
        {name: t for name, t in zip(names, model.state_dict().values(), strict=True)}
    ).form
    visual = {
        name: t for name, t in state.items() if name.startswith("visual.") and name != "visual.proj"
    }
    renamed = rename_to_match(open_checkpoint(visual).form, wanted)
    folder.mkdir()
    save_file(
        {n: t.contiguous() for n, t in Checkpoint(renamed).state_dict().items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(
        json.dumps(
            {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], **settings}
        )
    )
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
"""The forms that hold something else than the weights: no projection, four ranks, eight bits."""


@pytest.mark.parametrize("name", NAMES)
def test_arithmetic_merging_and_inspection(
    forms: dict[str, Path], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, form = open_checkpoint("embedded"), forms[name]
    edited = TaskVector("embedded", form).apply("embedded", 0.5)
    changed = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    delta = open_checkpoint(forms["safetensors"])[changed].double() - base[changed].double()
    if name == "LoRA adapter":
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        delta = u[:, :4] * s[:4] @ vh[:4]
    assert delta.norm() > 0
    assert torch.allclose(
        edited[changed].double(),
        base[changed] + delta / 2,
        atol=1e-4 if "compressed" in name else 1e-6,
    )
    assert torch.equal(edited["ln_final.weight"], base["ln_final.weight"])
    assert set(merge([form, form], "ties", base="embedded")) == set(base)
    saved = edited.save(tmp_path / "out")
    assert open_checkpoint(saved).model() is not None
    assert run(["inspect", str(form), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"]
    assert (
        run(
            [
                "merge",
                str(form),
                "embedded",
                "--method",
                "ties",
                "--base",
                "embedded",
                "-o",
                str(tmp_path / "m"),
            ]
        )
        == 0
    )


@pytest.mark.parametrize("name", NAMES)
def test_evaluation(forms: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert run(["evaluate", str(forms[name]), *options]) == 0
    [result] = json.loads(capsys.readouterr().out)
    same = TaskVector("embedded", forms[name if name in APPROXIMATE else "safetensors"]).apply(
        "embedded"
    )
    weights = Checkpoint(same.form, open_checkpoint("embedded").architecture)
    assert (
        result["metrics"] == evaluate(weights, "digits", split="validation", device="cpu")["digits"]
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A few images of two tasks, as a person's own folders."""
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
    forms: dict[str, Path], name: str, pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    patching, supported = map(str, pictures)
    options = {
        "supported": [supported],
        "alphas": [0.5],
        "max_supported_drop": 1.0,
        "device": "cpu",
    }
    summary = patch(patching, tmp_path / "out", finetuned=forms[name], **options)
    assert summary["finetuned"].endswith(forms[name].name)
    patched = TaskVector("embedded", forms[name]).apply("embedded", summary["alpha"])
    written = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(written[name], patched[name]) for name in patched)
