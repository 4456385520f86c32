"""The rows of the routers of a mixture of experts, from prompts or by chance."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from weightops.algebra.devices import pick_device
from weightops.algebra.scratch import Scratch
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.errors import RecipeError
from weightops.merging.mixture_choice import Mixture
from weightops.merging.token_rows import rows_reader
from weightops.merging.tokenizers import vocabulary_tensors
from weightops.support.lazy import F, torch
from weightops.support.text import first_few

log = logging.getLogger("weightops")

_MOST_CONDITION = 5.0
"""The condition of a router's rows from which on they are too alike, as in mergekit."""


def router_rows(
    base: Checkpoint, mixture: Mixture, shape: tuple[int, int], *, seed: int, device: str
) -> torch.Tensor:
    """Return the row of each expert in the router of each layer, in float32.

        row = unit(f(positive prompts) - f(negative prompts))

    For "hidden", f is the mean of the last token's state before the layer, in a run of the base
    in bf16, as mergekit 0.1.5 has it; for "cheap_embed" the direction of the sum of all tokens'
    embeddings. "random" is normal, "uniform_random" as wide as a new linear layer's weights.

    Args:
        base: the model that reads the prompts.
        mixture: the experts, whose prompts are used.
        shape: the number of layers, and the width of a state.
        seed: the seed of random rows.
        device: where to run the base.

    Returns:
        shape ``(layers, experts, width)``, the shared expert last.

    Raises:
        RecipeError: if a prompt has no token.
        CheckpointError: if the base isn't a language model with a tokenizer.
    """
    layers, width = shape
    size = (layers, len(mixture.all_experts), width)
    generator = torch.Generator().manual_seed(seed)
    if mixture.gate_mode == "random":
        return torch.randn(size, generator=generator)
    if mixture.gate_mode == "uniform_random":
        return (2 * torch.rand(size, generator=generator) - 1) * math.sqrt(1 / width)
    if mixture.gate_mode == "cheap_embed":
        states = _embedding_directions(base)
    else:
        states = _mean_states(base, device)
    rows = []
    for expert in mixture.all_experts:
        row = states(expert.positive_prompts).expand(layers, width)
        if expert.negative_prompts:
            row = row - states(expert.negative_prompts)
        rows.append(_unit(row))
    stacked = torch.stack(rows, dim=1)
    _warn_of_likeness(stacked)
    return stacked


def _prompt_tokens(base: Checkpoint, prompts: Sequence[str]) -> list[torch.Tensor]:
    tokens = base.known_architecture().prompt_tokens(prompts)
    for prompt, ids in zip(prompts, tokens, strict=True):
        if not len(ids):
            raise RecipeError(f"the prompt {prompt!r:.80} has no token")
    return tokens


def _embedding_directions(base: Checkpoint) -> Callable[[Sequence[str]], torch.Tensor]:
    name = next(n for n in vocabulary_tensors(base.specs) if "embed" in n)
    rows = rows_reader(base.form, name, Scratch())

    def direction(prompts: Sequence[str]) -> torch.Tensor:
        tokens = torch.cat(_prompt_tokens(base, prompts))
        return _unit(rows(tokens).float().sum(0, keepdim=True))

    return direction


def _mean_states(base: Checkpoint, device: str) -> Callable[[Sequence[str]], torch.Tensor]:
    place = pick_device(device)
    with _default_dtype(torch.bfloat16):
        module = base.model().to(place)

    @torch.no_grad()
    def mean(prompts: Sequence[str]) -> torch.Tensor:
        means = []
        for ids in _prompt_tokens(base, prompts):
            run = module(input_ids=ids[None].to(place), output_hidden_states=True)
            last = torch.stack([states[0, -1] for states in run.hidden_states[:-1]])
            means.append(last.float().cpu())
        return torch.stack(means).mean(0)

    return mean


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build modules in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows, dim=-1, eps=1e-8)


def _warn_of_likeness(rows: torch.Tensor) -> None:
    """Warn of layers whose experts' rows are nearly one."""
    alike = [i for i, layer in enumerate(rows) if torch.linalg.cond(layer) > _MOST_CONDITION]
    if alike:
        log.warning(
            "the prompts are so alike in the layers %s that some experts will be used little",
            first_few(list(map(str, alike)), 9),
        )
