"""Retrieval, against a plain loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from weightops import ImageModel, evaluate
from weightops.errors import TaskError
from weightops.evaluation.retrieval import retrieval
from weightops.evaluation.zero_shot import encode_split
from weightops.tasks.folder import folder_task
from weightops.tasks.table import find_task
from weightops.tasks.task import ImageSubset, captions_of


@pytest.fixture(scope="module")
def model() -> ImageModel:
    return ImageModel.open("embedded", "cpu")


def captioned_folder(folder: Path, count: int = 24) -> Path:
    """Write images of shapes with two captions each."""
    task = find_task("shapes")
    images = task.load("validation")
    for i in range(count):
        name = task.classes[images.labels[i]]
        (folder / name).mkdir(parents=True, exist_ok=True)
        images[i].save(folder / name / f"{i:02}.png")
        captions = f"a {name}, number {i}.\na drawing of a {name} {i}.\n"
        (folder / name / f"{i:02}.txt").write_text(captions)
    return folder


def unit(features: torch.Tensor) -> np.ndarray:
    array = features.double().numpy()
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_retrieval_against_a_plain_loop(model: ImageModel, tmp_path: Path) -> None:
    task = folder_task(captioned_folder(tmp_path / "shapes"))
    scores = retrieval(model, task, "train", batch_size=5)
    images = task.load("train")
    captions = captions_of(images)
    assert captions is not None
    texts = [(text, i) for i, own in enumerate(captions) for text in own]
    assert scores["texts"] == len(texts) == 2 * len(images)
    assert scores["n"] == len(images)
    pixels = torch.stack([model.preprocess(images[i]) for i in range(len(images))])
    with torch.no_grad():
        text_features = model.module.encode_text(model.tokenizer([text for text, _ in texts]))
        image_features = model.module.encode_image(pixels)
    near = unit(text_features) @ unit(image_features).T
    for k in (1, 5, 10):
        by_text = [own in np.argsort(-near[t])[:k] for t, (_, own) in enumerate(texts)]
        assert scores[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(by_text))
        by_image = [
            any(texts[t][1] == i for t in np.argsort(-near[:, i])[:k]) for i in range(len(images))
        ]
        assert scores[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(by_image))


def test_some_captions_are_missing(model: ImageModel, tmp_path: Path) -> None:
    captioned_folder(tmp_path / "shapes")
    for path in sorted((tmp_path / "shapes").rglob("*.txt"))[:5]:
        path.unlink()
    with pytest.raises(TaskError, match=r"\.txt is missing: \d+ other pictures have captions"):
        retrieval(model, folder_task(tmp_path / "shapes"), "train")


def test_retrieval_by_prompts_is_accuracy(model: ImageModel) -> None:
    task = find_task("textures")
    scores = evaluate(model, task, evaluator="retrieval", split="validation")["textures"]
    tokens = model.tokenizer([prompts[0] for prompts in task.prompts])
    head = torch.nn.functional.normalize(model.module.encode_text(tokens).float(), dim=-1)
    guesses = (encode_split(model, task, "validation") @ head.T).argmax(1)
    hits = guesses == model.pixels(task, "validation").labels
    assert scores["text_retrieval_recall@1"] == pytest.approx(hits.double().mean().item())
    assert scores["texts"] == len(task.classes)


def test_a_text_without_images_is_no_query(model: ImageModel) -> None:
    task = find_task("digits")
    images = task.load("test")
    indices = np.array([np.flatnonzero(images.labels == label)[0] for label in (0, 1)])
    subset = ImageSubset(images, indices, images.labels[indices])
    two_images = replace(task, load=lambda split: subset)
    assert retrieval(model, two_images, "test")["image_retrieval_recall@10"] == 1.0


def test_a_folder_of_captions_and_no_classes(model: ImageModel, tmp_path: Path) -> None:
    by_class = captioned_folder(tmp_path / "shapes")
    for split in ("train", "test"):
        (tmp_path / "flat" / split).mkdir(parents=True)
    for i, path in enumerate(sorted(by_class.rglob("*.*"))):
        split = "test" if i % 6 < 2 else "train"  # a picture and its text follow each other
        path.rename(tmp_path / "flat" / split / f"{path.parent.name} {path.name}")
    task = folder_task(tmp_path / "flat")
    assert task.classes == ()
    scores = retrieval(model, task, "test")
    assert (scores["n"], scores["texts"]) == (8, 16)
    files = sorted((tmp_path / "flat" / "test").glob("*.png"))
    texts = [line for path in files for line in path.with_suffix(".txt").read_text().splitlines()]
    assert captions_of(task.load("test")) == [tuple(texts[i : i + 2]) for i in range(0, 16, 2)]
    with pytest.raises(TaskError, match="no classes, only captions"):
        evaluate(model, str(tmp_path / "flat"))
    (tmp_path / "flat" / "test" / files[0].with_suffix(".txt").name).unlink()
    with pytest.raises(TaskError, match="has only test, train, with pictures of no class"):
        folder_task(tmp_path / "flat")
