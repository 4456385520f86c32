"""Retrieval: images by text, and texts by image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set

import torch
from tqdm import tqdm

from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.zero_shot import encoded
from weightops.tasks.task import Task, captions_of

DEPTHS = (1, 5, 10)
_ROWS = 1024  # queries at a time


@torch.no_grad()
def retrieval(
    clip: ImageModel, task: Task, split: str, *, batch_size: int = 256
) -> dict[str, float]:
    r"""Recall of retrieval by cosine similarity, as CLIP_benchmark defines it: something that belongs to the query is among the k nearest.

    Args:
        clip: a model with image and text encoders.
        task: its images' captions are the texts, each its own image's alone; where they have none, the first prompt of each class is,
            and belongs to all images of the class.
        split: "test", "validation" or "train".
        batch_size: images or texts at a time.

    Texts that no image is of are among those to be found, and aren't looked up.

    Returns:
        For k of 1, 5 and 10: ``image_retrieval_recall@k``, the share of texts that find an image of theirs; ``text_retrieval_recall@k``, the
        share of images that find a text of theirs; each in [0, 1]; and how many images (``n``) and ``texts`` there are.

    Raises:
        CheckpointError: if the model takes no text.
    """
    images = task.load(split)
    captions = captions_of(images)
    of_text = defaultdict(set)
    if captions is None:
        texts = [prompts[0] for prompts in task.prompts]
        for image, label in enumerate(images.labels.tolist()):
            of_text[label].add(image)
    else:
        texts = [text for several in captions for text in several]
        owners = [image for image, several in enumerate(captions) for _ in several]
        for text, image in enumerate(owners):
            of_text[text].add(image)
    of_image = defaultdict(set)
    for text, owned in of_text.items():
        for image in owned:
            of_image[image].add(text)
    pictures = encoded(clip, task, split, batch_size=batch_size)
    starts = tqdm(
        range(0, len(texts), batch_size), desc=f"texts of {task.name}", delay=1, leave=False
    )
    words = torch.cat(
        [clip.encode_text(clip.tokenizer(texts[start : start + batch_size])) for start in starts]
    )
    found = {"image": _recall(words, pictures, of_text), "text": _recall(pictures, words, of_image)}
    scores = {
        f"{kind}_retrieval_recall@{k}": recall[k] for kind, recall in found.items() for k in DEPTHS
    }
    return {**scores, "n": len(images), "texts": len(texts)}


def _recall(
    queries: torch.Tensor, keys: torch.Tensor, own: Mapping[int, Set[int]]
) -> dict[int, float]:
    """Depth -> share of queries with one of their own among the nearest keys."""
    hits = dict.fromkeys(DEPTHS, 0)
    depth = min(DEPTHS[-1], len(keys))
    for start in range(0, len(queries), _ROWS):
        nearest = (queries[start : start + _ROWS] @ keys.T).topk(depth, dim=1).indices.tolist()
        for i, row in enumerate(nearest, start):
            if not own[i]:
                continue
            first = next((rank for rank, key in enumerate(row) if key in own[i]), DEPTHS[-1])
            for k in DEPTHS:
                hits[k] += first < k
    asked = sum(bool(own[i]) for i in range(len(queries)))
    return {k: count / asked for k, count in hits.items()}
