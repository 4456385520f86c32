"""The diagonal Fisher information of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

from weightops.support.lazy import nn, torch

Labels = Literal["model", "true"]
"""Where the labels of a Fisher information come from: the model's predictions, or the data."""

EXACT = 16
"""The largest number of classes over which the expectation is taken exactly."""


def diagonal_fisher(
    module: nn.Module,
    examples: Iterable[tuple[Callable[[], torch.Tensor], torch.Tensor]],
    *,
    labels: Labels,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return the mean of the squared gradients of log-likelihoods, for each parameter.

        F = mean_x E_(y ~ p(y|x)) (d log p(y|x) / d theta)^2

    The expectation over y is exact up to 16 classes, and one draw for each x beyond, and for texts,
    whose log-likelihood is the sum over tokens. With ``labels="true"``, y is the data's label (the
    empirical Fisher).

    Args:
        module: the module whose parameters are meant.
        examples: for each example, a function that returns logits of shape ``(1, classes)`` or
            ``(tokens, vocabulary)``, and its true classes, shape ``(1,)`` or ``(tokens,)``.
        labels: where y comes from.
        seed: the seed of the draws.

    Returns:
        name -> float32 (float64 for float64) tensor of the parameter's shape, for the parameters
        that the logits depend on and that aren't frozen.
    """
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    squares, count = _Squares(parameters), 0
    generator = torch.Generator().manual_seed(seed)
    with squares.added():
        for logits_of, truth in examples:
            logs = logits_of().log_softmax(-1)
            for classes, squares.weight in _classes(logs.detach(), truth, labels, generator):
                likelihood = logs.gather(-1, classes[:, None]).sum()
                likelihood.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            count += 1
    totals = squares.totals
    return {name: totals[name].div_(count).cpu() for name in parameters if name in totals}


class _Squares:
    """Sums of the squares of gradients, each times a weight.

    Squares are added as backward finds the gradients, so that few are held at a time.

    Args:
        parameters: the parameters that have gradients.

    Attributes:
        weight: the weight of the squares that are added next.
        totals: name -> sum, for the parameters that have had a gradient.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters, self.weight = parameters, 1.0
        self.totals: dict[str, torch.Tensor] = {}

    @contextmanager
    def added(self) -> Iterator[None]:
        """Add the squares of all gradients that are found meanwhile, and free these."""
        with ExitStack() as hooks:
            for name, parameter in self._parameters.items():
                added = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(self._add, name)
                )
                hooks.callback(added.remove)
            yield

    def _add(self, name: str, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if name not in self.totals:
            self.totals[name] = torch.zeros_like(gradient)
        self.totals[name].addcmul_(gradient, gradient, value=self.weight)


def _classes(
    logs: torch.Tensor, truth: torch.Tensor, labels: Labels, generator: torch.Generator
) -> list[tuple[torch.Tensor, float]]:
    """Return the labels to take gradients of, shape ``(n,)`` each, and their weights."""
    if labels == "true":
        return [(truth.to(logs.device), 1.0)]
    probabilities = logs.exp()
    if len(logs) == 1 and logs.shape[1] <= EXACT:
        places = torch.arange(logs.shape[1], device=logs.device)
        return [(y[None], float(p)) for y, p in zip(places, probabilities[0], strict=True)]
    drawn = torch.multinomial(probabilities.cpu().double(), 1, generator=generator)[:, 0]
    return [(drawn.to(logs.device), 1.0)]
