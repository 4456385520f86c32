"""open_clip directories: ``open_clip_config.json`` beside weights, as open_clip saves them."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import Self

from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.clip_tokenizer import TOKENIZER_FILES, tokenizer_files
from weightops.checkpoints.libraries.config_checks import check_config, library_errors
from weightops.errors import CheckpointError, missing_extra
from weightops.hub.cards import CardFacts
from weightops.hub.push import THIS_FOLDER
from weightops.support.cache import cached_folder
from weightops.support.json_files import parse_json, write_json
from weightops.support.lazy import nn, torch
from weightops.support.text import first_few

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
MERGES = "merges.txt.gz"
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
```""",
    )

    @classmethod
    def recognise(cls, folder: Path) -> Self | None:
        return cls(folder) if (folder / CONFIG).is_file() else None

    @classmethod
    def read_config(cls, path: Path) -> dict[str, Any]:
        try:
            config: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
            sound = all(
                isinstance(config["model_cfg"][part], dict) for part in ("vision_cfg", "text_cfg")
            )
        except (ValueError, KeyError, TypeError):
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

        self._check()
        with self._building(), _quiet():
            module: nn.Module = open_clip.create_model(
                f"local-dir:{self.folder}", load_weights=False, pretrained_text=False
            )
        return module.eval()

    def _check(self) -> None:
        """Refuse settings that open_clip's own configurations don't have, or that lead to code."""
        import open_clip

        texts = (open_clip.get_model_config(m)["text_cfg"] for m in open_clip.list_models())
        named = {text["hf_model_name"] for text in texts if text.get("hf_model_name")}
        own = frozenset(name for name in named if not Path(name).exists())
        check_config(self.config, self.config_path, allowed=own)
        settings = set(self.config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {})
        forbidden = settings - _TOKENIZER_SETTINGS
        if forbidden:
            raise CheckpointError(
                f"{self.config_path} sets {first_few(sorted(forbidden))} of the tokenizer, "
                "which isn't allowed"
            )

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        size = self.config["model_cfg"]["vision_cfg"].get("image_size", 224)
        self._check()
        with library_errors(f"open_clip can't use the preprocess_cfg of {self.config_path}"):
            settings = PreprocessCfg(**{**self.config.get("preprocess_cfg", {}), "size": size})
            transform: Callable[[Any], torch.Tensor] = image_transform_v2(settings, is_train=False)
        return transform

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        import open_clip

        settings = self.config["model_cfg"]["text_cfg"]
        self._check()
        given = {"trust_remote_code": False} if settings.get("hf_tokenizer_name") else {}
        merges = self._merges()
        with library_errors(f"open_clip can't make the tokenizer of {self.folder}"), _quiet():
            try:
                tokenizer: Callable[[list[str]], torch.Tensor] = (
                    self._byte_pairs(merges)
                    if merges
                    else open_clip.get_tokenizer(f"local-dir:{self.folder}", **given)
                )
            except ImportError:
                raise missing_extra(
                    "transformers", "hf", f"for the tokenizer of {self.folder}"
                ) from None
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

    def _merges(self) -> Path | None:
        """Return the merges that the folder brings for open_clip's own tokenizer, if it does."""
        settings = self.config["model_cfg"]["text_cfg"]
        path = (settings.get("tokenizer_kwargs") or {}).get("bpe_path", "")
        if not isinstance(path, str):
            raise CheckpointError(f"{self.config_path} sets bpe_path to {path!r:.80}, not a path")
        named = Path(path).name
        file = self.folder / (named or (MERGES if settings.get("hf_tokenizer_name") else ""))
        return file if file.is_file() else None

    def _byte_pairs(self, merges: Path) -> Any:
        """Return open_clip's own tokenizer with the folder's merges."""
        from open_clip.tokenizer import SimpleTokenizer

        settings = self.config["model_cfg"]["text_cfg"]
        given = {**(settings.get("tokenizer_kwargs") or {}), "bpe_path": str(merges)}
        return SimpleTokenizer(context_length=settings.get("context_length", 77), **given)

    def write(self, folder: Path) -> None:
        super().write(folder)
        if merges := self._merges():
            self._write_tokenizer(folder, merges)

    def made_like_in(self, folder: Path) -> Set[str]:
        merges, other = self._merges(), folder / MERGES
        same = merges and other.is_file() and merges.read_bytes() == other.read_bytes()
        return set(TOKENIZER_FILES) if same else set()

    def _write_tokenizer(self, folder: Path, merges: Path) -> None:
        """Write the folder's merges also as a tokenizer that open_clip finds wherever it lies."""
        config = json.loads(json.dumps(self.config))
        settings = config["model_cfg"]["text_cfg"]
        given = settings.get("tokenizer_kwargs") or {}
        unusual = [
            name
            for name, usual in (("no_causal_mask", False), ("pool_type", "argmax"))
            if settings.get(name, usual) != usual
        ]
        if unusual or given.get("reduction_mask"):
            raise CheckpointError(
                f"{self.config_path} has a bpe_path and {first_few(unusual) or 'reduction_mask'}, "
                "which open_clip can't load from another folder"
            )
        tokenizer = self._byte_pairs(merges)
        for name, content in tokenizer_files(tokenizer, tokenizer.context_length).items():
            write_json(folder / name, content)
        shutil.copyfile(merges, folder / MERGES)
        settings["hf_tokenizer_name"] = settings.get("hf_tokenizer_name") or THIS_FOLDER
        settings["tokenizer_kwargs"] = {"clean": given.get("clean", "lower")}
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
