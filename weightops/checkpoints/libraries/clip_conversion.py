"""Conversion of the configurations and tokenizers of CLIP between open_clip and transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.image_processors import (
    INTERPOLATIONS,
    OPENAI_MEAN,
    OPENAI_STD,
    preprocess_cfg,
)
from weightops.checkpoints.libraries.open_clip import MERGES, OpenClipArchitecture
from weightops.checkpoints.libraries.transformers import TransformersArchitecture
from weightops.errors import CheckpointError
from weightops.support.text import first_few

_START, _END = "<|startoftext|>", "<|endoftext|>"

_DEFAULTS: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "num_hidden_layers": 12,
    "image_size": 224,
    "patch_size": 32,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_VISION_DEFAULTS = {
    **_DEFAULTS,
    "num_attention_heads": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
}
_TEXT_DEFAULTS = {
    **_DEFAULTS,
    "num_attention_heads": 8,
    "hidden_size": 512,
    "intermediate_size": 2048,
}
"""The values that transformers uses where a configuration of CLIP has none."""

_KNOWN_SETTINGS = {
    "model_cfg": {"embed_dim", "quick_gelu", "init_logit_scale", "vision_cfg", "text_cfg"},
    "vision_cfg": {
        "image_size",
        "patch_size",
        "width",
        "layers",
        "head_width",
        "mlp_ratio",
        "patch_dropout",
    },
    "text_cfg": {
        "context_length",
        "vocab_size",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
        "tokenizer_kwargs",
        "hf_tokenizer_name",
    },
}
"""Settings of open_clip that transformers' CLIP has too, or that change nothing after training."""


def convert(architecture: Architecture, library: str) -> Architecture | None:
    """Return the same model for another library; None if there is no conversion of such a model.

    Raises:
        CheckpointError: if the other library's CLIP can't compute what this model computes.
    """
    conversion = _CONVERSIONS.get((architecture.library, library))
    return conversion(architecture) if conversion else None


# ------------------------------------------------------------- transformers -> open_clip


def _to_open_clip(architecture: Architecture) -> OpenClipArchitecture | None:
    """Return a CLIP model of transformers as open_clip's; None if it isn't a whole CLIP model."""
    config = architecture.config
    whole = "text_config" in config and "vision_config" in config
    if config.get("model_type") != "clip" or not whole:
        return None
    vision = {**_VISION_DEFAULTS, **config["vision_config"]}
    text = {**_TEXT_DEFAULTS, **config["text_config"]}
    _check_open_clip_can(architecture, vision, text)
    model_cfg: dict[str, Any] = {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": vision["hidden_act"] == "quick_gelu",
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "layers": vision["num_hidden_layers"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }
    merges, path = None, architecture.folder / "merges.txt"
    if text["vocab_size"] != _DEFAULTS["vocab_size"] and path.is_file():
        merges = path.read_text(encoding="utf-8").rstrip("\n")
        model_cfg["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": MERGES}
    described = {
        "model_cfg": model_cfg,
        "preprocess_cfg": preprocess_cfg(architecture, vision["image_size"]),
    }
    return OpenClipArchitecture.of_config(described, merges)


def _check_open_clip_can(
    architecture: Architecture, vision: Mapping[str, Any], text: Mapping[str, Any]
) -> None:
    activations = {vision["hidden_act"], text["hidden_act"]}
    if (
        activations not in ({"gelu"}, {"quick_gelu"})
        or {vision["layer_norm_eps"], text["layer_norm_eps"]} != {1e-5}
        or text.get("eos_token_id", 49407) not in (2, text["vocab_size"] - 1)
    ):
        raise CheckpointError(
            f"{architecture.config_path} is a CLIP model with settings that open_clip doesn't have"
        )


# ------------------------------------------------------------- open_clip -> transformers


def _to_transformers(architecture: Architecture) -> TransformersArchitecture:
    """Return a CLIP model of open_clip as transformers', with its tokenizer."""
    assert isinstance(architecture, OpenClipArchitecture)
    model = architecture.config["model_cfg"]
    preprocess = architecture.config.get("preprocess_cfg", {})
    _check_transformers_can(architecture, model, preprocess)
    image_size = model["vision_cfg"].get("image_size", 224)
    marks = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    tokenizer_config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": model["text_cfg"].get("context_length", 77),
        **marks,
    }
    tokens, merges = architecture.vocabulary()
    ids = {token: i for i, token in enumerate([*tokens[:-2], _START, _END])}
    return TransformersArchitecture.of_files(
        {
            TransformersArchitecture.config_file: _clip_config(model),
            "preprocessor_config.json": _processor_config(preprocess, image_size),
            "tokenizer_config.json": tokenizer_config,
            "special_tokens_map.json": marks,
            "vocab.json": ids,
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        }
    )


def _check_transformers_can(
    architecture: Architecture, model: Mapping[str, Any], preprocess: Mapping[str, Any]
) -> None:
    places = {"model_cfg": model, "vision_cfg": model["vision_cfg"], "text_cfg": model["text_cfg"]}
    unknown = [
        f"{place}.{name}"
        for place, settings in places.items()
        for name in settings.keys() - _KNOWN_SETTINGS[place]
    ]
    if preprocess.get("resize_mode", "shortest") not in ("shortest", "squash"):
        unknown.append("preprocess_cfg.resize_mode")
    if not isinstance(model["vision_cfg"].get("layers", 12), int):
        unknown.append("vision_cfg.layers")
    if unknown:
        raise CheckpointError(
            f"{architecture.config_path} has settings that transformers' CLIP lacks: "
            f"{first_few(sorted(unknown))}"
        )


def _clip_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``config.json`` for a ``model_cfg`` of open_clip."""
    vision, text = model["vision_cfg"], model["text_cfg"]
    common = {
        "hidden_act": "quick_gelu" if model.get("quick_gelu", False) else "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": model["embed_dim"],
    }
    vision_width, text_width = vision.get("width", 768), text.get("width", 512)
    last_token = text.get("vocab_size", 49408) - 1
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "vision_config": {
            **common,
            "model_type": "clip_vision_model",
            "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 16),
            "hidden_size": vision_width,
            "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": vision_width // vision.get("head_width", 64),
            "intermediate_size": round(vision_width * vision.get("mlp_ratio", 4.0)),
        },
        "text_config": {
            **common,
            "model_type": "clip_text_model",
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": last_token + 1,
            "hidden_size": text_width,
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "intermediate_size": round(text_width * text.get("mlp_ratio", 4.0)),
            "bos_token_id": last_token - 1,
            "eos_token_id": last_token,
            "pad_token_id": last_token,
        },
    }


def _processor_config(preprocess: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Return the content of ``preprocessor_config.json`` for a ``preprocess_cfg`` of open_clip."""
    shortest = preprocess.get("resize_mode", "shortest") == "shortest"
    square = {"height": image_size, "width": image_size}
    numbers = {name: number for number, name in INTERPOLATIONS.items()}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "do_center_crop": shortest,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "crop_size": square,
        "size": {"shortest_edge": image_size} if shortest else square,
        "image_mean": preprocess.get("mean", OPENAI_MEAN),
        "image_std": preprocess.get("std", OPENAI_STD),
        "resample": numbers.get(preprocess.get("interpolation", "bicubic"), 3),
    }


_CONVERSIONS: dict[tuple[str, str], Callable[[Architecture], Architecture | None]] = {
    ("transformers", "open_clip"): _to_open_clip,
    ("open_clip", "transformers"): _to_transformers,
}
