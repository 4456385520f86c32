"""Settings of transformers' image processors, as open_clip describes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from weightops.checkpoints.libraries.base import Architecture
from weightops.errors import CheckpointError
from weightops.support.json_files import read_json

log = logging.getLogger("weightops")

OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


def preprocess_cfg(
    architecture: Architecture, image_size: int, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the preparation of images as open_clip describes it.

    open_clip divides pixels by 255. Another factor f, and no normalisation, are in its mean and
    standard deviation: ``(f x - m) / s = (x / 255 - m / 255 f) / (s / 255 f)``.

    Args:
        architecture: the folder of transformers.
        image_size: the size of the model's images.
        defaults: settings of the image processor where the folder has none; CLIP's by default.

    Raises:
        CheckpointError: naming the settings that open_clip doesn't have.
    """
    settings = _image_processor(architecture)
    _check_defaults(settings, architecture)
    processor = {**(defaults or {}), **settings}
    mean = _of_channels(processor.get("image_mean"), OPENAI_MEAN)
    std = _of_channels(processor.get("image_std"), OPENAI_STD)
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    factor = 255 * (processor.get("rescale_factor") or 1 / 255)
    factor = factor if processor.get("do_rescale", True) else 255.0
    numbers = len(mean) == len(std) == 3 and 0 not in std
    if numbers and abs(factor - 1) > 1e-6:
        mean, std = [m / factor for m in mean], [s / factor for s in std]
    resample = processor.get("resample")
    mode = _resize_mode(processor, image_size)
    refused = {
        "resample": resample not in (None, *INTERPOLATIONS),
        "size, crop_size, do_resize or do_center_crop": mode is None,
        "do_pad": bool(processor.get("do_pad")),
        "image_mean or image_std": not numbers,
    }
    if any(refused.values()):
        names = ", ".join(name for name, is_refused in refused.items() if is_refused)
        raise CheckpointError(
            f"{architecture.folder} prepares images in a way that open_clip doesn't have: its "
            f"image processor's {names}",
            hint=f"known are a resize to {image_size} with a crop, or to "
            f"{image_size} x {image_size}, both bilinear (2) or bicubic (3)",
        )
    interpolation = INTERPOLATIONS[3 if resample is None else resample]
    return {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": mode}


def _of_channels(value: Any, default: list[float]) -> Any:
    """Return a setting of each colour, which may be one number for all."""
    if isinstance(value, (int, float)):
        return [value] * 3
    if isinstance(value, list) and len(value) == 1:
        return value * 3
    return value or default


def _check_defaults(processor: Mapping[str, Any], architecture: Architecture) -> None:
    """Refuse a processor of another kind of model that leaves settings to its own defaults.

    Raises:
        CheckpointError: naming the kind and the settings.
    """
    name = str(processor.get("image_processor_type", ""))
    own = "Siglip" if architecture.config.get("model_type") == "siglip" else "CLIP"
    needed = ("image_mean", "image_std", "size", "resample")
    missing = [key for key in needed if processor.get(key) is None]
    if name and own not in name and missing:
        raise CheckpointError(
            f"{architecture.folder} has a {name}, whose own {' and '.join(missing)} aren't known",
            hint=f"write its {' and '.join(missing)} into the folder's settings",
        )


def _resize_mode(processor: Mapping[str, Any], image_size: int) -> str | None:
    """Return open_clip's name of how images get their size; None if it has none."""
    square = {"height": image_size, "width": image_size}
    size = processor.get("size") or {"shortest_edge": image_size}
    crop = processor.get("crop_size") or square
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    crops = processor.get("do_center_crop") is not False
    if not processor.get("do_resize", True) or (crops and crop != square):
        return None
    if size == square:
        return "squash"
    return "shortest" if crops and size == {"shortest_edge": image_size} else None


def _image_processor(architecture: Architecture) -> dict[str, Any]:
    """Read the image settings of a folder, which transformers has kept in different files."""
    folder = architecture.folder
    for name, key in (
        ("processor_config.json", "image_processor"),
        ("preprocessor_config.json", None),
    ):
        if (folder / name).is_file():
            content = read_json(folder / name)
            settings = content if key is None else content.get(key)
            if isinstance(settings, dict):
                return settings
    log.warning("%s doesn't say how images are prepared: they are as its kind has them", folder)
    return {}
