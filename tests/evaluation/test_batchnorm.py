"""Recomputed statistics of batch normalisation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from weightops import TASKS, Checkpoint, ImageModel, TaskVector, evaluate, open_checkpoint
from weightops.algebra.same_bits import same_weights
from weightops.checkpoints.libraries.open_clip import OpenClipArchitecture
from weightops.cli.main import run
from weightops.errors import NonfiniteError, OptionError
from weightops.evaluation.batchnorm import recompute_batchnorm
from weightops.merging.merge import merge
from weightops.merging.recipe import Recipe
from weightops.workflows.negate import negate
from weightops.workflows.soup import soup


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    """A small open_clip folder whose image encoder has batch normalisation."""
    folder = open_checkpoint("embedded").save(tmp_path / "resnet")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    architecture = OpenClipArchitecture(folder)
    form = open_checkpoint(architecture.build()).form
    Checkpoint(form, architecture).save(folder, overwrite=True)
    return folder


@pytest.fixture
def models(resnet: Path, tmp_path: Path) -> list[str]:
    """The paths of the ResNet and of a perturbed copy."""
    checkpoint = open_checkpoint(resnet)
    torch.manual_seed(1)
    other = {
        name: tensor + 0.02 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint.state_dict().items()
    }
    Checkpoint(open_checkpoint(other).form, checkpoint.architecture).save(tmp_path / "other")
    return [str(resnet), str(tmp_path / "other")]


def test_statistics_are_those_of_the_images(resnet: Path) -> None:
    before = open_checkpoint(resnet)
    after = recompute_batchnorm(resnet, "digits", images=256, batch_size=64, device="cpu")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name
        for name in before
        if name.startswith("visual.") and ("running_" in name or "num_batches" in name)
    }
    model = ImageModel.open(resnet, "cpu")
    order = np.random.default_rng(0).permutation(997)[:256]
    images = model.pixels(TASKS["digits"], "train").batch(order)
    with torch.no_grad():
        first = model.module.visual.conv1(images)
    assert torch.allclose(after["visual.bn1.running_mean"], first.mean((0, 2, 3)), atol=1e-5)
    variances = torch.stack([batch.var((0, 2, 3)) for batch in first.split(64)]).mean(0)
    assert torch.allclose(after["visual.bn1.running_var"], variances, atol=1e-5)


def test_every_way_of_averaging_gives_the_same_statistics(
    models: list[str], tmp_path: Path
) -> None:
    mean = recompute_batchnorm(merge(models, "linear"), "digits", device="cpu")
    soup(
        models,
        tmp_path / "soup",
        tasks=["digits"],
        recipe="uniform",
        batchnorm="digits",
        device="cpu",
    )
    assert run(["merge", *models, "--batchnorm", "digits", "-o", str(tmp_path / "merged")]) == 0
    vector = TaskVector(*models).save(tmp_path / "vector.safetensors")
    half = ["--base", models[0], "--alpha", "0.5", "--batchnorm", "digits"]
    assert run(["apply", str(vector), *half, "-o", str(tmp_path / "applied")]) == 0
    for out in ("soup", "merged"):
        assert same_weights(open_checkpoint(tmp_path / out).source, mean.source)
    applied = open_checkpoint(tmp_path / "applied")
    assert all(
        torch.allclose(applied[n], mean[n], atol=1e-4) for n in mean if mean[n].is_floating_point()
    )


def test_the_task_is_recorded(models: list[str], tmp_path: Path) -> None:
    Recipe(tuple(models), batchnorm="digits").merge().save(tmp_path / "merged")
    made_from = open_checkpoint(tmp_path / "merged").source.made_from["base"]
    assert made_from["batchnorm"] == "digits"
    assert made_from["model"]["terms"]
    assert "batchnorm: digits" in (tmp_path / "merged" / "README.md").read_text()
    halves = Recipe(tuple(models), dtype="float16", batchnorm="digits").merge()
    assert {spec.dtype for spec in halves.specs.values()} == {torch.float16, torch.int64}
    soup(models, tmp_path / "soup", tasks=["digits"], recipe="uniform", batchnorm="digits")
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "batch statistics of the training images of digits" in card


def test_a_model_without_batch_normalisation() -> None:
    with pytest.raises(OptionError, match="nothing to recompute"):
        recompute_batchnorm("embedded", "digits")


def test_nothing_but_batch_normalisation_trains(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    drops = {"drop_path_rate": 0.5}
    net = timm.create_model("resnet10t", num_classes=10, zero_init_last=False, **drops)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    shape = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "resnet10t", "num_classes": 10, "model_args": drops}
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": shape}))
    one, two = (
        recompute_batchnorm(tmp_path, "digits", images=64, batch_size=32, device="cpu")
        for _ in range(2)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    plain = timm.create_model("resnet10t", num_classes=10, zero_init_last=False)
    plain.load_state_dict(net.state_dict())
    model = ImageModel.open(tmp_path, "cpu")
    order = np.random.default_rng(0).permutation(997)[:64]
    batches = model.pixels(TASKS["digits"], "train").batch(order).split(32)
    torch.optim.swa_utils.update_bn(batches, plain)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(one[name].double(), tensor.double(), atol=1e-5)


def test_a_negative_variance_is_told_where_it_is_written(
    models: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grown = open_checkpoint(models[0]).state_dict()
    grown = {n: 3 * t if n.endswith("var") else t for n, t in grown.items()}
    TaskVector(models[0], grown).apply(models[0], alpha=-1.0).save(tmp_path / "negated")
    assert "negative or infinite variances in" in caplog.text
    assert "batchnorm=TASK recomputes them, batchnorm='base' keeps the base's" in caplog.text


def test_a_negative_variance_is_not_scored(models: list[str]) -> None:
    checkpoint = open_checkpoint(models[0])
    grown = {n: 3 * t if n.endswith("var") else t for n, t in checkpoint.state_dict().items()}
    edited = TaskVector(models[0], grown).apply(models[0], alpha=-1.0)
    with pytest.raises(NonfiniteError, match=r"running variances .* are negative: visual.*var"):
        evaluate(edited, "digits")
    recomputed = recompute_batchnorm(edited, "digits", images=64, device="cpu")
    assert evaluate(recomputed, "digits")["digits"]["n"] == 500


def test_statistics_of_the_base_are_kept(models: list[str], tmp_path: Path) -> None:
    """`batchnorm="base"` gives the base's statistics to the bit, and leaves all else as it is."""
    base = open_checkpoint(models[0])
    grown = {
        n: t * (3.0 if n.endswith("var") else 1.1) if t.is_floating_point() else t
        for n, t in base.state_dict().items()
    }
    Checkpoint(open_checkpoint(grown).form, base.architecture).save(tmp_path / "grown")
    TaskVector(models[0], str(tmp_path / "grown")).save(tmp_path / "vector.safetensors")
    vector = str(tmp_path / "vector.safetensors")
    negated = ["apply", vector, "--base", models[0], "--alpha=-1", "-o"]
    assert run([*negated, str(tmp_path / "plain")]) == 0
    assert run([*negated, str(tmp_path / "kept"), "--batchnorm", "base"]) == 0
    plain, kept = (open_checkpoint(tmp_path / name) for name in ("plain", "kept"))
    for name in base:
        expected = base if "running_" in name else plain
        assert torch.equal(kept[name], expected[name]), name
    with pytest.raises(NonfiniteError, match="batchnorm='base' it keeps the base's"):
        evaluate(str(tmp_path / "plain"), "digits")
    assert evaluate(str(tmp_path / "kept"), "digits")["digits"]["n"] == 500
    command = ["merge", models[0], str(tmp_path / "grown"), "--batchnorm", "base"]
    assert run([*command, "-o", str(tmp_path / "no")]) == 2
    assert run([*command, "--base", models[0], "-o", str(tmp_path / "merged")]) == 0
    merged = open_checkpoint(tmp_path / "merged")
    assert torch.equal(merged["visual.bn1.running_var"], base["visual.bn1.running_var"])
    assert not torch.equal(merged["visual.bn1.weight"], base["visual.bn1.weight"])
    assert "batchnorm: base" in (tmp_path / "merged" / "README.md").read_text()
    with pytest.raises(OptionError, match="no batch normalisation"):
        negate("mnist", tmp_path / "x", finetuned="embedded", batchnorm="base", control="digits")


@pytest.mark.parametrize("choice", [None, "base", "digits"])
def test_a_negation_with_negative_variances(
    models: list[str],
    tmp_path: Path,
    choice: str | None,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = open_checkpoint(models[0])
    grown = {n: 3 * t if n.endswith("var") else t for n, t in base.state_dict().items()}
    noise = {n: 0.01 * torch.randn_like(t) for n, t in base.state_dict().items() if t.ndim > 1}
    grown = {n: t + noise.get(n, 0) for n, t in grown.items()}
    Checkpoint(open_checkpoint(grown).form, base.architecture).save(tmp_path / "grown")
    command = ["negate", "--target", "digits", "--control", "fonts", "--model", models[0]]
    command += ["--finetuned", str(tmp_path / "grown"), "--alphas", "0,0.25,1"]
    command += ["--control-threshold", "0.01", "-o", str(tmp_path / "out")]
    code = run([*command, *(["--batchnorm", choice] if choice else [])])
    left_out = "alpha -1 is left out of the search: 19 running variances"
    assert (left_out in caplog.text) == (choice is None)
    if code == 0:
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["options"].get("batchnorm") == choice
        edited = open_checkpoint(tmp_path / "out")
        if choice == "base":
            assert torch.equal(edited["visual.bn1.running_var"], base["visual.bn1.running_var"])
    else:
        assert "no alpha improves digits" in capsys.readouterr().err
