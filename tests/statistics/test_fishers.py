"""The diagonal Fisher information of a small module, against gradients taken one by one."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from weightops.statistics.fishers import diagonal_fisher


class Net(nn.Module):
    """A map that is used twice, a frozen one, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.twice(self.twice(inputs).tanh() * self.frozen))
        return logits


def test_fisher_is_the_expected_square_of_the_gradients() -> None:
    net, inputs, truth = Net(), torch.randn(4, 1, 5), torch.zeros(1, dtype=torch.long)
    examples = [(lambda x=x: net(x), truth) for x in inputs]
    found = diagonal_fisher(net, examples, labels="model", seed=0)

    names = ["twice.weight", "twice.bias", "head.weight", "head.bias"]
    wanted = {name: torch.zeros_like(net.get_parameter(name)) for name in names}
    for x in inputs:
        for y in range(3):
            log = net(x).log_softmax(-1)[0, y]
            gradients = torch.autograd.grad(log, [net.get_parameter(n) for n in names])
            for name, gradient in zip(names, gradients, strict=True):
                wanted[name] += log.exp().detach() * gradient.square() / len(inputs)
    assert list(found) == names
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_fisher_holds_the_gradient_of_one_parameter_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(5)])
    held: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    add = torch.Tensor.addcmul_

    def watched(total: torch.Tensor, gradient: torch.Tensor, *args: object, **kwargs: object):
        nonlocal most
        held.add(gradient)
        most = max(most, len(held))
        return add(total, gradient, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "addcmul_", watched)
    truth = torch.zeros(1, dtype=torch.long)
    diagonal_fisher(net, [(lambda: net(torch.randn(1, 6)), truth)], labels="true", seed=0)
    assert most == 1
