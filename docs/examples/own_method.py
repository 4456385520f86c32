"""A merge method of your own.

python own_method.py BASE MODEL [MODEL ...] OUT
"""

import sys

import torch

import weightops


@weightops.method
def clipped_sum(deltas: torch.Tensor, weights: torch.Tensor, *, limit: float = 3.0) -> torch.Tensor:
    """Sum the task vectors, each without its outliers.

    Args:
        deltas: differences from the base, shape ``(k, ...)``; ``(k,)`` for scalars.
        weights: one for each model, shape ``(k,)``.
        limit: the largest magnitude that is kept, in root mean squares of the delta.
    """
    flat = deltas.reshape(len(deltas), -1)
    bound = limit * flat.square().mean(1, keepdim=True).sqrt()
    return (weights @ flat.clamp(-bound, bound)).view(deltas.shape[1:])


if __name__ == "__main__":
    base, *models, out = sys.argv[1:]
    merged = weightops.merge(models, "clipped_sum", base=base, limit=2.0)
    merged.save(out)
    print(f"{out}: clipped sum of {len(models)} models")
