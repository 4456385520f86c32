"""Zero-shot evaluation against plain formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from weightops import TASKS, Checkpoint, ImageModel, Task, TaskVector, evaluate, open_checkpoint
from weightops.algebra.source import same_weights
from weightops.checkpoints.libraries.open_clip import OpenClipArchitecture
from weightops.cli.main import run
from weightops.errors import CheckpointError, OptionError
from weightops.evaluation.batchnorm import recompute_batchnorm
from weightops.evaluation.zero_shot import metrics, zero_shot
from weightops.merging.merge import merge
from weightops.merging.recipe import Recipe
from weightops.workflows.soup import soup


@pytest.fixture(scope="module")
def clip() -> ImageModel:
    return ImageModel.open("embedded", "cpu")


def test_head_and_scores_against_a_plain_loop(clip: ImageModel) -> None:
    task = TASKS["digits"]
    images = task.load("validation")
    with torch.no_grad():
        rows = []
        for name in task.classes:
            texts = F.normalize(
                clip.module.encode_text(clip.tokenizer([t.format(name) for t in task.templates])),
                dim=-1,
            )
            rows.append(F.normalize(texts.mean(0), dim=0))
        head = torch.stack(rows) * clip.module.logit_scale.exp()
        pixels = torch.stack([clip.preprocess(images[i]) for i in range(len(images))])
        logits = F.normalize(clip.module.encode_image(pixels), dim=-1) @ head.T
    guesses = logits.argmax(1).numpy()
    labels = np.asarray(images.labels)
    for _ in range(2):  # computed, then from the caches
        assert torch.allclose(clip.zero_shot_head(task), head, atol=1e-5)
        scores = evaluate(clip, "digits", split="validation", details=True)["digits"]
        assert scores["acc1"] == pytest.approx((guesses == labels).mean())
        recall = [(guesses[labels == c] == c).mean() for c in range(10)]
        assert scores["per_class_recall"] == pytest.approx(recall)
        assert scores["mean_per_class_recall"] == pytest.approx(np.mean(recall))
        assert scores["acc5"] == pytest.approx(
            (torch.topk(logits, 5).indices == torch.from_numpy(labels)[:, None])
            .any(1)
            .double()
            .mean()
            .item()
        )
        assert np.array(scores["confusion"]).sum() == len(labels)


def test_kept_pixels_are_the_pixels(clip: ImageModel) -> None:
    images = TASKS["shapes"].load("validation")
    pixels = clip.pixels(TASKS["shapes"], "validation")
    indices = np.array([3, 1, 4])
    fresh = torch.stack([clip.preprocess(images[int(i)]) for i in indices])
    assert torch.equal(pixels.batch(indices), fresh)
    assert torch.equal(pixels.batch(indices), fresh)


def test_metrics() -> None:
    guesses, labels = torch.tensor([[0, 1], [1, 0], [1, 0], [3, 0]]), torch.tensor([0, 0, 1, 3])
    result = metrics(guesses, labels, 4)
    assert result == {
        "acc1": 0.75,
        "acc5": pytest.approx(math.nan, nan_ok=True),
        "mean_per_class_recall": pytest.approx((0.5 + 1 + 1) / 3),
        "n": 4,
    }


def test_a_head_is_not_taken_from_another_model(clip: ImageModel) -> None:
    other = ImageModel.open("embedded", "cpu")
    with torch.no_grad():
        other.module.text_projection.add_(0.1 * torch.randn_like(other.module.text_projection))
    assert not torch.allclose(
        clip.zero_shot_head(TASKS["digits"]), other.zero_shot_head(TASKS["digits"]), atol=1e-3
    )


def test_heads_tell_models_and_prompts_apart(
    clip: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS["digits"]
    head = clip.zero_shot_head(task)
    other = ImageModel.open("embedded", "cpu")
    with torch.no_grad():
        other.module.token_embedding.weight[1000:1010] += 1
    assert other._text_hash(torch.zeros(1)) != clip._text_hash(torch.zeros(1))
    for broken in (tmp_path / "file", Path("/proc/nope")):
        monkeypatch.setenv("WEIGHTOPS_CACHE", str(broken))
        (tmp_path / "file").write_bytes(b"")
        assert torch.allclose(clip.zero_shot_head(task), head, atol=1e-5)


def test_tasks_of_one_name_keep_their_own_pixels(clip: ImageModel) -> None:
    digits = TASKS["digits"]
    few = Task(
        "digits",
        digits.classes,
        digits.templates,
        lambda split: digits.load("validation"),
        digits.sizes,
        "",
        "",
    )
    assert zero_shot(clip, few, "test")["n"] == 300
    assert zero_shot(clip, digits, "test")["n"] == 500


def test_models_that_cannot_be_scored() -> None:
    with pytest.raises(CheckpointError, match="doesn't say of what model"):
        evaluate({"w": torch.zeros(1)}, "digits")


def test_a_model_with_nan_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = open_checkpoint("embedded")
    state = checkpoint.state_dict()
    state["visual.proj"][0, 0] = torch.nan
    checkpoint.as_of(open_checkpoint(state).form, checkpoint.architecture).model()
    assert "NaN or Inf in 1 tensor: visual.proj" in caplog.text


def test_embedded_loads_in_unmodified_open_clip(tmp_path: object) -> None:
    import open_clip

    folder = open_checkpoint("embedded").save(f"{tmp_path}/model")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    ours = ImageModel.open("embedded", "cpu")
    texts = ["a red circle", 'the number: "7".', "internationalization"]
    assert torch.equal(tokenizer(texts), ours.tokenizer(texts))
    assert tokenizer(texts).max() < model.vocab_size
    image = TASKS["shapes"].load("test")[0]
    with torch.no_grad():
        assert torch.equal(preprocess(image), ours.preprocess(image))
        assert torch.equal(
            model.eval().encode_image(preprocess(image)[None]),
            ours.module.encode_image(ours.preprocess(image)[None]),
        )


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    """A small open_clip directory whose image encoder has batch normalisation."""
    folder = open_checkpoint("embedded").save(tmp_path / "resnet")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    architecture = OpenClipArchitecture(folder)
    Checkpoint(open_checkpoint(architecture.build()).form, architecture).save(
        folder, overwrite=True
    )
    return folder


def test_batch_statistics_made_anew(resnet: Path, tmp_path: Path) -> None:
    before = open_checkpoint(resnet)
    after = recompute_batchnorm(resnet, "digits", images=256, batch_size=64, device="cpu")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name
        for name in before
        if name.startswith("visual.") and ("running_" in name or "num_batches" in name)
    }
    clip = ImageModel.open(resnet, "cpu")
    order = np.random.default_rng(0).permutation(997)[:256]
    images = clip.pixels(TASKS["digits"], "train").batch(order)
    with torch.no_grad():
        first = clip.module.visual.conv1(images)
    assert torch.allclose(after["visual.bn1.running_mean"], first.mean((0, 2, 3)), atol=1e-5)
    variances = torch.stack([part.var((0, 2, 3)) for part in first.split(64)]).mean(0)
    assert torch.allclose(after["visual.bn1.running_var"], variances, atol=1e-5)
    # An average of two has statistics of neither, however it is made.
    state = before.state_dict()
    torch.manual_seed(1)
    other = {
        n: t + 0.02 * torch.randn_like(t) if t.is_floating_point() else t for n, t in state.items()
    }
    Checkpoint(open_checkpoint(other).form, before.architecture).save(tmp_path / "other")
    models = [str(resnet), str(tmp_path / "other")]
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
    described = open_checkpoint(tmp_path / "merged").source.made_from["base"]
    assert described["batchnorm"] == "digits"
    assert described["model"]["terms"]
    applied = open_checkpoint(tmp_path / "applied")
    assert all(
        torch.allclose(applied[n], mean[n], atol=1e-4) for n in mean if mean[n].is_floating_point()
    )
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "batchnorm: digits" in card
    halves = Recipe(tuple(models), dtype="float16", batchnorm="digits").merge()
    assert {spec.dtype for spec in halves.specs.values()} == {torch.float16, torch.int64}
    assert (
        "batch statistics of the training images of digits"
        in (tmp_path / "soup" / "README.md").read_text()
    )
    with pytest.raises(OptionError, match="nothing to recompute"):
        recompute_batchnorm("embedded", "digits")
