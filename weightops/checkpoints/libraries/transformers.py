"""Folders of transformers: ``config.json`` beside weights, as ``save_pretrained`` writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from weightops.algebra.dtypes import name_of
from weightops.checkpoints.libraries.base import Architecture, CardFacts
from weightops.checkpoints.libraries.config_checks import check_config, library_errors
from weightops.errors import CheckpointError, missing_extra
from weightops.support.cache import cached_folder

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""The names that configurations give the number of layers."""


class TransformersArchitecture(Architecture):
    """The model that a folder of transformers describes. Code that a folder brings is never run."""

    library = "transformers"
    card_facts = CardFacts(
        "transformers",
        "zero-shot-image-classification",
        """```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
```""",
    )

    @classmethod
    def recognise(cls, folder: Path) -> Self | None:
        path = folder / cls.config_file
        return cls(folder) if path.is_file() and "model_type" in cls.read_config(path) else None

    @classmethod
    def of_files(cls, files: Mapping[str, Any]) -> Self:
        """Write files to a folder of the cache, and return its architecture.

        Args:
            files: name -> content: bytes as they are, all else is written as JSON.
        """
        return cls(cached_folder("transformers", files))

    def build(self) -> nn.Module:
        transformers = self._transformers("to build the model")
        check_config(self.config, self.config_path, allowed=frozenset())
        named = self.config.get("architectures")
        name = named[0] if isinstance(named, list) and named else None
        kind = getattr(transformers, str(name), None)
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            raise CheckpointError(
                f"{self.config_path} names the architecture {name}, which transformers doesn't have"
            )
        with library_errors(f"the model of {self.config_path} can't be built"):
            module: nn.Module = kind(
                transformers.AutoConfig.from_pretrained(
                    self.folder, trust_remote_code=False, **self.changes
                )
            )
        return module.eval()

    def in_dtype(self, dtype: torch.dtype) -> Self:
        named: dict[str, Any] = {
            key: name_of(dtype) for key in ("dtype", "torch_dtype") if key in self.config
        }
        return self.changed(named)

    def with_layers(
        self, spans: Sequence[tuple[int, int]], parts: Sequence[Architecture | None]
    ) -> Self:
        key = next((key for key in _LAYER_COUNTS if key in self.config), _LAYER_COUNTS[0])
        count = self.config.get(key)
        changes: dict[str, Any] = {key: sum(stop - start for start, stop in spans)}
        for name, value in self.config.items():
            if isinstance(value, list) and len(value) == count:  # an entry for each layer
                rows = [part.config.get(name, value) if part else value for part in parts]
                changes[name] = [
                    entry
                    for row, (start, stop) in zip(rows, spans, strict=True)
                    for entry in row[start:stop]
                ]
        return self.changed(changes)

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        processor = self._load("to prepare images", "AutoImageProcessor")
        return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]

    @property
    def context(self) -> int:
        names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
        return next((int(self.config[name]) for name in names if self.config.get(name)), 1024)

    def tokens(self, text: str) -> torch.Tensor:
        tokenizer = self._load("for the tokenizer", "AutoTokenizer")
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
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
        """Load a part of the model, such as its tokenizer, from the folder."""
        library = self._transformers(purpose)
        for path in (self.config_path, *self.folder.glob("*_config.json")):
            check_config(self.read_config(path), path, allowed=frozenset())
        with library_errors(f"{self.folder} has nothing {purpose} that transformers loads"):
            return getattr(library, kind).from_pretrained(self.folder, trust_remote_code=False)
