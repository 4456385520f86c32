"""Folders of transformers: ``config.json`` beside weights, as ``save_pretrained`` writes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import Self

from weightops.algebra.dtypes import name_of
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.config_checks import check_config, library_errors
from weightops.checkpoints.libraries.memory_names import MemoryNames
from weightops.checkpoints.libraries.transformers_kinds import facts_of
from weightops.errors import CheckpointError, missing_extra
from weightops.hub.cards import CardFacts
from weightops.support.cache import cached_folder
from weightops.support.lazy import nn, torch

log = logging.getLogger("weightops")

_LISTED_LAYERS = ("mlp_only_layers", "cross_attention_layers", "full_attn_idxs")
"""The names that configurations give lists of layers' numbers."""


class TransformersArchitecture(Architecture):
    """The model that a folder of transformers describes. Code that a folder brings is never run."""

    library = "transformers"

    @property
    def card_facts(self) -> CardFacts:
        """The facts about the library, and about what the model is for."""
        return facts_of(self.config)

    @classmethod
    def recognise(cls, folder: Path) -> Self | None:
        path = folder / cls.config_file
        return cls(folder) if path.is_file() and "model_type" in cls.read_config(path) else None

    def describes(self, folder: Path) -> bool:
        return self.recognise(folder) is not None  # a tokenizer alone has such a file, too

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
        kinds = transformers.models.auto.configuration_auto.CONFIG_MAPPING
        if "auto_map" in self.config and self.config.get("model_type") not in kinds:
            raise CheckpointError(
                f"{self.config_path} sets auto_map to code for the model_type "
                f"{self.config.get('model_type')!r:.80}, which transformers doesn't have; code of "
                "a folder is never run"
            )
        with self._building():
            module: nn.Module = kind(self._settings(transformers))
        return module.eval()

    def _settings(self, transformers: Any) -> Any:
        """Return the configuration as an object of transformers."""
        if "model_type" in self.changes:
            return transformers.AutoConfig.for_model(**self.config)
        return transformers.AutoConfig.from_pretrained(
            self.folder, trust_remote_code=False, **self.changes
        )

    @cached_property
    def names_in_memory(self) -> MemoryNames | None:
        return MemoryNames.of(self.skeleton) if self.skeleton is not None else None

    def in_dtype(self, dtype: torch.dtype | str) -> Self:
        named: dict[str, Any] = {
            key: name_of(dtype) for key in ("dtype", "torch_dtype") if key in self.config
        }
        return self.changed(named)

    def with_layers(
        self,
        spans: Sequence[tuple[int, int]],
        parts: Sequence[Architecture | None],
        *,
        count: int | None = None,
        section: str | None = None,
        keys: Sequence[str] = ("num_hidden_layers",),
    ) -> Self:
        old = self._section(self, section)
        stated = [key for key in keys if key in old] or [keys[0]]
        count = old.get(stated[0]) if count is None else count
        depth = sum(stop - start for start, stop in spans)
        changes: dict[str, Any] = {
            key: depth for key in stated if key not in old or old[key] == count
        }
        for name, value in old.items():
            rows = [self._section(part, section).get(name, value) for part in parts]
            if isinstance(value, list) and len(value) == count:  # an entry for each layer
                changes[name] = [
                    entry
                    for row, (start, stop) in zip(rows, spans, strict=True)
                    for entry in row[start:stop]
                ]
            elif name in _LISTED_LAYERS and isinstance(value, list):
                changes[name] = _renumbered(rows, spans)
        return self.changed(changes if section is None else {section: {**old, **changes}})

    def _section(self, architecture: Architecture | None, section: str | None) -> dict[str, Any]:
        config = (architecture or self).config
        found: dict[str, Any] = config if section is None else config.get(section) or {}
        return found

    def as_class(self, model_type: str, kind: str, settings: Mapping[str, Any]) -> Self:
        """Return the architecture of another class, with all settings that both classes have.

        Args:
            model_type: the model type of the class.
            kind: the name of the class.
            settings: further settings.
        """
        transformers = self._transformers("for the settings")
        check_config(self.config, self.config_path, allowed=frozenset())
        with library_errors(f"the settings of {self.config_path} can't be read"):
            own = self._settings(transformers).to_dict()
            known = transformers.CONFIG_MAPPING[model_type]().to_dict()
        stated = {key: own[key] for key in known if key in own and key not in self.config}
        named = {"model_type": model_type, "architectures": [kind]}
        return self.changed({**stated, **named, **settings})

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        processor = self._load("to prepare images", "AutoImageProcessor")

        def prepare(image: Any) -> torch.Tensor:
            with library_errors(f"the image processor of {self.folder} can't prepare an image"):
                pixels: torch.Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
            return pixels

        return prepare

    @property
    def context(self) -> int:
        names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
        name = next((name for name in names if self.config.get(name)), None)
        length = self.config[name] if name else 1024
        if type(length) is not int or length < 1:
            raise CheckpointError(
                f"{self.config_path} sets {name} to {length!r:.80}, which must be a whole number "
                "from 1 on"
            )
        return length

    def tokens(self, text: str) -> torch.Tensor:
        tokenizer = self.text_tokenizer()
        with library_errors(f"the tokenizer of {self.folder} can't encode a text"):
            found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(found)

    def prompt_tokens(self, texts: Sequence[str]) -> list[torch.Tensor]:
        tokenizer = self.text_tokenizer()
        started = [(tokenizer.bos_token or "") + text for text in texts]
        with library_errors(f"the tokenizer of {self.folder} can't encode texts"):
            ids = tokenizer(started, add_special_tokens=False, verbose=False)
        return [torch.tensor(each, dtype=torch.long) for each in ids["input_ids"]]

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        tokenizer = self.text_tokenizer()

        def encode(texts: list[str]) -> torch.Tensor:
            with library_errors(f"the tokenizer of {self.folder} can't encode texts"):
                ids: torch.Tensor = tokenizer(
                    texts, padding="max_length", truncation=True, return_tensors="pt"
                )["input_ids"]
            return ids

        return encode

    def text_tokenizer(self) -> Any:
        """Return transformers' tokenizer of the folder."""
        return self._load("for the tokenizer", "AutoTokenizer")

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


def _renumbered(rows: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the new numbers of the layers that each part lists."""
    numbers, first = [], 0
    for row, (start, stop) in zip(rows, spans, strict=True):
        numbers += [first + layer - start for layer in sorted(row) if start <= layer < stop]
        first += stop - start
    return numbers
