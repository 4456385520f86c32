"""Averages and interpolations of models in memory."""

from __future__ import annotations

import pytest
from helpers.closeness import close
from helpers.nets import perturbed
from torch import nn

from weightops import average, interpolate
from weightops.errors import OptionError


def test_an_average_is_of_the_kind_of_its_models(net: nn.Module) -> None:
    models = [perturbed(net, i) for i in range(3)]
    mean = average(models)
    for name, tensor in mean.state_dict().items():
        if tensor.is_floating_point():
            exact = sum(m.state_dict()[name].double() for m in models) / 3
            assert close(tensor, exact, 2.0)
    assert mean.out.weight is mean.embed.weight
    with pytest.raises(OptionError, match="at least one model"):
        average([])
    with pytest.raises(OptionError, match="as many weights"):
        average(models, [1.0])


def test_interpolation(net: nn.Module, tuned: nn.Module) -> None:
    middle = interpolate(net, tuned, 0.5)
    assert type(middle) is type(net)
    expected = (net.scale.double() + tuned.scale.double()) / 2
    assert close(middle.scale.detach(), expected.detach())
