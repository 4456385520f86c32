"""Perplexity of causal language models, such as those of transformers."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from weightops.algebra.precision import Precision, computed_in, pick_precision
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.config_checks import library_errors
from weightops.errors import CheckpointError, NonfiniteError, TaskError
from weightops.evaluation.image_model import check_finite
from weightops.support.lazy import F, nn, torch, without_gradients
from weightops.support.progress import progress
from weightops.tasks.texts import read_text


def token_blocks(model: Checkpoint, text: str | Path, length: int | None = None) -> torch.Tensor:
    """Return the tokens of a text in full blocks, shape ``(n, length)``.

    Args:
        model: a causal language model of transformers.
        text: the path of a text file in UTF-8.
        length: tokens of a block; by default as many as the model takes, at most 1,024, or all
            tokens of a shorter text.

    Raises:
        CheckpointError: if the model isn't a language model of transformers with a tokenizer.
        TaskError: if the file can't be read, or is shorter than a block, or than two tokens.
    """
    architecture = language_architecture(model)
    tokens = architecture.tokens(read_text(text))
    length = length or min(architecture.context, 1024, len(tokens))
    if length < 2 or len(tokens) < length:
        raise TaskError(f"{text} has {len(tokens)} tokens; a block takes {max(length, 2)}")
    return in_blocks(tokens, length)


def in_blocks(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Return tokens in full blocks, shape ``(n, length)``, without those after the last one."""
    return tokens[: len(tokens) // length * length].view(-1, length)


def language_architecture(model: Checkpoint) -> Architecture:
    """Return the architecture of a language model.

    Raises:
        CheckpointError: if it isn't a model of transformers.
    """
    if model.architecture is None:
        raise CheckpointError(
            f"{model.ref} isn't a folder of transformers, whose tokenizer a text needs"
        )
    return model.architecture


@without_gradients
def check_causal(module: nn.Module, ref: str) -> None:
    """Refuse a model that reads the tokens after the one that it predicts, or no tokens alone.

    Raises:
        CheckpointError: if the logits of a token depend on those after it.
    """
    device = next(module.parameters()).device
    tokens = torch.zeros((2, 4), dtype=torch.long, device=device)
    tokens[1, -1] = 1
    was_training = module.training
    module.eval()
    with library_errors(f"{ref} can't be run on tokens alone, as a causal language model is"):
        first, second = module(input_ids=tokens).logits[:, :-1].float()
    module.train(was_training)
    rounding = max(1e-5, 4 * torch.finfo(next(module.parameters()).dtype).eps)
    difference, largest = (float(x.abs().max()) for x in (first - second, first))
    if difference > rounding * largest:  # NaN isn't, and is told where scores are
        raise CheckpointError(
            f"{ref} reads the tokens that it predicts: it isn't a causal language model"
        )


def token_loss(module: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of the tokens after the first, in nats.

    Args:
        module: a module that takes ``input_ids`` and returns an object with ``logits`` of shape
            ``(n, length, vocabulary)``.
        tokens: shape ``(n, length)``.
        labels: the tokens again, as for losses whose labels differ from the inputs.
    """
    return _loss(module(input_ids=tokens).logits.float(), labels)


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@without_gradients
def perplexity(
    module: nn.Module, tokens: torch.Tensor, *, batch_size: int = 8, precision: Precision = "auto"
) -> float:
    """Return the perplexity ``exp(-mean_t log p(x_t | x_1, ..., x_{t-1}))`` of blocks of tokens.

    Args:
        module: a causal language model of transformers; its mode is restored.
        tokens: shape ``(n, length)``. All tokens of a block count but the first, and each block is
            read without those before it.
        batch_size: blocks at a time.
        precision: float32, bfloat16, or auto: bfloat16 where the device computes in it.

    Returns:
        1 for a perfect model, the size of the vocabulary for uniform guesses.

    Raises:
        NonfiniteError: if logits are NaN or infinite, or the perplexity is too large for a number.
    """
    was_training = module.training
    module.eval()
    device = next(module.parameters()).device
    used, total, bad = pick_precision(precision, device), 0.0, []
    with progress(len(tokens), "perplexity", "blocks", work=1) as bar:
        for batch in tokens.split(batch_size):  # type: ignore[no-untyped-call]
            batch = batch.to(device)
            with computed_in(used, device):
                logits = module(input_ids=batch).logits.float()
            total += _loss(logits, batch).item() * len(batch)
            bad.append(~logits.isfinite().flatten(1).all(1).cpu())
            bar.update(len(batch))
    module.train(was_training)
    check_finite(torch.cat(bad), "the logits of the text")
    mean = total / len(tokens)
    if mean > math.log(sys.float_info.max):
        raise NonfiniteError(
            f"the perplexity is exp({mean:g}), which is too large for a number",
            hint="the weights are damaged, or extrapolated too far: `weightops inspect` shows them",
        )
    return math.exp(mean)
