"""Folders of transformers models: ``config.json`` beside weights, as ``save_pretrained`` writes them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from weightops.algebra.dtypes import name_of
from weightops.checkpoints.libraries.base import CONFIG, ConfiguredFolder
from weightops.checkpoints.libraries.open_clip import CONFIG as OPEN_CLIP_CONFIG
from weightops.checkpoints.libraries.open_clip import MERGES, OpenClipArchitecture
from weightops.errors import CheckpointError, missing_extra
from weightops.support.cache import cached_folder
from weightops.support.json_files import read_json
from weightops.support.text import first_few

log = logging.getLogger("weightops")

_BESIDE = (
    "*config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "*.model",
    "chat_template*",
    "LICENSE*",
)
"""What goes wherever the weights go."""
_OPENAI_MEAN, _OPENAI_STD = (
    [0.48145466, 0.4578275, 0.40821073],
    [0.26862954, 0.26130258, 0.27577711],
)
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


class TransformersArchitecture(ConfiguredFolder):
    """What a folder of transformers says of its model; see `ConfiguredFolder`."""

    beside = _BESIDE

    @classmethod
    def of_open_clip(cls, architecture: OpenClipArchitecture) -> TransformersArchitecture:
        """A CLIP model of open_clip as transformers has it, with its tokenizer; in a folder of the cache.

        Raises:
            CheckpointError: if transformers' CLIP can't compute what this model computes.
        """
        return cls(cached_folder("transformers", _for_transformers(architecture)))

    def build(self) -> nn.Module:
        """The module, with weights yet to be filled in, in evaluation mode. Code that a folder brings is never run."""
        transformers = self._transformers("to build the model")
        name = next(iter(self.config.get("architectures") or ()), None)
        kind = getattr(transformers, str(name), None)
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            raise CheckpointError(
                f"{self.folder / CONFIG} names the architecture {name}, which transformers doesn't have"
            )
        try:
            module: nn.Module = kind(
                transformers.AutoConfig.from_pretrained(
                    self.folder, trust_remote_code=False, **self._changes
                )
            )
        except (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"the model of {self.folder / CONFIG} can't be built: {reason}"
            ) from error
        return module.eval()

    def in_dtype(self, dtype: torch.dtype) -> TransformersArchitecture:
        """The same for weights in another dtype, which the configuration names if it named one."""
        named: dict[str, Any] = {
            key: name_of(dtype) for key in ("dtype", "torch_dtype") if key in self.config
        }
        return TransformersArchitecture(self.folder, **self._changes | named)

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        """PIL image -> tensor of shape ``(3, height, width)``."""
        processor = self._load("to prepare images", "AutoImageProcessor")
        return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]

    @property
    def context(self) -> int:
        """How many tokens the model takes."""
        names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
        return next((int(self.config[name]) for name in names if self.config.get(name)), 1024)

    def tokens(self, text: str) -> torch.Tensor:
        """The ids of a whole text, shape ``(n,)``.

        Raises:
            CheckpointError: if the folder has no tokenizer that can be loaded.
        """
        tokenizer = self._load("for the tokenizer", "AutoTokenizer")
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        """Texts -> token ids of shape ``(n, context_length)``."""
        tokenizer = self._load("for the tokenizer", "AutoTokenizer")
        return lambda texts: tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        )["input_ids"]

    def _transformers(self, purpose: str) -> Any:
        try:
            import transformers
        except ImportError:
            raise missing_extra("transformers", "hf", f"{purpose} of {self.folder}") from None
        return transformers

    def _load(self, purpose: str, kind: str) -> Any:
        """One of transformers' parts of a model, from the folder, whose code is never run."""
        library = self._transformers(purpose)
        try:
            return getattr(library, kind).from_pretrained(self.folder, trust_remote_code=False)
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ImportError,
            RuntimeError,
        ) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{self.folder} has nothing {purpose} that transformers loads: {reason}"
            ) from error

    def _image_settings(self) -> dict[str, Any]:
        """What the folder says of the preparation of images; transformers has kept it in one file and in another."""
        for name, key in (
            ("processor_config.json", "image_processor"),
            ("preprocessor_config.json", None),
        ):
            if (self.folder / name).is_file():
                content = read_json(self.folder / name)
                found = content if key is None else content.get(key)
                if isinstance(found, dict):
                    return found
        log.warning(
            "%s doesn't say how images are prepared: they are as for OpenAI's CLIP", self.folder
        )
        return {}

    def open_clip(self) -> OpenClipArchitecture | None:
        """The same CLIP model for open_clip, or None if it isn't a whole CLIP model.

        Raises:
            CheckpointError: if open_clip can't compute what this model computes.
        """
        if self.config.get("model_type") != "clip" or not all(
            f"{t}_config" in self.config for t in ("text", "vision")
        ):
            return None
        vision = {
            **_DEFAULTS,
            "num_attention_heads": 12,
            "hidden_size": 768,
            "intermediate_size": 3072,
            **self.config["vision_config"],
        }
        text = {
            **_DEFAULTS,
            "num_attention_heads": 8,
            "hidden_size": 512,
            "intermediate_size": 2048,
            **self.config["text_config"],
        }
        acts = {vision["hidden_act"], text["hidden_act"]}
        last = text.get("eos_token_id", 49407) in (2, text["vocab_size"] - 1)
        if (
            len(acts) > 1
            or not acts <= {"gelu", "quick_gelu"}
            or {vision["layer_norm_eps"], text["layer_norm_eps"]} != {1e-5}
            or not last
        ):
            raise CheckpointError(
                f"{self.folder / CONFIG} is a CLIP model with settings that open_clip doesn't have"
            )
        model_cfg: dict[str, Any] = {
            "embed_dim": self.config.get("projection_dim", 512),
            "quick_gelu": acts == {"quick_gelu"},
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
        processor = self._image_settings()
        size = processor.get("size") or {"shortest_edge": 0}
        shortest = isinstance(size, int) or "shortest_edge" in size
        preprocess_cfg = {
            "mean": processor.get("image_mean") or _OPENAI_MEAN,
            "std": processor.get("image_std") or _OPENAI_STD,
            "interpolation": _INTERPOLATIONS.get(processor.get("resample", 3), "bicubic"),
            "resize_mode": "shortest" if shortest else "squash",
        }
        merges = None
        if text["vocab_size"] != _DEFAULTS["vocab_size"] and (self.folder / "merges.txt").is_file():
            merges = (self.folder / "merges.txt").read_text(encoding="utf-8").rstrip("\n")
            model_cfg["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": MERGES}
        return OpenClipArchitecture.of_config(
            {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, merges
        )


_DEFAULTS: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "num_hidden_layers": 12,
    "image_size": 224,
    "patch_size": 32,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
"""What transformers takes for what a configuration of CLIP doesn't say."""

_KNOWN = {
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
    },
}
"""Settings of open_clip that transformers' CLIP has too, or that change nothing after training."""


def _for_transformers(architecture: OpenClipArchitecture) -> dict[str, Any]:
    """Name -> content of the files that say the same of a model to transformers."""
    model = architecture.config["model_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    prepare = architecture.config.get("preprocess_cfg", {})
    other = [
        f"{place}.{name}"
        for place, settings in (("model_cfg", model), ("vision_cfg", vision), ("text_cfg", text))
        for name in settings.keys() - _KNOWN[place]
    ]
    mode = prepare.get("resize_mode", "shortest")
    other += [] if mode in ("shortest", "squash") else ["preprocess_cfg.resize_mode"]
    other += [] if isinstance(vision.get("layers", 12), int) else ["vision_cfg.layers"]
    if other:
        raise CheckpointError(
            f"{architecture.folder / OPEN_CLIP_CONFIG} has settings that transformers' CLIP lacks: {first_few(sorted(other))}"
        )
    act = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    common = {"hidden_act": act, "layer_norm_eps": 1e-5, "projection_dim": model["embed_dim"]}
    width, size, last = (
        vision.get("width", 768),
        vision.get("image_size", 224),
        text.get("vocab_size", 49408) - 1,
    )
    pixels = {"height": size, "width": size}
    context = text.get("context_length", 77)
    marks = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    ids, merges = architecture.vocabulary()
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "vision_config": {
            **common,
            "model_type": "clip_vision_model",
            "image_size": size,
            "patch_size": vision.get("patch_size", 16),
            "hidden_size": width,
            "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": width // vision.get("head_width", 64),
            "intermediate_size": round(width * vision.get("mlp_ratio", 4.0)),
        },
        "text_config": {
            **common,
            "model_type": "clip_text_model",
            "max_position_embeddings": context,
            "vocab_size": last + 1,
            "hidden_size": text.get("width", 512),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "intermediate_size": round(text.get("width", 512) * text.get("mlp_ratio", 4.0)),
            "bos_token_id": last - 1,
            "eos_token_id": last,
            "pad_token_id": last,
        },
    }
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "do_center_crop": mode == "shortest",
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "crop_size": pixels,
        "size": {"shortest_edge": size} if mode == "shortest" else pixels,
        "image_mean": prepare.get("mean", _OPENAI_MEAN),
        "image_std": prepare.get("std", _OPENAI_STD),
        "resample": {name: number for number, name in _INTERPOLATIONS.items()}.get(
            prepare.get("interpolation", "bicubic"), 3
        ),
    }
    return {
        CONFIG: config,
        "preprocessor_config.json": processor,
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": context,
            **marks,
        },
        "special_tokens_map.json": marks,
        "vocab.json": {token: i for i, token in enumerate([*ids[:-2], _START, _END])},
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    }


_START, _END = "<|startoftext|>", "<|endoftext|>"
