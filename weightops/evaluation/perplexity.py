"""Perplexity of causal language models, such as those of transformers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from weightops.checkpoints.checkpoint import Checkpoint
from weightops.errors import CheckpointError, TaskError


def token_blocks(model: Checkpoint, text: str | Path, length: int | None = None) -> torch.Tensor:
    """The tokens of a text in blocks, shape ``(n, length)``; what is left at its end is left out.

    Args:
        model: a causal language model of transformers.
        text: a file of UTF-8.
        length: by default as many tokens as the model takes, at most 1,024, or all of a shorter text.

    Raises:
        CheckpointError: if it is no model of transformers with a tokenizer.
        TaskError: if the file can't be read, or has fewer than ``length`` tokens, or fewer than two.
    """
    architecture = model.architecture
    if architecture is None:
        raise CheckpointError(
            f"{model.ref} isn't a folder of transformers, whose tokenizer a text needs"
        )
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{text} can't be read as a text of UTF-8: {error}") from error
    tokens = architecture.tokens(content)
    length = length or min(architecture.context, 1024, len(tokens))
    if length < 2 or len(tokens) < length:
        raise TaskError(f"{text} has {len(tokens)} tokens; a block takes {max(length, 2)}")
    return tokens[: len(tokens) // length * length].view(-1, length)


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
