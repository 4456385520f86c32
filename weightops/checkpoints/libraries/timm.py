"""Folders of timm: ``config.json`` with an ``architecture`` beside weights, as timm saves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.config_checks import check_config, library_errors
from weightops.errors import CheckpointError
from weightops.hub.cards import CardFacts
from weightops.support.lazy import nn, torch


@dataclass(frozen=True)
class ConvertMode:
    """The step that converts an image to a mode of Pillow."""

    mode: str

    def __call__(self, image: Any) -> Any:
        return image.convert(self.mode)


class TimmArchitecture(Architecture):
    """The image classifier that a folder of timm describes."""

    library = "timm"
    is_classifier = True
    card_facts = CardFacts(
        "timm",
        "image-classification",
        """```python
import timm

model = timm.create_model("local-dir:{folder}", pretrained=True)
```""",
    )

    @classmethod
    def recognise(cls, folder: Path) -> Self | None:
        path = folder / cls.config_file
        return cls(folder) if path.is_file() and "architecture" in cls.read_config(path) else None

    @property
    def output_names(self) -> list[list[str]]:
        check_config(self.config, self.config_path, allowed=frozenset())
        settings = {**(self.config.get("pretrained_cfg") or {}), **self.config}
        names = settings.get("label_names") or settings.get("labels") or []
        if isinstance(names, dict) and all(str(number).isdecimal() for number in names):
            names = [names[number] for number in sorted(names, key=int)]  # an output's number: name
        if not isinstance(names, list):
            raise CheckpointError(
                f"{self.config_path} has {names!r:.80} for label_names, which must be a list of "
                "names, or numbers with names"
            )
        names = [str(name) for name in names]
        described = settings.get("label_descriptions") or {}
        if not isinstance(described, dict) or not all(name in described for name in names):
            return [names] if names else []
        texts = [str(described[name]) for name in names]
        return [names, texts, [text.partition(",")[0] for text in texts]] if names else []

    def with_classes(self, names: Sequence[str]) -> Self:
        settings: dict[str, Any] = {"num_classes": len(names), "label_names": list(names)}
        if "label_descriptions" in self.config:
            settings["label_descriptions"] = {name: name for name in names}
        inner = self.config.get("pretrained_cfg", {})
        stale = {"label_names", "label_descriptions", "labels", "num_classes"}
        if stale & inner.keys():
            kept = {key: value for key, value in inner.items() if key not in stale}
            settings["pretrained_cfg"] = kept
        return self.changed(settings)

    @property
    def _model_changes(self) -> dict[str, Any]:
        """The changes that concern the model; the others concern its description alone."""
        count = self.changes.get("num_classes")
        return {} if count is None else {"num_classes": count}

    def build(self) -> nn.Module:
        import timm

        check_config(self.config, self.config_path, allowed=frozenset())
        with self._building():
            module: nn.Module = timm.create_model(
                f"local-dir:{self.folder}", pretrained=False, **self._model_changes
            )
        return module.eval()

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        import timm
        from torchvision.transforms import Compose

        data: Any = timm.data
        with library_errors(f"timm can't use the preprocessing of {self.config_path}"):
            settings = data.resolve_data_config(model=self.build())
            mode = "L" if settings["input_size"][0] == 1 else "RGB"
            transform: Callable[[Any], torch.Tensor] = Compose(
                [ConvertMode(mode), *data.create_transform(**settings).transforms]
            )
        return transform

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        raise CheckpointError(f"{self.folder} is a model of images: it has no tokenizer")
