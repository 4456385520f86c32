from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    logging.getLogger("weightops").setLevel(logging.NOTSET)  # which --quiet raises for its process


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the attacks tried, where they ran."""
    if {"gadgets", "test_mutants"} <= sys.modules.keys():
        gadgets, mutants = sys.modules["gadgets"].GADGETS, sys.modules["test_mutants"]
        kinds = [*mutants.FORMS.values(), *mutants.INSIDE.values()]
        damaged = sum(count for count, *_ in kinds)
        terminalreporter.write_line(
            f"attacks: {len(gadgets)} gadgets in 4 containers, {damaged:,} damaged files of {len(kinds)} kinds"
        )


class Net(nn.Module):
    """A tiny model with all that is awkward: tied weights, a scalar, an integer buffer, a frozen parameter, batch statistics."""

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


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def tuned(net: nn.Module) -> nn.Module:
    return perturbed(net, 1)


@pytest.fixture
def saved(net: nn.Module, tuned: nn.Module, tmp_path: Path) -> tuple[Path, Path]:
    from weightops import open_checkpoint

    return open_checkpoint(net).save(tmp_path / "pre.safetensors"), open_checkpoint(tuned).save(
        tmp_path / "ft.safetensors"
    )
