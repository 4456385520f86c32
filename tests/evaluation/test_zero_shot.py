"""Zero-shot evaluation against plain formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from weightops import TASKS, ImageModel, evaluate
from weightops.errors import NonfiniteError, TaskError
from weightops.evaluation.scoring import IMAGES
from weightops.evaluation.zero_shot import logits, metrics
from weightops.tasks.task import ImageSubset


def test_head_and_scores_against_a_plain_loop() -> None:
    model, task = ImageModel.open("embedded", "cpu"), TASKS["digits"]
    images = task.load("validation")
    pixels = torch.stack([model.preprocess(images[i]) for i in range(len(images))])
    rows = []
    with torch.no_grad():
        for name in task.classes:
            tokens = model.tokenizer([template.format(name) for template in task.templates])
            texts = F.normalize(model.module.encode_text(tokens), dim=-1)
            rows.append(F.normalize(texts.mean(0), dim=0))
        head = torch.stack(rows) * model.module.logit_scale.exp()
        logits = F.normalize(model.module.encode_image(pixels), dim=-1) @ head.T
    guesses, labels = logits.argmax(1).numpy(), np.asarray(images.labels)
    in_top_5 = (torch.topk(logits, 5).indices == torch.from_numpy(labels)[:, None]).any(1)
    recall = [(guesses[labels == c] == c).mean() for c in range(10)]
    for _ in range(2):  # computed, then from the caches
        assert torch.allclose(model.zero_shot_head(task), head, atol=1e-5)
        scores = evaluate(model, "digits", split="validation", details=True)["digits"]
        assert scores["acc1"] == pytest.approx((guesses == labels).mean())
        assert scores["per_class_recall"] == pytest.approx(recall)
        assert scores["mean_per_class_recall"] == pytest.approx(np.mean(recall))
        assert scores["acc5"] == pytest.approx(in_top_5.double().mean().item())
        assert np.array(scores["confusion"]).sum() == len(labels)


def test_scores_keep_nothing_for_gradients() -> None:
    model, seen = ImageModel.open("embedded", "cpu"), []
    model.module.visual.transformer.register_forward_hook(lambda _, __, y: seen.append(y))
    batches = list(logits(model, TASKS["digits"], "validation"))
    assert torch.is_grad_enabled()
    assert not any(tensor.requires_grad for tensor in [*seen, *batches])


def test_metrics() -> None:
    guesses, labels = torch.tensor([[0, 1], [1, 0], [1, 0], [3, 0]]), torch.tensor([0, 0, 1, 3])
    assert metrics(guesses, labels, 4) == {
        "acc1": 0.75,
        "acc5": pytest.approx(math.nan, nan_ok=True),
        "mean_per_class_recall": pytest.approx((0.5 + 1 + 1) / 3),
        "n": 4,
    }


def test_a_task_without_classes() -> None:
    with pytest.raises(TaskError, match="no classes, only captions"):
        evaluate("embedded", replace(TASKS["digits"], classes=()))


def test_accuracy_needs_no_scale_that_overflows() -> None:
    model = ImageModel.open("embedded", "cpu")
    right = evaluate(model, "digits", split="validation")["digits"]
    with torch.no_grad():
        model.module.logit_scale.fill_(100.0)
    assert evaluate(model, "digits", split="validation")["digits"] == right
    with pytest.raises(NonfiniteError, match="so its loss isn't finite"):
        model.zero_shot_head(TASKS["digits"])


@pytest.mark.parametrize("evaluator", ["zero_shot", "linear_probe", "retrieval", "shift"])
def test_what_is_not_finite_is_not_scored(evaluator: str) -> None:
    model = ImageModel.open("embedded", "cpu")
    with torch.no_grad():
        model.module.visual.proj[0] = torch.inf
        model.module.visual.proj[1] = -torch.inf
    with pytest.raises(NonfiniteError, match=r"of digits \w+ have NaN or infinities in \d+ of"):
        evaluate(model, "digits", evaluator=evaluator)


def test_metrics_of_many_classes_take_little_memory() -> None:
    labels = torch.arange(100)
    scores = metrics(labels[:, None].repeat(1, 2), labels, 1_000_000)
    assert scores["acc1"] == scores["mean_per_class_recall"] == 1.0


def test_many_classes_take_no_table_of_pairs() -> None:
    """A dense confusion of so many classes would take 80 GB."""
    labels = torch.arange(100_000) % 90_000
    guesses = torch.stack([labels, labels + 1, labels + 2, labels + 3, labels + 4], dim=1)
    guesses[:25_000, 0] = 99_999
    found = metrics(guesses, labels, 100_000)
    assert found["acc1"] == 0.75
    assert found["acc5"] == 0.75
    half = 10_000 / 90_000 * 0.5  # the classes below 10,000 are there twice, once wrong
    right = (90_000 - 25_000) / 90_000
    assert found["mean_per_class_recall"] == pytest.approx(half + right)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([1, 2, 10]), "1 labels such as 10, which are the index of none of its 10"),
        (np.array([0, -1, -1]), "2 labels such as -1"),
        (np.array([0.0, 1.0, 2.0]), "labels of dtype float64"),
        (np.array([0, 1]), r"shape \(2,\) for 3 images"),
    ],
)
def test_labels_that_are_no_classes(labels: np.ndarray, message: str) -> None:
    digits = TASKS["digits"]
    images = ImageSubset(digits.load("test"), np.arange(3), labels)
    task = replace(digits, load=lambda split: images)
    with pytest.raises(TaskError, match=message):
        evaluate("embedded", task)


def test_classes_of_one_text_are_told(caplog: pytest.LogCaptureFixture) -> None:
    classes = ("Cat", *TASKS["digits"].classes[1:9], "cat")
    evaluate("embedded", replace(TASKS["digits"], name="cats", classes=classes))
    assert "the prompts of cats are equal for the classes 'Cat' and 'cat'" in caplog.text


def test_a_split_without_images_is_refused_before_anything_is_trained() -> None:
    digits = TASKS["digits"]
    none = ImageSubset(digits.load("test"), np.arange(0), np.arange(0))
    task = replace(digits, load=lambda split: none if split == "validation" else digits.load(split))
    model = ImageModel.open("embedded", "cpu")
    with pytest.raises(TaskError, match="digits has no images for validation"):
        IMAGES.prepare(model, [(task, "test"), (task, "validation")])
