"""Check the running statistics of batch normalisation."""

from __future__ import annotations

from weightops.errors import NonfiniteError
from weightops.support.lazy import nn, torch
from weightops.support.text import first_few


def check_running_variances(module: nn.Module, ref: str) -> None:
    """Refuse a model with a negative running variance, whose square root doesn't exist.

    Extrapolated and negated weights have such variances: ``v_0 + alpha (v_1 - v_0)``.

    Raises:
        NonfiniteError: naming the variances.
    """
    # Buffers are on one device: one transfer for all of them.
    named = [
        (name, buffer)
        for name, buffer in module.named_buffers()
        if name.endswith("running_var") and buffer is not None
    ]
    if not named:
        return
    lowest = torch.stack([buffer.min().float() for _, buffer in named]).cpu()
    negative = [name for (name, _), value in zip(named, lowest.tolist(), strict=True) if value < 0]
    if negative:
        raise NonfiniteError(
            f"{len(negative)} running variances of batch normalisation of {ref} are negative: "
            f"{first_few(negative)}",
            hint="an edit with batchnorm=TASK recomputes them on images; with batchnorm='base' it "
            "keeps the base's",
        )
