"""open_clip directories: ``open_clip_config.json`` beside weights, as open_clip saves them."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from weightops.checkpoints.libraries.base import Architecture, CardFacts
from weightops.errors import CheckpointError, missing_extra
from weightops.support.cache import cached_folder
from weightops.support.json_files import write_json
from weightops.support.text import first_few

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
MERGES = "merges.txt.gz"
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "*.model",
)
"""The files of a tokenizer."""
_TOKENIZER_SETTINGS = {
    "bpe_path",
    "clean",
    "strip_sep_token",
    "language",
    "additional_special_tokens",
    "reduction_mask",
}
"""Tokenizer settings that are allowed. With others, transformers may run code of the folder."""


class OpenClipArchitecture(Architecture):
    """The CLIP model that an open_clip directory describes."""

    library = "open_clip"
    config_file = CONFIG
    weights_file = WEIGHTS
    reads_shards = False
    card_facts = CardFacts(
        "open_clip",
        "zero-shot-image-classification",
        """```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
```

If the folder is moved and its configuration names a `bpe_path`, set that path to where \
`merges.txt.gz` now is; weightops finds it by itself.""",
    )

    @classmethod
    def recognise(cls, folder: Path) -> Self | None:
        return cls(folder) if (folder / CONFIG).is_file() else None

    @classmethod
    def read_config(cls, path: Path) -> dict[str, Any]:
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            sound = all(
                isinstance(config["model_cfg"][part], dict) for part in ("vision_cfg", "text_cfg")
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise CheckpointError(
                f"{path} is not an open_clip configuration with model_cfg, vision_cfg and text_cfg"
            )
        return config

    @classmethod
    def of_config(
        cls, config: Mapping[str, Any], merges: str | None = None
    ) -> OpenClipArchitecture:
        """Write a configuration to a folder of the cache, and return its architecture.

        Args:
            config: the content of ``open_clip_config.json``.
            merges: the merges of its tokenizer, one a line; None for those of open_clip.
        """
        files: dict[str, Any] = {CONFIG: config}
        if merges is not None:
            files[MERGES] = gzip.compress(merges.encode(), mtime=0)
        return cls(cached_folder("open_clip", files))

    def build(self) -> nn.Module:
        import open_clip

        try:
            with _quiet():
                module: nn.Module = open_clip.create_model(
                    f"local-dir:{self.folder}", load_weights=False, pretrained_text=False
                )
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"open_clip can't build the model of {self.config_path}: {error}"
            ) from error
        return module.eval()

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        size = self.config["model_cfg"]["vision_cfg"].get("image_size", 224)
        try:
            settings = PreprocessCfg(**{**self.config.get("preprocess_cfg", {}), "size": size})
            transform: Callable[[Any], torch.Tensor] = image_transform_v2(settings, is_train=False)
        except (TypeError, ValueError, AssertionError) as error:
            raise CheckpointError(
                f"open_clip can't use the preprocess_cfg of {self.config_path}: {error}"
            ) from error
        return transform

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        import open_clip

        settings = self.config["model_cfg"]["text_cfg"]
        forbidden = set(settings.get("tokenizer_kwargs") or {}) - _TOKENIZER_SETTINGS
        if forbidden:
            raise CheckpointError(
                f"{self.config_path} sets {first_few(sorted(forbidden))} of the tokenizer, "
                "which isn't allowed"
            )
        given: dict[str, Any] = self._local_merges(self.folder)
        if settings.get("hf_tokenizer_name"):
            given["trust_remote_code"] = False
        try:
            with _quiet():
                tokenizer: Callable[[list[str]], torch.Tensor] = open_clip.get_tokenizer(
                    f"local-dir:{self.folder}", **given
                )
        except ImportError:
            raise missing_extra(
                "transformers", "hf", f"for the tokenizer of {self.folder}"
            ) from None
        except (OSError, TypeError, ValueError, LookupError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"open_clip can't make the tokenizer of {self.folder}: {reason}"
            ) from error
        return tokenizer

    def vocabulary(self) -> tuple[list[str], list[str]]:
        """Return the tokens in the order of their ids, and the merges that build them.

        Raises:
            CheckpointError: if the tokenizer isn't open_clip's own.
        """
        tokenizer: Any = self.tokenizer()
        if not hasattr(tokenizer, "bpe_ranks"):
            raise CheckpointError(f"the tokenizer of {self.folder} isn't open_clip's own")
        return list(tokenizer.encoder), [" ".join(pair) for pair in tokenizer.bpe_ranks]

    def _local_merges(self, folder: Path) -> dict[str, str]:
        """Return the ``bpe_path`` setting for a folder that brings its own merges, else nothing.

        open_clip would resolve a relative path from the working directory.
        """
        kwargs = self.config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}
        name = Path(kwargs.get("bpe_path", "")).name
        return (
            {"bpe_path": str((folder / name).resolve())}
            if name and (self.folder / name).is_file()
            else {}
        )

    def write(self, folder: Path, final: Path) -> None:
        super().write(folder, final)
        config = json.loads(json.dumps(self.config))
        merges = self._local_merges(final.resolve())
        if merges:
            config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] |= merges
        write_json(folder / CONFIG, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip, which warns of random weights although they are filled in afterwards."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
