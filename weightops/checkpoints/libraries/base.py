"""Folders in which ``config.json`` says what model the weights beside it are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from weightops.support.json_files import read_json, write_json
from weightops.support.sibling_files import copy_siblings

CONFIG = "config.json"


class ConfiguredFolder:
    """What such a folder says of its model.

    Args:
        folder: the folder.
        changes: what the model has otherwise than the folder's configuration, such as ``num_classes``.

    Attributes:
        config: the content of ``config.json``, changed so.
        weights_file: the name that the library looks for.
        beside: patterns of files that go wherever the weights go.
    """

    weights_file = "model.safetensors"
    beside: ClassVar[tuple[str, ...]] = (CONFIG,)

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self._changes = folder, changes
        self.config = {**read_json(folder / CONFIG), **changes}

    def write(self, folder: Path, final: Path) -> None:
        """Put all but the weights into ``folder``, which will be known as ``final``."""
        copy_siblings(self.folder / CONFIG, self.beside, folder)
        if self._changes:
            write_json(folder / CONFIG, self.config)
