"""Write the adapter of peft that is nearest to a task vector."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from weightops.algebra.linear_form import LinearForm, tied_names
from weightops.checkpoints.adapters.adapter import CONFIG, PREFIX, WEIGHTS
from weightops.checkpoints.adapters.placing import keeps_transposed, looks_transposed
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.compressed import (
    float_tensor,
    nearest_pair,
    squared_norm,
    write_tensors,
)
from weightops.checkpoints.in_memory import InMemory
from weightops.checkpoints.libraries.transformers_kinds import task_type_of
from weightops.checkpoints.ties import ends_in_memory
from weightops.errors import OptionError
from weightops.hub.cards import CardFacts
from weightops.hub.fetch import repository_of
from weightops.support.json_files import write_json
from weightops.support.lazy import nn, torch
from weightops.support.text import first_few, portable

log = logging.getLogger("weightops")

_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that wrappers of modules put into names."""

_IN_EXPERTS = re.compile(r"\.(gate|gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
"""Linear layers that peft takes for the routed experts of a model that has such."""


_USAGE = """```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "{folder}")
```"""


class _Place(NamedTuple):
    """A weight that an adapter can have a part for.

    Attributes:
        name: the name of the weight where peft looks for it.
        kind: "linear", "transposed", "embedding", "convolution", "parameter" or, for stacked
            matrices of shape (in, out), "transposed parameter".
    """

    name: str
    kind: str

    @property
    def module(self) -> str:
        """The name of the module that has the weight."""
        return self.name.rpartition(".")[0]

    @property
    def is_parameter(self) -> bool:
        """Whether peft takes the weight for a parameter, and not by its module."""
        return self.kind.endswith("parameter")


class _Adapter:
    """The parts of an adapter that is being written, and the error that it makes."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.tensors: dict[str, torch.Tensor] = {}
        self.modules: list[str] = []
        self.parameters: list[str] = []
        self.whole: list[str] = []
        self.transposed = False
        self.total = self.lost = 0.0
        self.left_out: list[str] = []

    def add(self, place: _Place, delta: torch.Tensor) -> None:
        """Add the best pair of a weight; parameters of one module in the module's order."""
        halves = ("lora_embedding_A", "lora_embedding_B")
        if place.kind != "embedding":
            halves = ("lora_A.weight", "lora_B.weight")
        matrices = delta if place.is_parameter and delta.dim() == 3 else delta.flatten(1)[None]
        if place.kind not in ("linear", "convolution", "parameter"):
            matrices = matrices.mT
        pairs = [best_pair(matrix, self.rank) for matrix in matrices]
        self.lost += math.fsum(
            squared_norm(matrix - b @ a) for matrix, (a, b) in zip(matrices, pairs, strict=True)
        )
        # Of several matrices, A has the ranks of one together, B those of all.
        a, b = torch.cat([a for a, _ in pairs]), torch.stack([b for _, b in pairs], -1).flatten(1)
        if place.kind == "convolution":
            ones = [1] * (delta.dim() - 2)
            a, b = a.reshape(-1, *delta.shape[1:]), b.reshape(*b.shape, *ones)
        begin = f"{PREFIX}{place.module}."
        if place.is_parameter:
            self._wrap(begin)
            self.parameters.append(place.name)
        else:
            self.modules.append(place.module)
        self.transposed |= place.kind == "transposed"
        self.tensors |= {f"{begin}{h}": t for h, t in zip(halves, (a, b), strict=True)}

    def _wrap(self, begin: str) -> None:
        """Rename the parts of a module's parameters, since peft wraps a further one around them."""
        within = (f"{begin}lora_", f"{begin}base_layer.")
        self.tensors = {
            f"{begin}base_layer.{n.removeprefix(begin)}" if n.startswith(within) else n: tensor
            for n, tensor in self.tensors.items()
        }

    def leave_out(self, name: str, delta: torch.Tensor) -> None:
        """Count a change that peft has no part for."""
        self.lost += squared_norm(delta)
        self.left_out.append(name)

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
            **({"target_parameters": self.parameters} if self.parameters else {}),
            "fan_in_fan_out": self.transposed,
            "modules_to_save": list(dict.fromkeys(self.whole)) or None,
        }


def write_adapter(
    form: LinearForm, folder: Path, rank: int, *, base: Checkpoint | None, ref: str | None
) -> dict[str, float]:
    """Write the best LoRA of a rank for a delta, from the first singular triplets of each matrix.

    With ``delta = U diag(s) V^T``: ``B = U sqrt(diag(s))``, ``A = sqrt(diag(s)) V^T``, cut to
    the rank. The base's module shows which weights are of linear layers, embeddings and
    convolutions, or parameters such as packed experts and routers (peft's ``target_parameters``),
    and their names for peft; all else is left out with a warning. Embeddings that the model uses
    twice are saved whole, since peft has no LoRA that stays one for both ends.

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
    ends = ends_in_memory(form, base, changed)
    made.total = math.fsum(squares.values())
    places = _add_all(made, form, base, changed - ends.keys())
    for name, names in ends.items():
        assert base is not None
        weight = float_tensor(base.form, name)
        delta = float_tensor(form, name) if name in changed else torch.zeros_like(weight)
        made.add_whole(names, weight, delta, base.specs[name].dtype)
    if made.whole and not (made.modules or made.parameters):  # peft takes no adapter without a pair
        made.add(*_no_change(form, places, ends))
    if not made.tensors:
        raise OptionError("no matrix of the task vector changed that a LoRA of peft has a part for")
    if made.left_out:
        log.warning("left out, as peft has no LoRA for them: %s", first_few(made.left_out))
    error = {"relative_error": math.sqrt(made.lost / made.total), "left_out": len(made.left_out)}
    write_tensors(folder / WEIGHTS, made.tensors, {"lora": error})
    architecture = base.architecture if base else None
    of_base = architecture.config if architecture else {}
    write_json(folder / CONFIG, {**made.config(ref), "task_type": task_type_of(of_base)})
    return error


def facts_of_adapter(task_type: str | None) -> CardFacts:
    """Return the facts for the card of an adapter."""
    tag = "text-generation" if task_type == "CAUSAL_LM" else "other"
    return CardFacts("peft", tag, _USAGE)


def _add_all(
    made: _Adapter, form: LinearForm, base: Checkpoint | None, changed: Set[str]
) -> dict[str, _Place]:
    """Add what changed to an adapter, tensor by tensor of the module; return all places."""
    memory = InMemory(form, base.names_in_memory if base and base.skeleton else None)
    places = _places(memory.form, base)
    left, tied = set(changed), tied_names(memory.form)
    for name in dict.fromkeys((*places, *memory.specs)):
        if name in tied or changed.isdisjoint(memory.files_of(name)):
            continue
        left.difference_update(memory.files_of(name))
        delta = float_tensor(memory.form, name)
        if name in places:
            made.add(places[name], delta)
        else:
            made.leave_out(name, delta)
    for name in sorted(left):
        made.leave_out(name, float_tensor(form, name))
    return places


def best_pair(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of a rank whose product ``B A`` is nearest to a matrix."""
    left, right = nearest_pair(delta, rank)
    a, b = torch.zeros(rank, delta.shape[1]), torch.zeros(len(delta), rank)
    a[: len(right)], b[:, : len(right)] = right, left
    return a, b


def adapter_config(modules: list[str], rank: int, base: str | None) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` for pairs that aren't scaled."""
    repository, revision = (base and repository_of(base)) or (_local(base), None)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": repository,
        **({"revision": revision} if revision else {}),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _local(base: str | None) -> str | None:
    """Return the path of a base for peft: without the folders of this machine, see `portable`."""
    place = base and base.removeprefix("dequantized:")
    told: str | None = portable(place)
    if place and told and Path(place).exists() and not Path(told).exists():
        log.warning(
            "the adapter names its base %s, without its folder: peft's AutoPeftModel finds it "
            "only from there, PeftModel.from_pretrained(base, adapter) from anywhere",
            told,
        )
    return told


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
    if base is None or base.skeleton is None:
        matrices = [n for n, s in form.specs.items() if len(s.shape) == 2]
        return _guessed_places([n for n in matrices if n.endswith(".weight")], form)
    names = [n for n, _ in base.skeleton.named_parameters(remove_duplicate=False)]
    kinds = {name: _kind(name, base.skeleton) for name in names if name in form.specs}
    if "transposed" in kinds.values():  # peft takes no parameters beside them
        kinds = {n: None if kind and "parameter" in kind else kind for n, kind in kinds.items()}
    elif any(len(form.specs[n].shape) == 3 for n, kind in kinds.items() if kind != "convolution"):
        kinds |= {n: "parameter" for n, kind in kinds.items() if kind and _IN_EXPERTS.search(n)}
    return {name: _Place(name, kind) for name, kind in kinds.items() if kind}


def _kind(name: str, model: nn.Module) -> str | None:
    """Return the kind of a weight; None if peft has no LoRA for it."""
    place, _, last = name.rpartition(".")
    try:
        module: Any = model.get_submodule(place)
        parent = model.get_submodule(place.rpartition(".")[0])
        weight = getattr(module, last)
    except AttributeError:
        return None
    # The forward pass of torch's attention takes no notice of a LoRA on its projection.
    if isinstance(parent, nn.MultiheadAttention) or not isinstance(weight, nn.Parameter):
        return None
    if last == "weight" and isinstance(module, nn.Embedding):
        return "embedding"
    if last == "weight" and keeps_transposed(module):
        return "transposed"
    if last == "weight" and isinstance(module, nn.Linear):
        is_plain = type(module).forward is nn.Linear.forward  # others may return several tensors
        return "linear" if is_plain else "parameter"
    if last == "weight" and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "convolution" if module.groups == 1 else None
    is_leaf = place and not any(True for child in module.children() for _ in child.parameters())
    known = (
        nn.MultiheadAttention,
        nn.modules.conv._ConvNd,
        nn.RNNBase,
        nn.utils.parametrize.ParametrizationList,
    )
    if not is_leaf or isinstance(module, known) or weight.dim() not in (2, 3) or len(weight) == 1:
        return None
    stacked_transposed = weight.dim() == 3 and getattr(module, "is_transposed", False)
    return "transposed parameter" if stacked_transposed else "parameter"


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
