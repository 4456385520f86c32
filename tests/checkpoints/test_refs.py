"""Refs: the Hub through its cache and over HTTP, and pretrained models of open_clip and timm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_hub import fake_hub
from helpers.hub_cache import COMMIT, python, repository
from safetensors.torch import save_file
from torch import nn

from weightops.checkpoints.refs import _wanted


def weights(state: dict[str, torch.Tensor], folder: Path) -> bytes:
    """Return the bytes of a safetensors file."""
    save_file({n: t.clone().contiguous() for n, t in state.items()}, folder / "w.safetensors")
    return (folder / "w.safetensors").read_bytes()


def pickled(state: dict[str, torch.Tensor], folder: Path) -> bytes:
    """Return the bytes of a torch file."""
    torch.save(state, folder / "w.bin")
    return (folder / "w.bin").read_bytes()


OFFLINE = """
import json, os, torch
from PIL import Image
from weightops import TaskVector, open_checkpoint
from weightops.cli.main import run
from weightops.errors import WeightopsError

def message(ref):
    try:
        open_checkpoint(ref)
    except WeightopsError as error:
        return str(error)

os.chdir(os.environ["WORK"])
hub = open_checkpoint("org/tiny")
one_file = open_checkpoint("org/tiny:pytorch_model.bin")
tag = open_checkpoint("open_clip:RN50/openai")
quick = open_checkpoint("open_clip:ViT-B-32/openai")
timm = open_checkpoint("timm:test_vit.r160_in1k")
image = Image.new("RGB", (50, 40))
with torch.no_grad():
    logits = timm.model()(timm.preprocess()(image)[None])
timm.save("timm")
import timm as library
again = library.create_model("local-dir:timm", pretrained=True).eval()
facts = {
    "ref": hub.ref,
    "file": one_file.ref,
    "revision": open_checkpoint("org/tiny@main").ref,
    "norm": TaskVector("org/tiny", "org/tiny@main").norm(),
    "same": torch.equal(hub["weight"], one_file["weight"]),
    "sharded": list(open_checkpoint("org/sharded")),
    "quick": quick.architecture.config["model_cfg"]["quick_gelu"],
    "quick_ref": quick.ref,
    "timm": [timm.ref, list(logits.shape)],
    "timm_again": all(torch.equal(t, timm[name]) for name, t in again.state_dict().items()),
    "absent": message("org/absent"),
    "no_file": message("org/tiny:absent.bin"),
    "mistyped": message("out/model.safetensors"),
    "unknown": message("open_clip:ViT-B-32/opnai"),
    "unknown_timm": message("timm:vit_tiny_patch16_225"),
    "inspect": run(["inspect", "org/tiny", "--no-tensors"]),
}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The facts that `OFFLINE` finds in a process without a network, with a filled cache."""
    root = tmp_path_factory.mktemp("offline")
    fill_cache(root / "home" / "hub", root)
    (root / "work").mkdir()
    output = python(
        OFFLINE, WORK=str(root / "work"), HF_HOME=str(root / "home"), HF_HUB_OFFLINE="1"
    )
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def fill_cache(hub: Path, folder: Path) -> None:
    import timm

    state = nn.Linear(2, 3).state_dict()
    both = {
        "model.safetensors": weights(state, folder),
        "pytorch_model.bin": pickled(state, folder),
    }
    repository(hub, "org/tiny", both)
    files = {name: f"pytorch_model-{i + 1}.bin" for i, name in enumerate(("weight", "bias"))}
    shards = {file: pickled({name: state[name]}, folder) for name, file in files.items()}
    index = json.dumps({"weight_map": files}).encode()
    repository(hub, "org/sharded", {"pytorch_model.bin.index.json": index, **shards})
    small = {"open_clip_model.safetensors": weights(state, folder)}
    repository(hub, "timm/resnet50_clip.openai", small)
    repository(hub, "timm/vit_base_patch32_clip_224.openai", small)
    vit = timm.create_model("test_vit", pretrained=False)
    pretrained = {
        "input_size": [3, 160, 160],
        "fixed_input_size": True,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    config = {"architecture": "test_vit", "num_classes": 1000, "pretrained_cfg": pretrained}
    described = {
        "model.safetensors": weights(vit.state_dict(), folder),
        "config.json": json.dumps(config).encode(),
    }
    repository(hub, "timm/test_vit.r160_in1k", described)


def test_the_hub_from_the_cache(facts: dict[str, Any]) -> None:
    assert facts["ref"] == facts["revision"] == f"org/tiny@{COMMIT}"
    assert facts["file"] == f"org/tiny@{COMMIT}:pytorch_model.bin"
    assert facts["norm"] == 0
    assert facts["same"]
    assert facts["sharded"] == ["weight", "bias"]
    assert facts["inspect"] == 0


def test_pretrained_models_from_the_cache(facts: dict[str, Any]) -> None:
    assert facts["quick"] is True
    assert facts["quick_ref"] == "open_clip:ViT-B-32/openai"
    assert facts["timm"] == ["timm:test_vit.r160_in1k", [1, 1000]]
    assert facts["timm_again"]


def test_refs_that_cannot_be_fetched(facts: dict[str, Any]) -> None:
    assert facts["absent"].startswith(
        "org/absent is not a local path, and can't be fetched from the Hugging Face Hub: "
    )
    assert "\n" not in facts["absent"] + facts["no_file"]
    assert facts["mistyped"].startswith("there is no file or folder out/model.safetensors")
    assert "did you mean ViT-B-32/openai" in facts["unknown"]
    assert "or vit_tiny_patch16_224" in facts["unknown_timm"]


ONLINE = """
from weightops import open_checkpoint
from weightops.errors import WeightopsError
checkpoint = open_checkpoint("org/tiny")
print(checkpoint.ref, len(checkpoint), type(checkpoint.architecture).__name__)
try:
    open_checkpoint("org/absent")
except WeightopsError as error:
    print(error)
"""


def test_over_http(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    state = nn.Linear(2, 3).state_dict()
    files = {
        "model.safetensors": weights(state, tmp_path),
        "pytorch_model.bin": pickled(state, tmp_path),
        "config.json": b'{"model_type": "linear"}',
    }
    with fake_hub(files) as environment:
        first, absent = python(ONLINE, HF_HOME=home, **environment).splitlines()[:2]
    assert first == f"org/tiny@{COMMIT} 2 TransformersArchitecture"
    assert absent.startswith(
        "org/absent is not a local path, and can't be fetched from the Hugging Face Hub: "
    )
    fetched = {path.name for path in (tmp_path / "home" / "hub").rglob("snapshots/*/*")}
    assert fetched == {"model.safetensors", "config.json"}  # not the weights a second time
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    assert python(ONLINE, HF_HOME=home, **offline).splitlines()[0] == first


def test_what_is_fetched() -> None:
    known = (
        "open_clip_model.safetensors",
        "model.safetensors.index.json",
        "model.safetensors",
        "pytorch_model.bin",
    )
    assert _wanted(["model.safetensors", "pytorch_model.bin"], known)[-1] == "model.safetensors"
    assert (
        _wanted(
            ["model.safetensors.index.json", "model-00001-of-2.safetensors", "pytorch_model.bin"],
            known,
        )[-1]
        == "model-*.safetensors"
    )
    assert "adapter_model.*" in _wanted(
        ["adapter_config.json", "adapter_model.bin"], (*known, "adapter_config.json")
    )
    assert _wanted(["a.pt", "b.onnx"], known)[-4:] == ["*.bin", "*.pt", "*.pth", "*.ckpt"]
    unet = ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin")
    text = ("text_encoder/pytorch_model.fp16.bin", "text_encoder/pytorch_model.bin")
    variant = "unet/diffusion_pytorch_model.fp16.safetensors"
    pipeline = ["model_index.json", "model.safetensors", *unet, variant, *text]
    assert _wanted(pipeline, known)[-2:] == [unet[0], text[1]]
    modules = ["modules.json", "model.safetensors", "2_Dense/pytorch_model.bin"]
    assert _wanted(modules, known)[-2:] == ["model.safetensors", "2_Dense/pytorch_model.bin"]
