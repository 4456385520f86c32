"""`Architecture`: what every supported library of models must offer."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from weightops.checkpoints.libraries.config_checks import library_errors
from weightops.checkpoints.libraries.memory_names import MemoryNames
from weightops.checkpoints.skeleton import blank_copy
from weightops.errors import CheckpointError, WeightopsError
from weightops.hub.cards import CardFacts
from weightops.support.json_files import read_json, write_json
from weightops.support.lazy import nn, torch
from weightops.support.sibling_files import ADAPTER_CONFIG, copy_companions, other_companions
from weightops.support.text import first_few

log = logging.getLogger("weightops")

_CACHED = ("skeleton", "names_in_memory")
"""Attributes that are computed once for a configuration."""


class Architecture(ABC):
    """The model that a folder describes: how to build it, prepare its inputs and save it.

    One subclass for each library of models is listed in `LIBRARIES`.

    Args:
        folder: the folder with the configuration.
        changes: settings of the model that replace those in the configuration; None removes one.

    Attributes:
        folder: the folder.
        config: the content of the configuration file, with the changes.
        library: the name of the library.
        config_file: the name of the configuration file.
        weights_file: the name of the weights file that the library looks for.
        left_behind: the places of companions that what is written has no use for.
        chosen: the files that were chosen for this model, whatever other folders have.
        parts: the beginning of names -> the weights file, in a folder within this one, that has
            these tensors; empty for a model in one folder.
        reads_shards: True if the library reads weights in several files with an index.
        is_classifier: True if the models classify images with a head of their own.
    """

    library: ClassVar[str]
    config_file: ClassVar[str] = "config.json"
    weights_file: str = "model.safetensors"
    reads_shards: ClassVar[bool] = True
    is_classifier: ClassVar[bool] = False

    def __init__(self, folder: Path, changes: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.parts: Mapping[str, str] = {}
        self.chosen: frozenset[str] = frozenset()
        self.left_behind: frozenset[str] = frozenset()
        self._change(changes or {})

    def _change(self, changes: Mapping[str, Any]) -> None:
        self.changes = dict(changes)
        for cached in _CACHED:
            self.__dict__.pop(cached, None)
        merged = {**self.read_config(self.config_path), **self.changes}
        self.config: dict[str, Any] = {
            key: value
            for key, value in merged.items()
            if value is not None or key not in self.changes
        }

    @property
    def config_path(self) -> Path:
        """The configuration file."""
        return self.folder / self.config_file

    @classmethod
    @abstractmethod
    def recognise(cls, folder: Path) -> Self | None:
        """Return the architecture that a folder describes; None for folders of other libraries."""

    @property
    def card_facts(self) -> CardFacts:
        """The facts about the library that a model card states."""
        return CardFacts(self.library)

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the module in evaluation mode; its weights are yet to be filled in."""

    @contextmanager
    def _building(self) -> Iterator[None]:
        """Convert the errors of a library that builds a module, and bound the module's size."""
        from weightops.checkpoints.libraries.model_size import bounded  # imports torch

        fact = f"{self.library} can't build the model of {self.config_path}"
        with library_errors(fact), bounded(self.config, self.config_path):
            yield

    @abstractmethod
    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        """Return the function that turns a PIL image into a tensor for evaluation."""

    @abstractmethod
    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        """Return the function that turns texts into token ids of shape ``(n, context_length)``.

        Raises:
            CheckpointError: if the model takes no text, or the folder has no usable tokenizer.
        """

    @classmethod
    def read_config(cls, path: Path) -> dict[str, Any]:
        """Read the configuration file.

        Raises:
            CheckpointError: if the file isn't a configuration of this library.
        """
        return read_json(path)

    @cached_property
    def skeleton(self) -> nn.Module | None:
        """The model without weights, which nobody may change; None if it can't be built."""
        try:
            with torch.device("meta"):
                return blank_copy(self.build())
        except (NotImplementedError, RuntimeError, WeightopsError):
            pass  # open_clip and others compute with the weights that they begin with
        try:
            return blank_copy(self.build())
        except WeightopsError as error:
            log.info("the model of %s can't be built: %s", self.folder, error.fact)
            return None

    @property
    def names_in_memory(self) -> MemoryNames | None:
        """The names of the module's tensors if they may differ from those in files."""
        return None

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return the architecture with settings that replace those in the configuration."""
        other = copy(self)
        other._change({**self.changes, **changes})
        return other

    def in_folder(self, folder: Path) -> Self:
        """Return the architecture with all that lies beside the weights in another folder."""
        other = copy(self)
        other.folder = folder
        return other

    def __copy__(self) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in _CACHED}
        return {**state, "folder": self.folder.absolute()}

    def shards(self, prefix: str) -> bool:
        """Return whether the library reads several files of the tensors with such names."""
        return self.reads_shards and not prefix

    def own_names(self, names: Iterable[str]) -> list[str]:
        """Return the names of tensors that aren't in a part of the model's folder."""
        return [name for name in names if not name.startswith(tuple(self.parts))]

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration, with those of the parts."""
        settings = dict(self.config)
        for prefix, file in self.parts.items():
            path = (self.folder / file).parent / "config.json"
            if path.is_file():
                settings[prefix.rstrip(".")] = read_json(path)
        return settings

    def in_dtype(self, dtype: torch.dtype | str) -> Self:
        """Return the architecture for weights in another dtype, which a setting may name."""
        return self

    @property
    def output_names(self) -> list[list[str]]:
        """The names of a classifier's outputs that the configuration records, and other names."""
        return []

    def with_classes(self, names: Sequence[str]) -> Self:
        """Return the architecture with an output for each of these classes.

        Raises:
            CheckpointError: if the number of classes of such a model can't be changed.
        """
        raise CheckpointError(
            f"the number of classes of {self.folder} can't be changed: "
            f"it is a model of {self.library}"
        )

    def with_layers(
        self,
        spans: Sequence[tuple[int, int]],
        parts: Sequence[Architecture | None],
        *,
        count: int | None = None,
        section: str | None = None,
        keys: Sequence[str] = ("num_hidden_layers",),
    ) -> Self:
        """Return the architecture of a model that is put together from layers of several models.

        Args:
            spans: the first layer of each part in its own model, and the layer after its last.
            parts: the architectures of these models, in the same order.
            count: the number of layers of this model; by default what the configuration says.
            section: the section of the configuration that states it; None for the top level.
            keys: the names that configurations give the number of layers, the usual one first.

        Raises:
            CheckpointError: if the number of layers of such a model can't be changed.
        """
        raise CheckpointError(
            f"the number of layers of {self.folder} can't be changed: "
            "it isn't a transformers folder"
        )

    def tokens(self, text: str) -> torch.Tensor:
        """Return the token ids of a whole text, shape ``(n,)``.

        Raises:
            CheckpointError: if the model isn't a language model with a usable tokenizer.
        """
        raise CheckpointError(
            f"{self.folder} isn't a folder of transformers, whose tokenizer a text needs"
        )

    def prompt_tokens(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Return the token ids of each text, after the token that texts begin with, if any.

        Raises:
            CheckpointError: if the model isn't a language model with a usable tokenizer.
        """
        return [self.tokens(text) for text in texts]

    @property
    def context(self) -> int:
        """The number of tokens that a language model takes at once.

        Raises:
            CheckpointError: if the model isn't a language model.
        """
        raise CheckpointError(
            f"{self.folder} is a model of {self.library}, not a language model",
            hint="a text needs a causal language model of transformers, with its tokenizer",
        )

    @property
    def _inner(self) -> list[str]:
        """The folders within this one that hold weights."""
        return [Path(file).parent.as_posix() for file in self.parts.values()]

    def warn_of_others(self, files: Iterable[Path]) -> None:
        """Warn if the folders of input files have companions other than those that are written."""
        others: dict[str, None] = {}
        for place in dict.fromkeys(map(self._model_folder, files)):
            described = self.describes(place) or (place / ADAPTER_CONFIG).is_file()
            if described and place != self.folder.absolute():
                same = self.chosen | self.made_like_in(place)
                found = other_companions(self.config_path, place, self._inner, same)
                others |= {f"{place}/{name}": None for name in found}
        if others:
            log.warning(
                "all beside the weights is taken from %s; others have another %s",
                self.folder,
                first_few(others, 6),
            )

    def describes(self, folder: Path) -> bool:
        """Return whether a folder has the configuration of a model of this library."""
        return (folder / self.config_file).is_file()

    def made_like_in(self, folder: Path) -> Set[str]:
        """Return the files in another folder that `write` would make just so for this one."""
        return set()

    def _model_folder(self, file: Path) -> Path:
        """Return the folder of a model of whose files of weights one is given."""
        for inner in self._inner:
            if file.parent.as_posix().endswith(f"/{inner}"):
                return file.parents[inner.count("/") + 1]
        return file.parent

    def write(self, folder: Path) -> None:
        """Write everything but the weights into a folder.

        Args:
            folder: where to write.
        """
        copy_companions(self.config_path, folder, self._inner, self.left_behind)
        if self.changes:
            write_json(folder / self.config_file, self.config)
