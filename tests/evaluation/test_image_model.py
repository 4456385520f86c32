"""Image models: heads, kept pixels, classifiers, models that can't be scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data_sets import paint
from PIL import Image

from weightops import TASKS, ImageModel, Task, evaluate, open_checkpoint
from weightops.algebra import precision
from weightops.errors import CheckpointError
from weightops.evaluation.linear_probe import linear_probe
from weightops.evaluation.pixels import Pixels
from weightops.evaluation.retrieval import retrieval
from weightops.evaluation.zero_shot import encode_split, zero_shot
from weightops.tasks.folder import folder_task


@pytest.fixture(scope="module")
def model() -> ImageModel:
    return ImageModel.open("embedded", "cpu")


def test_kept_pixels_are_the_pixels(model: ImageModel) -> None:
    images = TASKS["shapes"].load("validation")
    pixels = model.pixels(TASKS["shapes"], "validation")
    indices = np.array([3, 1, 4])
    fresh = torch.stack([model.preprocess(images[int(i)]) for i in indices])
    assert torch.equal(pixels.batch(indices), fresh)
    assert torch.equal(pixels.batch(indices), fresh)


def test_tasks_of_one_name_keep_their_own_pixels(model: ImageModel) -> None:
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
    assert zero_shot(model, few, "test")["n"] == 300
    assert zero_shot(model, digits, "test")["n"] == 500


def test_prompts_are_tokenised_once() -> None:
    model, texts = ImageModel.open("embedded", "cpu"), []
    encode = model.tokenizer
    model.tokenizer = lambda given: encode(texts.append(given) or given)
    for _ in range(2):
        model.class_features(TASKS["digits"])
    assert len(texts) == len(TASKS["digits"].classes)


def test_a_cached_head_is_not_used_for_another_model(model: ImageModel) -> None:
    task = TASKS["digits"]
    other = ImageModel.open("embedded", "cpu")
    with torch.no_grad():
        other.module.text_projection.add_(0.1 * torch.randn_like(other.module.text_projection))
    assert not torch.allclose(model.zero_shot_head(task), other.zero_shot_head(task), atol=1e-3)
    other = ImageModel.open("embedded", "cpu")
    with torch.no_grad():
        other.module.token_embedding.weight[1000:1010] += 1
    assert other._text_hash([torch.zeros(1)]) != model._text_hash([torch.zeros(1)])


def test_a_head_without_a_usable_cache(
    model: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = model.zero_shot_head(TASKS["digits"])
    (tmp_path / "file").write_bytes(b"")
    for unusable in (tmp_path / "file", Path("/proc/nope")):
        monkeypatch.setenv("WEIGHTOPS_CACHE", str(unusable))
        assert torch.allclose(model.zero_shot_head(TASKS["digits"]), head, atol=1e-5)


def test_a_classifier_has_features_and_no_text(tmp_path: Path) -> None:
    import timm

    for split, count in (("train", 20), ("val", 4), ("test", 4)):
        for i in range(count):
            path = tmp_path / "set" / split / "ab"[i % 2] / f"{i}.png"
            paint(path, 0)
            Image.new("RGB", (160, 160), (250 * (i % 2), 40, i)).save(path)
    (tmp_path / "vit").mkdir()
    vit = timm.create_model("test_vit", num_classes=3)
    timm.models.save_for_hf(vit, tmp_path / "vit", safe_serialization=True)
    model = ImageModel.open(tmp_path / "vit", "cpu")
    task = folder_task(tmp_path / "set")
    assert linear_probe(model, task, "test")["lp_acc1"] == 1.0
    assert encode_split(model, task, "test", features=True).shape == (4, 64)
    with pytest.raises(CheckpointError, match="takes no text"):
        retrieval(model, task, "test")


def test_a_classifier_runs_in_float32_where_clip_runs_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that tells near features apart is right in float32 alone."""
    timm = pytest.importorskip("timm")
    monkeypatch.delenv("WEIGHTOPS_PRECISION")
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    assert ImageModel.open("embedded", "cpu").precision == "bfloat16"
    for split in ("train", "val", "test"):
        for level in range(5):
            for i in range(3):
                path = tmp_path / "grays" / split / f"gray {level}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (160, 160), (100 + level,) * 3).save(path)
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=5).eval()
    timm.models.save_for_hf(vit, tmp_path / "vit", safe_serialization=True)
    task = folder_task(tmp_path / "grays")
    first = ImageModel.open(tmp_path / "vit", "cpu", precision="float32")
    features = encode_split(first, task, "test", features=True).double()
    wanted = torch.eye(5, dtype=torch.float64)[torch.from_numpy(task.load("test").labels)]
    ones = torch.ones(len(features), 1, dtype=torch.float64)
    solved = torch.linalg.lstsq(torch.cat([features, ones], 1), wanted, driver="gelsd").solution
    with torch.no_grad():
        vit.head.weight.copy_(solved[:-1].T)
        vit.head.bias.copy_(solved[-1])
    timm.models.save_for_hf(vit, tmp_path / "fitted", safe_serialization=True)
    order = {"class_order": "natural"}
    assert evaluate(tmp_path / "fitted", task, device="cpu", **order)["grays"]["acc1"] == 1.0
    low = evaluate(tmp_path / "fitted", task, device="cpu", precision="bfloat16", **order)
    assert low["grays"]["acc1"] < 1.0


def test_models_that_cannot_be_scored() -> None:
    with pytest.raises(CheckpointError, match="doesn't say of what model"):
        evaluate({"w": torch.zeros(1)}, "digits")


def test_a_model_with_nan_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = open_checkpoint("embedded")
    state = checkpoint.state_dict()
    state["visual.proj"][0, 0] = torch.nan
    checkpoint.with_form(open_checkpoint(state).form, checkpoint.architecture).model()
    assert "NaN or Inf in 1 tensor: visual.proj" in caplog.text


def test_embedded_loads_in_unmodified_open_clip(tmp_path: Path) -> None:
    import open_clip

    folder = open_checkpoint("embedded").save(tmp_path / "model")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    ours = ImageModel.open("embedded", "cpu")
    texts = ["a red circle", 'the number: "7".', "internationalization"]
    tokens, own = tokenizer(texts), ours.tokenizer(texts)
    for mine, one in zip(tokens, own, strict=True):  # what follows a text's end isn't looked at
        assert torch.equal(mine[: one.argmax() + 1], one[: one.argmax() + 1])
    assert tokens.max() < theirs.vocab_size
    pixels = preprocess(TASKS["shapes"].load("test")[0])
    assert torch.equal(pixels, ours.preprocess(TASKS["shapes"].load("test")[0]))
    with torch.no_grad():
        assert torch.equal(theirs.eval().encode_text(tokens), ours.module.encode_text(own))
        expected = theirs.encode_image(pixels[None])
        assert torch.equal(expected, ours.module.encode_image(pixels[None]))


class CountedImages:
    """Images that count how often each is decoded."""

    def __init__(self, count: int) -> None:
        self.labels = np.zeros(count, dtype=np.int64)
        self.decoded = [0] * count

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Image.Image:
        self.decoded[index] += 1
        return Image.new("RGB", (40, 30), (index, 0, 0))

    def encoded_size(self, index: int) -> int:
        return 1  # as if it were in a file: decoded by threads


@pytest.mark.parametrize("room_bytes", [1 << 30, 0])
def test_images_are_decoded_once_wherever_they_are_kept(model: ImageModel, room_bytes: int) -> None:
    images = CountedImages(20)
    pixels = Pixels(images, model.preprocess, room_bytes)
    indices = np.array([3, 1, 19, 1])
    expected = torch.stack(
        [model.preprocess(Image.new("RGB", (40, 30), (int(i), 0, 0))) for i in indices]
    )
    for _ in range(3):
        assert torch.equal(pixels.batch(indices), expected)
    assert [images.decoded[i] for i in (1, 3, 19)] == [1, 1, 1]
    assert bool(pixels.kept_bytes) == bool(room_bytes)
