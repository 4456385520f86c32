"""Image and text encoders of transformers that run as they are: SigLIP, and relatives of CLIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.config_checks import library_errors
from weightops.checkpoints.libraries.image_processors import preprocess_cfg
from weightops.checkpoints.libraries.transformers import TransformersArchitecture
from weightops.support.lazy import torch

DUAL_ENCODERS = frozenset({"siglip", "metaclip_2", "altclip", "chinese_clip"})
"""Values of ``model_type`` in configurations. SigLIP 2 of a fixed size is called siglip, too."""

_SIGLIP_IMAGES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False}


def is_dual_encoder(architecture: Architecture | None) -> bool:
    """Return whether a model is one of `DUAL_ENCODERS`, with both encoders."""
    return (
        isinstance(architecture, TransformersArchitecture)
        and architecture.config.get("model_type") in DUAL_ENCODERS
        and {"text_config", "vision_config"} <= architecture.config.keys()
    )


def image_preparation(architecture: Architecture) -> Callable[[Any], torch.Tensor]:
    """Return what prepares images as the folder's image processor does.

    Raises:
        CheckpointError: naming settings of the processor that open_clip doesn't have.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    size = architecture.config["vision_config"].get("image_size", 224)
    defaults: dict[str, Any] = {}
    if architecture.config["model_type"] == "siglip":
        defaults = {**_SIGLIP_IMAGES, "size": {"height": size, "width": size}}
    settings = PreprocessCfg(**preprocess_cfg(architecture, size, defaults), size=size)
    transform: Callable[[Any], torch.Tensor] = image_transform_v2(settings, is_train=False)
    return transform


def text_preparation(
    architecture: TransformersArchitecture,
) -> tuple[Callable[[list[str]], torch.Tensor], int | None]:
    """Return what turns texts into token ids, and the id of padding that a mask hides.

    SigLIP was trained on texts in lower case, all of one length and without a mask, whatever the
    tokenizer says.
    """
    tokenizer = architecture.text_tokenizer()
    siglip = architecture.config["model_type"] == "siglip"
    length = _context(architecture)
    if not siglip:
        length = min(length, tokenizer.model_max_length)
    with library_errors(f"{architecture.folder} has a tokenizer without padding"):
        tokenizer([""], padding="max_length", max_length=length, truncation=True)

    def tokens(texts: list[str]) -> torch.Tensor:
        given = [text.lower() for text in texts] if siglip else texts
        ids: torch.Tensor = tokenizer(
            given, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )["input_ids"]
        return ids

    return tokens, None if siglip else tokenizer.pad_token_id


def _context(architecture: TransformersArchitecture) -> int:
    """Return how many tokens the text encoder takes."""
    defaults = {"siglip": 64, "metaclip_2": 77, "altclip": 514, "chinese_clip": 512}
    kind = architecture.config["model_type"]
    text = architecture.config["text_config"]
    positions = int(text.get("max_position_embeddings", defaults[kind]))
    # As in RoBERTa, the first positions are for padding.
    return positions - text.get("pad_token_id", 1) - 1 if kind == "altclip" else positions
