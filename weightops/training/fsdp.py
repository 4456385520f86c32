"""Tensors of which each process of a node holds a part (FSDP2), and their whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from weightops.errors import OptionError


def shard_(module: nn.Module, group: Any) -> None:
    """Leave each process of a group its part of a module's parameters; block by block they are gathered when they are used.

    Raises:
        OptionError: if torch can't: a parameter is a single number or empty, or shared by blocks.
    """
    mesh = DeviceMesh.from_group(group, next(module.parameters()).device.type)
    try:
        for block in dict.fromkeys(_blocks(module)):
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(f"the model can't be sharded: {reason}; train it without fsdp") from error


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists in a module: its layers."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from (member for member in child if any(True for _ in member.parameters()))
        else:
            yield from _blocks(child)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on CPU; a sharded one is put together, which all processes of its node must do at once.

    torch.distributed.checkpoint would gather to the first process of the job, which is another node's.
    """
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def local_part(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A whole tensor as ``own`` has it: on its device, and this process's part if that is sharded. Nothing is sent."""
    tensor = tensor.to(own.device)
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)


class Learning:
    """The state of a module and its optimizer, whole, in the same form for sharded and others.

    Args:
        module: what learns.
        optimizer: of its parameters.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module, self._optimizer = module, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Everything on CPU. All processes of a node must ask for it at once."""
        optimizer = self._optimizer.state_dict()
        moments = {
            index: {
                key: gather(value) if torch.is_tensor(value) else value
                for key, value in moment.items()
            }
            for index, moment in optimizer["state"].items()
        }
        module = {name: gather(tensor) for name, tensor in self._module.state_dict().items()}
        return {"module": module, "optimizer": {**optimizer, "state": moments}}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """What `state_dict` gave, or its parts."""
        own = self._module.state_dict()
        self._module.load_state_dict(
            {name: local_part(tensor, own[name]) for name, tensor in state_dict["module"].items()}
        )
        parameters = [
            p for parameter_group in self._optimizer.param_groups for p in parameter_group["params"]
        ]
        moments = {
            index: {
                key: local_part(value, parameters[index])
                if key != "step" and torch.is_tensor(value)
                else value
                for key, value in moment.items()
            }
            for index, moment in state_dict["optimizer"]["state"].items()
        }
        self._optimizer.load_state_dict({**state_dict["optimizer"], "state": moments})
