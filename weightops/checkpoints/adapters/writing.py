"""Write the adapter of peft that is nearest to a task vector."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.checkpoints.adapters.adapter import CONFIG, PREFIX, WEIGHTS
from weightops.checkpoints.adapters.placing import keeps_transposed, looks_transposed
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.compressed import float_tensor, squared_norm, write_tensors
from weightops.checkpoints.ties import ends_in_memory
from weightops.errors import OptionError
from weightops.support.json_files import write_json
from weightops.support.text import first_few

log = logging.getLogger("weightops")

_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that wrappers of modules put into names."""


class _Place(NamedTuple):
    """The module of a matrix, where peft looks for it.

    Attributes:
        name: the name of the weight in memory.
        kind: "linear", "transposed" or "embedding".
    """

    name: str
    kind: str


class _Adapter:
    """The parts of an adapter that is being written, and the error that it makes."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.tensors: dict[str, torch.Tensor] = {}
        self.modules: list[str] = []
        self.whole: list[str] = []
        self.transposed = False
        self.total = self.lost = 0.0
        self.left_out = 0

    def add(self, place: _Place, delta: torch.Tensor) -> None:
        """Add the best pair of a matrix."""
        halves = ("lora_embedding_A", "lora_embedding_B")
        if place.kind != "embedding":
            halves = ("lora_A.weight", "lora_B.weight")
        matrix = delta if place.kind == "linear" else delta.T
        a, b = best_pair(matrix, self.rank)
        module = place.name.removesuffix(".weight")
        self.lost += squared_norm(matrix - b @ a)
        self.modules.append(module)
        self.transposed |= place.kind == "transposed"
        self.tensors |= {f"{PREFIX}{module}.{h}": t for h, t in zip(halves, (a, b), strict=True)}

    def add_whole(
        self, names: list[str], base: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype
    ) -> None:
        """Add a weight as it is after the change, under all its names."""
        weight = (base + delta).to(dtype)
        self.lost += squared_norm(weight.float() - base - delta)
        self.whole += [name.rpartition(".")[0] for name in names]
        self.tensors |= {f"{PREFIX}{name}": weight.clone() for name in names}

    def config(self, base: str | None) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``."""
        return {
            **adapter_config(self.modules, self.rank, base),
            "fan_in_fan_out": self.transposed,
            "modules_to_save": list(dict.fromkeys(self.whole)) or None,
        }


def write_adapter(
    form: LinearForm, folder: Path, rank: int, *, base: Checkpoint | None, ref: str | None
) -> dict[str, float]:
    """Write the best LoRA of a rank for a delta, from the first singular triplets of each matrix.

    With ``delta = U diag(s) V^T``: ``B = U sqrt(diag(s))``, ``A = sqrt(diag(s)) V^T``, cut to
    the rank. The base's module shows which weights are of linear and embedding layers, and their
    names for peft; all else is left out. Embeddings that the model uses twice are saved whole,
    since peft has no LoRA that stays one for both ends.

    Args:
        form: the delta.
        folder: the folder to write to.
        rank: the rank of the adapter.
        base: the weights that the delta was taken from, if they are known.
        ref: the name of the base for peft.

    Returns:
        ``relative_error``: the norm of the part of the delta that is lost over the norm of the
        delta; ``left_out``: how many changed tensors have no part in the adapter.

    Raises:
        OptionError: if the rank is below 1, or no matrix changed.
    """
    if rank < 1:
        raise OptionError(f"a rank is at least 1, not {rank}")
    tied, made = tied_names(form), _Adapter(rank)
    squares = {name: squared_norm(float_tensor(form, name)) for name in form.specs.keys() - tied}
    changed = {name for name, square in squares.items() if square}
    places, ends = _places(form, base), ends_in_memory(form, base, changed)
    made.total = math.fsum(squares.values())
    for name in (name for name in form.specs if name in changed and name not in ends):
        if name in places:
            made.add(places[name], float_tensor(form, name))
        else:
            made.lost, made.left_out = made.lost + squares[name], made.left_out + 1
    for name, names in ends.items():
        assert base is not None
        weight = float_tensor(base.form, name)
        delta = float_tensor(form, name) if name in changed else torch.zeros_like(weight)
        made.add_whole(names, weight, delta, base.specs[name].dtype)
    if made.whole and not made.modules:  # peft takes no adapter without a pair
        made.add(*_no_change(form, places, ends))
    if not made.tensors:
        raise OptionError("no matrix of the task vector changed that a LoRA of peft has a part for")
    error = {"relative_error": math.sqrt(made.lost / made.total), "left_out": made.left_out}
    write_tensors(folder / WEIGHTS, made.tensors, {"lora": error})
    write_json(folder / CONFIG, made.config(ref))
    return error


def best_pair(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of a rank whose product ``B A`` is nearest to a matrix."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    count = min(rank, len(s))
    root = s[:count].sqrt()
    a, b = torch.zeros(rank, vh.shape[1]), torch.zeros(u.shape[0], rank)
    a[:count], b[:, :count] = root[:, None] * vh[:count], u[:, :count] * root
    return a, b


def adapter_config(modules: list[str], rank: int, base: str | None) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` for pairs that aren't scaled."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _no_change(
    form: LinearForm, places: Mapping[str, _Place], ends: Mapping[str, Any]
) -> tuple[_Place, torch.Tensor]:
    """Return a linear layer of the model that didn't change, and its delta.

    Raises:
        OptionError: if the model has none.
    """
    for name, place in places.items():
        if place.kind == "linear" and name not in ends:
            return place, torch.zeros(form.specs[name].shape)
    raise OptionError("only tied embeddings changed, and the model has no layer for a LoRA")


def _places(form: LinearForm, base: Checkpoint | None) -> dict[str, _Place]:
    """Return name -> place for the weights that a LoRA can have a part for."""
    matrices = [n for n, s in form.specs.items() if len(s.shape) == 2 and n.endswith(".weight")]
    if base is None or base.skeleton is None:
        return _guessed_places(matrices, form)
    places = {}
    for name in matrices:
        in_memory = base.memory.name_of(name)
        kind = _kind(in_memory or "", base.skeleton)
        if in_memory and kind:
            places[name] = _Place(in_memory, kind)
    return places


def _kind(name: str, model: nn.Module) -> str | None:
    """Return the kind of the module of a weight; None if peft has no LoRA for it."""
    try:
        module = model.get_submodule(name.rpartition(".")[0])
        parent = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    except AttributeError:
        return None
    if isinstance(module, nn.Embedding):
        return "embedding"
    if keeps_transposed(module):
        return "transposed"
    # The forward pass of torch's attention takes no notice of a LoRA on its projection.
    inside = isinstance(parent, nn.MultiheadAttention)
    return "linear" if isinstance(module, nn.Linear) and not inside else None


def _guessed_places(matrices: Iterable[str], form: LinearForm) -> dict[str, _Place]:
    """Return places by names and shapes alone, for weights of a model that isn't known."""
    places = {}
    wrapped = all(name.startswith("module.") for name in form.specs)
    for name in matrices:
        bare = name.removeprefix("module.") if wrapped else name
        bare = ".".join(part for part in bare.split(".") if part not in _INSIDE)
        kind = "transposed" if looks_transposed(name, form.specs) else "linear"
        is_embedding = "embed" in bare.removesuffix(".weight").rpartition(".")[2]
        places[name] = _Place(bare, "embedding" if is_embedding else kind)
    if places:
        log.warning(
            "the base doesn't say of what model it is: %s are taken for embeddings, and all other "
            "matrices for linear layers",
            first_few([n for n, p in places.items() if p.kind == "embedding"]) or "none",
        )
    return places
