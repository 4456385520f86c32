"""`DualEncoder`: image and text encoders of transformers, such as SigLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from weightops.algebra.precision import computed_in
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.libraries.dual_encoders import image_preparation, text_preparation
from weightops.checkpoints.libraries.transformers import TransformersArchitecture
from weightops.evaluation.image_model import ImageModel
from weightops.support.lazy import F, nn, torch


@dataclass(eq=False)
class DualEncoder(ImageModel):
    """A model of transformers with an image and a text encoder, which isn't open_clip's CLIP.

    SigLIP's bias is the same for all classes, so that it changes neither their order nor a softmax
    over them; it is left out.
    """

    image_parts: ClassVar[tuple[str, ...]] = ("vision_model", "visual_projection")

    padding: int | None = None
    """The token that a mask hides; None for models that take no mask."""

    @classmethod
    def build(cls, checkpoint: Checkpoint, device: torch.device, precision: str) -> DualEncoder:
        """Build the model of a folder of transformers."""
        architecture = checkpoint.known_architecture()
        assert isinstance(architecture, TransformersArchitecture)
        tokenizer, padding = text_preparation(architecture)
        preprocess = image_preparation(architecture)
        module = checkpoint.model().to(device)
        parts = (module, preprocess, tokenizer)
        return cls(*parts, device, checkpoint, precision, padding=padding)

    @property
    def trained(self) -> tuple[nn.Module, str]:
        parts = {name: getattr(self.module, name, None) for name in self.image_parts}
        return nn.ModuleDict({n: part for n, part in parts.items() if part is not None}), ""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Return unit features of images, shape ``(n, dim)``, float32."""
        with computed_in(self.precision, self.device):
            features = self.module.get_image_features(pixel_values=images.to(self.device))
        return F.normalize(features.pooler_output.float(), dim=-1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return unit features of the tokens of texts, shape ``(n, dim)``, float32."""
        tokens = tokens.to(self.device)
        mask = {} if self.padding is None else {"attention_mask": (tokens != self.padding).long()}
        with computed_in(self.precision, self.device):
            features = self.module.get_text_features(input_ids=tokens, **mask)
        return F.normalize(features.pooler_output.float(), dim=-1)
