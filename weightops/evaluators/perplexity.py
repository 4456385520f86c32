"""Perplexity of causal language models, such as those of transformers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


def token_loss(module: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean negative log-likelihood of a token after the first, in nats.

    Args:
        module: called with ``input_ids``, it gives an object whose ``logits`` have the shape ``(n, length, vocabulary)``.
        tokens: shape ``(n, length)``.
        labels: the same tokens, for a loss that also takes labels.
    """
    logits = module(input_ids=tokens).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@torch.no_grad()
def perplexity(module: nn.Module, tokens: torch.Tensor, *, batch_size: int = 8) -> float:
    r"""Perplexity :math:`\exp(-\frac1T \sum_t \log p(x_t \mid x_{<t}))` over blocks of tokens, each by itself.

    Args:
        module: a causal language model of transformers; its mode is put back.
        tokens: shape ``(n, length)``; of every block all tokens but the first count.
        batch_size: blocks at a time.

    Returns:
        From 1, the best, to the size of the vocabulary for guessing, and beyond.
    """
    was_training = module.training
    module.eval()
    device = next(module.parameters()).device
    total = 0.0
    for batch in tqdm(tokens.split(batch_size), desc="perplexity", delay=1, leave=False):  # type: ignore[no-untyped-call]
        there = batch.to(device)
        total += token_loss(module, there, there).item() * len(batch)
    module.train(was_training)
    return math.exp(total / len(tokens))
