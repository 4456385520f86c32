"""Folders of timm models: ``config.json`` with an ``architecture`` beside weights, as timm saves them for the Hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from weightops.checkpoints.libraries.base import CONFIG, ConfiguredFolder
from weightops.errors import CheckpointError


class TimmArchitecture(ConfiguredFolder):
    """What a folder of timm says of its model; see `ConfiguredFolder`."""

    def build(self) -> nn.Module:
        """The module, with weights yet to be filled in, in evaluation mode."""
        import timm

        try:
            module: nn.Module = timm.create_model(
                f"local-dir:{self.folder}", pretrained=False, **self._changes
            )
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"timm can't build the model of {self.folder / CONFIG}: {error}"
            ) from error
        return module.eval()

    def in_dtype(self, dtype: torch.dtype) -> TimmArchitecture:
        """The same: a configuration of timm names no dtype."""
        return self

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        """PIL image -> tensor, for evaluation."""
        import timm
        from torchvision.transforms import Compose

        data: Any = timm.data
        settings = data.resolve_data_config(model=self.build())
        mode = "L" if settings["input_size"][0] == 1 else "RGB"
        transform: Callable[[Any], torch.Tensor] = Compose(
            [lambda image: image.convert(mode), *data.create_transform(**settings).transforms]
        )
        return transform

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        """There is none.

        Raises:
            CheckpointError: always: these models take images.
        """
        raise CheckpointError(f"{self.folder} is a model of images: it has no tokenizer")
