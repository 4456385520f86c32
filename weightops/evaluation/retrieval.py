"""Retrieval: find images by text, and texts by image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set

from weightops.evaluation.image_model import ImageModel, check_finite
from weightops.evaluation.zero_shot import encode_split
from weightops.support.lazy import torch, without_gradients
from weightops.support.progress import tracked
from weightops.tasks.task import Images, Task, captions_of

DEPTHS = (1, 5, 10)
_QUERIES_AT_A_TIME = 1024


@without_gradients
def retrieval(
    model: ImageModel, task: Task, split: str, *, batch_size: int = 256
) -> dict[str, float]:
    """Measure recall of retrieval by cosine similarity, as CLIP_benchmark defines it.

    A query is a hit at k if something that belongs to it is among the k nearest. The captions of
    images are the texts, each of which belongs to its own image. Without captions, the texts are
    the first prompts of the classes, each of which belongs to the images of its class. A text that
    belongs to no image is no query, but can be found.

    Args:
        model: a model with an image and a text encoder.
        task: the task.
        split: "test", "validation" or "train".
        batch_size: images or texts at a time.

    Returns:
        For k of 1, 5 and 10: ``image_retrieval_recall@k``, the share of texts that hit, and
        ``text_retrieval_recall@k``, the share of images that hit, each in [0, 1]; and the numbers
        of images (``n``) and ``texts``.

    Raises:
        CheckpointError: if the model takes no text.
    """
    images = task.load(split)
    texts, images_of_text = _texts(task, images)
    texts_of_image = defaultdict(set)
    for text, owned in images_of_text.items():
        for image in owned:
            texts_of_image[image].add(text)
    image_features = encode_split(model, task, split, batch_size=batch_size)
    starts = tracked(range(0, len(texts), batch_size), f"texts of {task.name}")
    text_features = torch.cat(
        [model.encode_text(model.tokenizer(texts[start : start + batch_size])) for start in starts]
    )
    check_finite(~text_features.isfinite().all(1).cpu(), f"the text features of {task.name}")
    recalls = {
        "image": _recall(text_features, image_features, images_of_text),
        "text": _recall(image_features, text_features, texts_of_image),
    }
    scores = {
        f"{kind}_retrieval_recall@{k}": recall[k]
        for kind, recall in recalls.items()
        for k in DEPTHS
    }
    return {**scores, "n": len(images), "texts": len(texts)}


def _texts(task: Task, images: Images) -> tuple[list[str], defaultdict[int, set[int]]]:
    """Return the texts, and text -> images that belong to the text."""
    images_of_text = defaultdict(set)
    captions = captions_of(images)
    if captions is None:
        for image, label in enumerate(images.labels.tolist()):
            images_of_text[label].add(image)
        return [prompts[0] for prompts in task.prompts], images_of_text
    texts: list[str] = []
    for image, image_captions in enumerate(captions):
        for caption in image_captions:
            images_of_text[len(texts)].add(image)
            texts.append(caption)
    return texts, images_of_text


def _recall(
    queries: torch.Tensor, keys: torch.Tensor, own: Mapping[int, Set[int]]
) -> dict[int, float]:
    """Return k -> share of the queries that have one of their own among the k nearest keys."""
    hits = dict.fromkeys(DEPTHS, 0)
    asked = 0
    depth = min(DEPTHS[-1], len(keys))
    for start in range(0, len(queries), _QUERIES_AT_A_TIME):
        similarities = queries[start : start + _QUERIES_AT_A_TIME] @ keys.T
        nearest = similarities.topk(depth, dim=1).indices.tolist()
        for query, row in enumerate(nearest, start):
            if not own[query]:
                continue
            asked += 1
            rank = next((rank for rank, key in enumerate(row) if key in own[query]), DEPTHS[-1])
            for k in DEPTHS:
                hits[k] += rank < k
    return {k: count / asked for k, count in hits.items()}
