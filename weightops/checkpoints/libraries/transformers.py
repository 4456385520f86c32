"""Folders of transformers: ``config.json`` beside weights, as ``save_pretrained`` writes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from weightops.algebra.dtypes import name_of
from weightops.checkpoints.libraries.base import Architecture, CardFacts
from weightops.checkpoints.libraries.memory_names import MemoryNames
from weightops.errors import CheckpointError, WeightopsError, missing_extra
from weightops.support.cache import cached_folder

log = logging.getLogger("weightops")

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
        name = next(iter(self.config.get("architectures") or ()), None)
        kind = getattr(transformers, str(name), None)
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            raise CheckpointError(
                f"{self.config_path} names the architecture {name}, which transformers doesn't have"
            )
        try:
            module: nn.Module = kind(
                transformers.AutoConfig.from_pretrained(
                    self.folder, trust_remote_code=False, **self.changes
                )
            )
        except (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"the model of {self.config_path} can't be built: {reason}"
            ) from error
        return module.eval()

    def names_in_memory(self) -> MemoryNames | None:
        try:
            with torch.device("meta"):
                return MemoryNames.of(self.build())
        except WeightopsError as error:
            log.info("the names in memory of %s aren't known: %s", self.folder, error.fact)
            return None

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
