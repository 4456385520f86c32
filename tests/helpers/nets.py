"""Tiny models."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Net(nn.Module):
    """A tiny model with ties, a scalar, an integer buffer, a frozen parameter and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.hidden = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("ids", torch.arange(4))
        self.register_buffer("mask", torch.zeros(2), persistent=False)


def perturbed(module: nn.Module, seed: int, size: float = 0.1) -> nn.Module:
    twin = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dict.fromkeys(twin.parameters()):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return twin
