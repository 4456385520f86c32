"""Tensors that the processes of a node hold in shards (FSDP2), and how they are gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from weightops.errors import OptionError
from weightops.support.lazy import nn, torch


def shard_(module: nn.Module, group: Any) -> None:
    """Shard a module's parameters over the processes of a group, in place.

    Each block is gathered when it is used.

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
        raise OptionError(
            f"the model can't be sharded: {reason}", hint="train it without fsdp=True"
        ) from error


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost lists in a module: its layers."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from (member for member in child if any(True for _ in member.parameters()))
        else:
            yield from _blocks(child)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on CPU, gathered if it is sharded; all processes of its node must call this.

    torch.distributed.checkpoint would gather to the first process of the job, and that process may
    belong to another node.
    """
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def local_part(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return a gathered tensor in the form of ``own``: on its device, and sharded if ``own`` is.

    Nothing is sent between processes.
    """
    tensor = tensor.to(own.device)
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)


class TrainingState:
    """The gathered state of a module and its optimizer, in one form for sharded modules and others.

    Args:
        module: the module that learns.
        optimizer: the optimizer of the module's parameters.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module, self._optimizer = module, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the state on CPU. All processes of a node must call this."""
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
        """Load a state that `state_dict` returned."""
        own = self._module.state_dict()
        self._module.load_state_dict(
            {name: local_part(tensor, own[name]) for name, tensor in state_dict["module"].items()}
        )
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
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
