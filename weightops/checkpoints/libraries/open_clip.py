"""open_clip directories: ``open_clip_config.json`` beside weights, as ``local-dir:`` and the Hub have them."""

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

from weightops.errors import CheckpointError, missing_extra
from weightops.support.cache import cached_folder
from weightops.support.json_files import write_json
from weightops.support.sibling_files import copy_siblings
from weightops.support.text import first_few

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
MERGES = "merges.txt.gz"
_TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "*.model",
)
"""Files of a tokenizer, which go wherever the weights go."""
_TOKENIZER_SETTINGS = {
    "bpe_path",
    "clean",
    "strip_sep_token",
    "language",
    "additional_special_tokens",
    "reduction_mask",
}
"""What a configuration may set of a tokenizer. Others reach transformers, which some of them make run code of the folder."""


class OpenClipArchitecture:
    """What an open_clip directory says of its model: how to build it, its preprocessing and its tokenizer.

    Attributes:
        folder: the directory.
        config: the content of ``open_clip_config.json``.
        weights_file: the name that open_clip looks for.
    """

    weights_file = WEIGHTS

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / CONFIG
        try:
            self.config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            sound = all(
                isinstance(self.config["model_cfg"][part], dict)
                for part in ("vision_cfg", "text_cfg")
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise CheckpointError(
                f"{path} is not an open_clip configuration with model_cfg, vision_cfg and text_cfg"
            )

    @classmethod
    def of_config(
        cls, config: Mapping[str, Any], merges: str | None = None
    ) -> OpenClipArchitecture:
        """The architecture of a configuration that is in no folder, and of a tokenizer's merges: they are put into one in the cache."""
        files: dict[str, Any] = {CONFIG: config}
        if merges is not None:
            files[MERGES] = gzip.compress(merges.encode(), mtime=0)
        return cls(cached_folder("open_clip", files))

    def build(self) -> nn.Module:
        """The module, with weights yet to be filled in, in evaluation mode."""
        import open_clip

        try:
            with _quiet():
                module: nn.Module = open_clip.create_model(
                    f"local-dir:{self.folder}", load_weights=False, pretrained_text=False
                )
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"open_clip can't build the model of {self.folder / CONFIG}: {error}"
            ) from error
        return module.eval()

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        """PIL image -> tensor, for evaluation."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        size = self.config["model_cfg"]["vision_cfg"].get("image_size", 224)
        try:
            settings = PreprocessCfg(**{**self.config.get("preprocess_cfg", {}), "size": size})
            transform: Callable[[Any], torch.Tensor] = image_transform_v2(settings, is_train=False)
        except (TypeError, ValueError, AssertionError) as error:
            raise CheckpointError(
                f"open_clip can't use the preprocess_cfg of {self.folder / CONFIG}: {error}"
            ) from error
        return transform

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        """Texts -> token ids of shape ``(n, context_length)``.

        Raises:
            CheckpointError: if open_clip can't make it of the folder.
        """
        import open_clip

        settings = self.config["model_cfg"]["text_cfg"]
        odd = set(settings.get("tokenizer_kwargs") or {}) - _TOKENIZER_SETTINGS
        if odd:
            raise CheckpointError(
                f"{self.folder / CONFIG} sets {first_few(sorted(odd))} of the tokenizer, which isn't allowed"
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
        """The tokens in the order of their ids, and the merges of byte pairs that make them.

        Raises:
            CheckpointError: if the tokenizer isn't open_clip's own.
        """
        tokenizer: Any = self.tokenizer()
        if not hasattr(tokenizer, "bpe_ranks"):
            raise CheckpointError(f"the tokenizer of {self.folder} isn't open_clip's own")
        return list(tokenizer.encoder), [" ".join(pair) for pair in tokenizer.bpe_ranks]

    def _local_merges(self, folder: Path) -> dict[str, str]:
        """The tokenizer's merges where they lie in the folder: open_clip takes their path from the working directory."""
        kwargs = self.config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}
        name = Path(kwargs.get("bpe_path", "")).name
        return (
            {"bpe_path": str((folder / name).resolve())}
            if name and (self.folder / name).is_file()
            else {}
        )

    def in_dtype(self, dtype: torch.dtype) -> OpenClipArchitecture:
        """The same: a configuration of open_clip names no dtype."""
        return self

    def write(self, folder: Path, final: Path) -> None:
        """Put all but the weights into ``folder``, which will be known as ``final``."""
        copy_siblings(self.folder / CONFIG, _TOKENIZER, folder)
        config = json.loads(json.dumps(self.config))
        merges = self._local_merges(final.resolve())
        if merges:
            config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] |= merges
        write_json(folder / CONFIG, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs to the root logger that the weights are random, which they are only until we fill them."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
