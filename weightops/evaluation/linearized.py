"""Models that are linear in their weights: the tangent at a base (arXiv 2305.12827)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache

from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.precision import Precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.linearized import Linearized, linearized_at, mark
from weightops.checkpoints.loading import load_into
from weightops.checkpoints.opening import open_checkpoint
from weightops.errors import CheckpointError, OptionError, WeightopsError
from weightops.evaluation.image_model import ImageModel
from weightops.support.lazy import F, nn, torch


@dataclass(eq=False)
class LinearizedModel(ImageModel):
    """A CLIP model whose image features are linear in the image encoder's weights.

        f_lin(x; theta) = f(x; theta_0) + J(x; theta_0) (theta - theta_0)

    The features are then scaled to unit length, as always. The product with the Jacobian is taken
    forward, beside f itself, at about the cost of a second pass.

    Attributes:
        at: the base that the model is linearised at.
        start: the weights of the image encoder of this base, theta_0.
    """

    at: Linearized = field(kw_only=True)
    start: dict[str, torch.Tensor] = field(kw_only=True)

    def __post_init__(self) -> None:
        _take_first_product()

    @classmethod
    def of(cls, model: ImageModel) -> LinearizedModel:
        """Return a model linearised at its present weights, which shares its module.

        Raises:
            OptionError: for other models than CLIP, and encoders with batch normalisation.
        """
        if isinstance(model, LinearizedModel):
            return model
        if type(model) is not ImageModel:
            raise OptionError(
                f"{model.base.ref} isn't linearised: only CLIP models of open_clip's kind are"
            )
        encoder: nn.Module = model.module.visual
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in encoder.modules()):
            raise OptionError(
                f"{model.base.ref} has batch normalisation, and isn't linearised",
                hint="Vision Transformers are",
            )
        if getattr(encoder, "output_tokens", False):
            raise OptionError(f"{model.base.ref} has several outputs, and isn't linearised")
        at = Linearized(model.base.ref, model.base.fingerprint)
        start = {name: p.detach().clone() for name, p in encoder.named_parameters()}
        mark(model.module, at)
        kept = {each.name: getattr(model, each.name) for each in fields(ImageModel)}
        return cls(**{**kept, "precision": "float32"}, at=at, start=start)

    def in_precision(self, precision: Precision) -> ImageModel:
        """Return the model: products with a Jacobian are taken in float32.

        Raises:
            OptionError: for bfloat16.
        """
        if precision == "bfloat16":
            raise OptionError(
                f"{self.base.ref} is linearised, and is run in float32", hint="precision='float32'"
            )
        return super().in_precision("float32")

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Return unit features of images, shape ``(n, dim)``, float32."""
        encoder, pixels = self.module.visual, images.to(self.device)
        changes = {name: p - self.start[name] for name, p in encoder.named_parameters()}

        def features_at(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            features: torch.Tensor = functional_call(encoder, parameters, (pixels,))
            return features

        with _differentiable_attention():
            start, change = jvp(features_at, (self.start,), (changes,))[:2]
        return F.normalize((start + change).float(), dim=-1)


@cache
def _take_first_product() -> None:
    """Take a product with a Jacobian, of which torch's first one warns of torch's own ways."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        jvp(torch.sin, (torch.zeros(1),), (torch.zeros(1),))


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Compute attention by operators that have a forward product, which torch's fast ones lack."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def open_linearized(model: Checkpoint, device: str = "auto") -> LinearizedModel:
    """Return the model of linearised weights, ready to run.

    Raises:
        CheckpointError: if the base that they are linearised at isn't there.
    """
    at = linearized_at(model.form)
    assert at is not None
    opened = LinearizedModel.of(ImageModel.open(_base_of(model, at), device))
    load_into(model.form, opened.module, strict=True)
    opened.base = model
    return opened


def _base_of(model: Checkpoint, at: Linearized) -> Checkpoint:
    """Return the base that weights are linearised at, from their expression or by its ref."""
    if at.source is not None:
        return Checkpoint(LinearForm.of(at.source), model.architecture)
    hint = f"{at.ref} is taken from the working folder, and must be there"
    try:
        base = open_checkpoint(at.ref)
    except WeightopsError as error:
        raise CheckpointError(
            f"{model.ref} is linearised at {at.ref}, which can't be opened: {error.fact}", hint=hint
        ) from error
    if base.fingerprint != at.fingerprint:
        raise CheckpointError(
            f"{model.ref} is linearised at {at.ref} ({at.fingerprint}), and what has this name "
            f"now is another ({base.fingerprint})",
            hint=hint,
        )
    return base
