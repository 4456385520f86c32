"""The linear probe and retrieval, against plain formulas; evaluators by their names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from weightops import EVALUATORS, ImageModel, evaluate
from weightops.cli.main import run
from weightops.errors import CheckpointError, OptionError, TaskError, UnknownNameError
from weightops.evaluation.linear_probe import fitted, linear_probe
from weightops.evaluation.retrieval import retrieval
from weightops.evaluation.table import Evaluator
from weightops.evaluation.zero_shot import encoded
from weightops.tasks.folder import folder_task
from weightops.tasks.table import find_task
from weightops.tasks.task import ImageSubset, captions_of


@pytest.fixture(scope="module")
def clip() -> ImageModel:
    return ImageModel.open("embedded", "cpu")


def test_the_regression_is_the_one_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 7, generator=generator), torch.randint(3, (200,), generator=generator)
    weights = fitted(x.double(), y, 3, 0.1).numpy()
    single = fitted(x, y, 3, 0.1).double().numpy()
    a, labels = x.double().numpy(), y.numpy()

    def gradient(w: np.ndarray) -> np.ndarray:
        z = a @ w[:-1] + w[-1]
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(200), labels] -= 1
        return np.vstack([a.T @ p / 200 + 0.1 * w[:-1], p.mean(0, keepdims=True)])

    assert (
        np.abs(gradient(weights)).max() < 2e-6
    )  # convex: where the gradient is zero is the minimum
    assert np.abs(gradient(single)).max() < 2e-4
    sklearn = pytest.importorskip("sklearn.linear_model")
    other = sklearn.LogisticRegression(C=1 / (0.1 * 200), max_iter=1000, tol=1e-8).fit(a, labels)
    assert np.allclose(other.coef_.T, weights[:-1] - weights[:-1].mean(1, keepdims=True), atol=1e-4)


def test_linear_probe(clip: ImageModel) -> None:
    scores = evaluate(clip, "digits", evaluator="linear_probe")["digits"]
    assert scores["lp_acc1"] > evaluate(clip, "digits")["digits"]["acc1"] + 0.2  # 48 % zero-shot
    assert scores["n"] == 500
    assert scores["lp_decay"] in {10.0**-i for i in range(7)}
    assert scores["lp_acc5"] > 0.95
    task = find_task("digits")
    assert linear_probe(clip, task, "test") == scores
    with torch.inference_mode():
        assert linear_probe(clip, task, "test") == scores
    with pytest.raises(OptionError, match="fitted on the training images"):
        linear_probe(clip, task, "train")
    with pytest.raises(TaskError, match="has 0 classes"):
        linear_probe(clip, replace(task, classes=()), "test")
    with pytest.raises(TaskError, match="no classes, only captions"):
        evaluate(clip, replace(task, classes=()))


def captioned(folder: Path, count: int = 24) -> Path:
    """Pictures of shapes with two captions each."""
    task = find_task("shapes")
    images = task.load("validation")
    for i in range(count):
        name = task.classes[images.labels[i]]
        (folder / name).mkdir(parents=True, exist_ok=True)
        images[i].save(folder / name / f"{i:02}.png")
        (folder / name / f"{i:02}.txt").write_text(
            f"a {name}, number {i}.\na drawing of a {name} {i}.\n"
        )
    return folder


def test_retrieval_against_a_plain_loop(clip: ImageModel, tmp_path: Path) -> None:
    task = folder_task(captioned(tmp_path / "shapes"))
    scores = retrieval(clip, task, "train", batch_size=5)
    images = task.load("train")
    captions = captions_of(images)
    assert captions is not None
    texts = [(text, i) for i, several in enumerate(captions) for text in several]
    assert scores["texts"] == len(texts) == 2 * len(images)
    assert scores["n"] == len(images)
    with torch.no_grad():
        words = (
            clip.module.encode_text(clip.tokenizer([text for text, _ in texts])).double().numpy()
        )
        pictures = (
            clip.module.encode_image(
                torch.stack([clip.preprocess(images[i]) for i in range(len(images))])
            )
            .double()
            .numpy()
        )
    near = (words / np.linalg.norm(words, axis=1, keepdims=True)) @ (
        pictures / np.linalg.norm(pictures, axis=1, keepdims=True)
    ).T
    for k in (1, 5, 10):
        by_text = [own in np.argsort(-near[t])[:k] for t, (_, own) in enumerate(texts)]
        assert scores[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(by_text))
        by_image = [
            any(texts[t][1] == i for t in np.argsort(-near[:, i])[:k]) for i in range(len(images))
        ]
        assert scores[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(by_image))
    (tmp_path / "shapes" / task.classes[0] / "00.txt").unlink(missing_ok=True)
    for path in sorted((tmp_path / "shapes").rglob("*.txt"))[:1]:
        path.unlink()
    with pytest.raises(TaskError, match=r"\.txt is missing: \d+ other pictures have captions"):
        retrieval(clip, folder_task(tmp_path / "shapes"), "train")


def test_retrieval_by_prompts_is_accuracy(clip: ImageModel) -> None:
    task = find_task("textures")
    scores = evaluate(clip, task, evaluator="retrieval", split="validation")["textures"]
    head = torch.nn.functional.normalize(
        clip.module.encode_text(clip.tokenizer([p[0] for p in task.prompts])).float(), dim=-1
    )
    guesses = (encoded(clip, task, "validation") @ head.T).argmax(1)
    assert scores["text_retrieval_recall@1"] == pytest.approx(
        (guesses == clip.pixels(task, "validation").labels).double().mean().item()
    )
    assert scores["texts"] == len(task.classes)


def test_texts_that_no_image_is_of_are_not_missed(clip: ImageModel) -> None:
    task = find_task("digits")
    images = task.load("test")
    few = [int(np.flatnonzero(images.labels == label)[0]) for label in (0, 1)]
    some = replace(task, load=lambda split: ImageSubset(images, np.array(few), images.labels[few]))
    assert retrieval(clip, some, "test")["image_retrieval_recall@10"] == 1.0


def test_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def brightness(clip: ImageModel, task: object, split: str) -> dict[str, float]:
        return {"brightness": 0.5, "n": 1}

    own = Evaluator(brightness, "brightness", ("brightness",))
    monkeypatch.setattr(EVALUATORS, "_table", {**EVALUATORS._table, "brightness": own})
    assert evaluate("embedded", "digits", evaluator="brightness") == {
        "digits": {"brightness": 0.5, "n": 1}
    }
    with pytest.raises(UnknownNameError, match="did you mean linear_probe"):
        evaluate("embedded", "digits", evaluator="linear_prob")
    with pytest.raises(OptionError, match="zeroshot_retrieval has no details"):
        evaluate("embedded", "digits", evaluator="retrieval", details=True)
    command = ["evaluate", "--tasks", "textures", "--split", "validation", "--evaluator"]
    assert run([*command, "retrieval", "-o", str(tmp_path / "out")]) == 0
    assert "image_retrieval_recall@5" in capsys.readouterr().out
    [path] = (tmp_path / "out").iterdir()
    result = json.loads(path.read_text())
    assert result["task"] == "zeroshot_retrieval"
    assert run([*command, "retreival"]) == 2
    assert run([*command, "zero_shot", "--reference", "embedded"]) == 2
    assert run([*command, "shift", "--text", __file__]) == 2


def test_a_classifier_has_features_and_no_text(tmp_path: Path) -> None:
    import timm

    for split, count in (("train", 20), ("val", 4), ("test", 4)):
        for i in range(count):
            (tmp_path / "set" / split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (160, 160), (250 * (i % 2), 40, i)).save(
                tmp_path / "set" / split / "ab"[i % 2] / f"{i}.png"
            )
    (tmp_path / "vit").mkdir()
    timm.models.save_for_hf(
        timm.create_model("test_vit", num_classes=3), tmp_path / "vit", safe_serialization=True
    )
    clip = ImageModel.open(tmp_path / "vit", "cpu")
    task = folder_task(tmp_path / "set")
    scores = linear_probe(clip, task, "test")
    assert scores["lp_acc1"] == 1.0
    assert encoded(clip, task, "test", features=True).shape == (4, 64)
    with pytest.raises(CheckpointError, match="takes no text"):
        retrieval(clip, task, "test")
