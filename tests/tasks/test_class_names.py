"""Orders of classes, and matching the outputs of classifiers by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.data_sets import paint
from PIL import Image
from safetensors.torch import save_file
from torchvision.datasets import ImageFolder

from weightops import evaluate
from weightops.errors import OptionError, TaskError
from weightops.tasks.class_names import ordered
from weightops.tasks.folder import folder_task

NAMES = ["leaf_2", "leaf_10", "leaf__X", "Root"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of four classes, each of one grey."""
    for i, name in enumerate(NAMES):
        for split in ("train", "val", "test"):
            for k in range(2):
                paint(tmp_path / "plants" / split / name / f"{k}.png", 60 * i)
                grey = (60 * i,) * 3
                Image.new("RGB", (32, 32), grey).save(
                    tmp_path / "plants" / split / name / f"{k}.png"
                )
    return tmp_path / "plants"


def classifier(folder: Path, root: Path, order: list[str], recorded: bool) -> str:
    """Write a timm folder whose outputs are in an order, fitted to the test pictures."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=4).eval()
    data = ImageFolder(root / "test")
    values = [
        (torch.full((3, 32, 32), image.getpixel((0, 0))[0] / 255) - 0.5) / 0.5 for image, _ in data
    ]
    truth = torch.tensor([order.index(data.classes[label]) for _, label in data])
    with torch.no_grad():
        features = net.forward_head(net.forward_features(torch.stack(values)), pre_logits=True)
        inputs = torch.cat([features, torch.ones(len(features), 1)], 1).double()
        targets = torch.nn.functional.one_hot(truth, 4).double()
        solution = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution.float()
        net.fc.weight.copy_(solution[:-1].T)
        net.fc.bias.copy_(solution[-1])
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors"
    )
    settings = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    config = {"architecture": "resnet10t", "num_classes": 4, "pretrained_cfg": settings}
    names = {"label_names": order} if recorded else {}
    (folder / "config.json").write_text(json.dumps({**config, **names}))
    return str(folder)


def accuracy(model: str, root: Path, order: str | None = None) -> float:
    return float(evaluate(model, str(root), class_order=order, device="cpu")["plants"]["acc1"])


def test_folders_are_in_the_order_of_image_folder(root: Path, tmp_path: Path) -> None:
    task = folder_task(root)
    assert list(task.raw_classes) == ImageFolder(root / "test").classes
    assert task.classes == ("Root", "leaf  X", "leaf 10", "leaf 2")[:1] + tuple(
        name.replace("_", " ") for name in ImageFolder(root / "test").classes[1:]
    )
    model = classifier(tmp_path / "alphabetical", root, list(task.raw_classes), recorded=False)
    assert accuracy(model, root) == 1.0


def test_outputs_are_matched_by_their_recorded_names(root: Path, tmp_path: Path) -> None:
    order = ["leaf__X", "leaf_2", "Root", "leaf_10"]
    model = classifier(tmp_path / "recorded", root, order, recorded=True)
    assert accuracy(model, root) == 1.0
    assert accuracy(model, root, "task") < 1.0
    config = json.loads((tmp_path / "recorded" / "config.json").read_text())
    config["label_names"] = ["leaf x", "LEAF 2", "root", "Leaf-10"]
    (tmp_path / "recorded" / "config.json").write_text(json.dumps(config))
    assert accuracy(model, root) == 1.0
    config["label_names"] = ["n1", "n2", "n3", "n4"]
    described = dict(
        zip(config["label_names"], [f"{name}, a plant" for name in order], strict=True)
    )
    config["label_descriptions"] = described
    (tmp_path / "recorded" / "config.json").write_text(json.dumps(config))
    assert accuracy(model, root) == 1.0
    del config["label_descriptions"]
    (tmp_path / "recorded" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TaskError, match=r"n1, n2, n3 and 1 more, and plants has Root"):
        accuracy(model, root)


def test_an_order_that_is_given(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    natural = ["leaf_2", "leaf_10", "leaf__X", "Root"]
    model = classifier(tmp_path / "natural", root, natural, recorded=False)
    assert accuracy(model, root, "natural") == 1.0
    (tmp_path / "names.txt").write_text("\n".join(natural))
    assert accuracy(model, root, str(tmp_path / "names.txt")) == 1.0
    assert "records no names" not in caplog.text
    assert accuracy(model, root) < 1.0
    assert "its outputs are taken to be in the order of plants; class_order= says" in caplog.text
    with pytest.raises(OptionError, match="no class order 'sideways'"):
        ordered(folder_task(root), "sideways")
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(TaskError, match="don't match"):
        ordered(folder_task(root), str(tmp_path / "names.txt"))
