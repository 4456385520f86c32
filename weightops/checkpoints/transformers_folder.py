"""Folders of transformers models: ``config.json`` beside weights, as ``save_pretrained`` writes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightops.checkpoints.open_clip_folder import OpenClipArchitecture
from weightops.errors import CheckpointError, missing_extra
from weightops.files import read_json, write_json

CONFIG = "config.json"
_BESIDE = (
    "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.model", "chat_template*", "LICENSE*",
)  # fmt: skip
"""What goes wherever the weights go."""
_OPENAI_MEAN, _OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


class TransformersArchitecture:
    """What a folder of transformers says of its model.

    Attributes:
        folder: the folder.
        config: the content of ``config.json``.
        weights_file: the name that transformers looks for.
    """

    weights_file = "model.safetensors"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / CONFIG)
        self.layers: int | None = None  # where it is another number than the folder's

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
            module: nn.Module = kind(transformers.AutoConfig.from_pretrained(self.folder, trust_remote_code=False))
        except (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"the model of {self.folder / CONFIG} can't be built: {reason}") from error
        return module.eval()

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        """PIL image -> tensor of shape ``(3, height, width)``."""
        processor = self._transformers("to prepare images").AutoImageProcessor.from_pretrained(self.folder)
        return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        """Texts -> token ids of shape ``(n, context_length)``."""
        tokenizer = self._transformers("to tokenise").AutoTokenizer.from_pretrained(self.folder)
        return lambda texts: tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]

    def write(self, folder: Path, final: Path) -> None:
        """Put all but the weights into ``folder``, which will be known as ``final``."""
        for path in sorted({path for pattern in _BESIDE for path in self.folder.glob(pattern) if path.is_file()}):
            shutil.copyfile(path, folder / path.name)
        if self.layers is not None:
            write_json(folder / CONFIG, {**self.config, "num_hidden_layers": self.layers})

    def _transformers(self, purpose: str) -> Any:
        try:
            import transformers
        except ImportError:
            raise missing_extra("transformers", "hf", f"{purpose} of {self.folder}") from None
        return transformers

    def open_clip(self) -> OpenClipArchitecture | None:
        """The same CLIP model for open_clip, or None if it isn't a whole CLIP model.

        Raises:
            CheckpointError: if open_clip can't compute what this model computes.
        """
        if self.config.get("model_type") != "clip" or not all(f"{t}_config" in self.config for t in ("text", "vision")):
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
            raise CheckpointError(f"{self.folder / CONFIG} is a CLIP model with settings that open_clip doesn't have")
        model_cfg = {
            "embed_dim": self.config.get("projection_dim", 512),
            "quick_gelu": acts == {"quick_gelu"},
            "vision_cfg": {
                "image_size": vision["image_size"], "patch_size": vision["patch_size"], "width": vision["hidden_size"],
                "layers": vision["num_hidden_layers"], "head_width": vision["hidden_size"] // vision["num_attention_heads"],
                "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            },
            "text_cfg": {
                "context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"], "width": text["hidden_size"],
                "heads": text["num_attention_heads"], "layers": text["num_hidden_layers"],
                "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
            },
        }  # fmt: skip
        processor = (
            read_json(self.folder / "preprocessor_config.json")
            if (self.folder / "preprocessor_config.json").is_file()
            else {}
        )
        preprocess_cfg = {
            "mean": processor.get("image_mean", _OPENAI_MEAN),
            "std": processor.get("image_std", _OPENAI_STD),
            "interpolation": _INTERPOLATIONS.get(processor.get("resample", 3), "bicubic"),
            "resize_mode": "shortest",
        }
        return OpenClipArchitecture.of_config({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})


_DEFAULTS: dict[str, Any] = {
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12, "image_size": 224, "patch_size": 32,
    "vocab_size": 49408, "max_position_embeddings": 77,
}  # fmt: skip
"""What transformers takes for what a configuration of CLIP doesn't say."""
