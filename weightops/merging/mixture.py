"""Mixtures of experts whose experts are the feed-forward layers of dense models."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.names import layer_of
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.conversion import TensorMapping
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.libraries.transformers import TransformersArchitecture
from weightops.checkpoints.renamed import renamed
from weightops.errors import RecipeError
from weightops.merging.layers import Stack
from weightops.merging.merge import merge
from weightops.merging.mixture_choice import Mixture
from weightops.merging.routers import router_rows
from weightops.support.lazy import torch
from weightops.support.registry import unknown
from weightops.support.text import first_few

log = logging.getLogger("weightops")

_FEED_FORWARD = re.compile(r"(model\.layers\.\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")


class Family(NamedTuple):
    """A class of mixtures, and the dense models that can be its experts.

    Attributes:
        title: what mergekit calls it.
        kind: the class in transformers.
        dense: the model types of dense models.
        block: the name of the part of a layer that has the experts.
        parts: the names of an expert's matrices, where they aren't the dense model's.
        counted: the setting that is the number of experts.
    """

    title: str
    kind: str
    dense: tuple[str, ...]
    block: str
    parts: Mapping[str, str]
    counted: str


FAMILIES = {
    "mixtral": Family(
        "Mixtral",
        "MixtralForCausalLM",
        ("llama", "mistral"),
        "block_sparse_moe",
        {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        "num_local_experts",
    ),
    "qwen2_moe": Family(
        "Qwen MoE", "Qwen2MoeForCausalLM", ("qwen2", "llama", "mistral"), "mlp", {}, "num_experts"
    ),
    "qwen3_moe": Family("Qwen3 MoE", "Qwen3MoeForCausalLM", ("qwen3",), "mlp", {}, "num_experts"),
}
"""Model type -> family, as transformers and the Hub name their tensors."""
_SHARED = "qwen2_moe"
"""The family that has a shared expert, and always one."""


def make_mixture(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    mixture: Mixture,
    model_type: str,
    *,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
) -> Checkpoint:
    """Return a mixture of experts; all but its feed-forward layers and routers are the base's.

    Args:
        base: the dense model.
        experts: the models of the experts in the names of the base, the shared one last.
        mixture: the rest of what the recipe says.
        model_type: the model type of the mixture, see `family_of`.
        seed: the seed of random routers.
        dtype: the name of the dtype of the output; by default the base's.
        device: where to run the base on prompts.

    Raises:
        RecipeError: if the mixture's class has no place for a tensor of the base.
    """
    architecture = base.architecture
    if not isinstance(architecture, TransformersArchitecture):
        raise RecipeError(f"{base.ref} isn't a language model of transformers")
    family = FAMILIES[model_type]
    names = [n for n in base.specs if _FEED_FORWARD.fullmatch(n)]
    depth = 1 + max((layer.number for n in names if (layer := layer_of(n))), default=-1)
    if not depth:
        raise RecipeError(f"{base.ref} has no feed-forward layer")
    width = int(architecture.config["hidden_size"])
    rows = router_rows(base, mixture, (depth, width), seed=seed, device=device)
    forms = [base.form.part([n for n in base.specs if n not in names])]
    for i, (expert, entry) in enumerate(zip(experts, mixture.all_experts, strict=True)):
        place = "shared_expert" if i == len(mixture.experts) else f"experts.{i}"
        forms.append(_expert(expert, names, family, place, entry.residual_scale))
    own = _own_tensors(family, mixture, rows, base)
    forms.append(LinearForm.of(MemorySource(own, f"routers by {mixture.gate_mode}")))
    settings = _settings(family, mixture, architecture.config)
    result = Checkpoint(
        LinearForm.of(Stack(forms)), architecture.as_class(model_type, family.kind, settings)
    )
    _check_place(result, base, family)
    return result.to(dtype or base.specs[names[0]].dtype_name)


def layers_alone(model: Checkpoint) -> Checkpoint:
    """Return weights without embeddings and head, which may be of another vocabulary."""
    if model.form.space != "weights":
        return model
    names = [name for name in model.specs if layer_of(name) is not None]
    return Checkpoint(model.form.part(names), model.architecture)


def family_of(mixture: Mixture, models: Iterable[Checkpoint]) -> str:
    """Return the model type of the mixture that models can become.

    Llama and Mistral become Mixtral, or, with a shared expert, Qwen's mixture; Qwen 2 with one
    becomes that, too, and Qwen 3 without one Qwen 3's.

    Raises:
        RecipeError: if there is none.
        UnknownNameError: for an architecture that isn't known.
    """
    types = dict.fromkeys(
        str(model.architecture.config.get("model_type")) if model.architecture else "unknown"
        for model in models
    )
    given = mixture.architecture or ""
    asked = {
        name
        for name, family in FAMILIES.items()
        if name == given or family.title.lower().startswith(given.lower())
    }
    if not asked:
        raise unknown("architecture of mixtures", given, FAMILIES)
    fits = [
        name
        for name, family in FAMILIES.items()
        if len(types) == 1
        and set(types) <= set(family.dense)
        and (name == _SHARED) == (mixture.shared is not None)
        and name in asked
    ]
    if not fits:
        hint = "llama, mistral and qwen3 go without shared_experts, qwen2 with one"
        raise RecipeError(
            f"models of the types {first_few(map(repr, types))} with "
            f"{'one shared expert' if mixture.shared else 'no shared expert'} become no mixture"
            f"{f' of {given}' if given else ''}",
            hint=hint,
        )
    return fits[0]


def _expert(
    model: Checkpoint, names: Iterable[str], family: Family, place: str, scale: float
) -> LinearForm:
    """Return the feed-forward layers of a model under the names that they have in the mixture."""
    if scale != 1.0:
        scales = {"*.mlp.down_proj.weight": scale, "*": 1.0}
        model = merge([model], "passthrough", scale=scales)
    new = {}
    for name in names:
        found = _FEED_FORWARD.fullmatch(name)
        assert found is not None
        layer, part = found.groups()
        new[f"{layer}.{family.block}.{place}.{family.parts.get(part, part)}.weight"] = name
    return renamed(model.form, {n: TensorMapping("copy", (old,)) for n, old in new.items()})


def _own_tensors(
    family: Family, mixture: Mixture, rows: torch.Tensor, base: Checkpoint
) -> dict[str, torch.Tensor]:
    """Return the routers of all layers, and biases of 0 where Qwen has some and the base not."""
    tensors, count = {}, len(mixture.experts)
    for i, layer in enumerate(rows):
        tensors[f"model.layers.{i}.{family.block}.gate.weight"] = layer[:count].contiguous()
        if mixture.shared:
            gate = f"model.layers.{i}.{family.block}.shared_expert_gate.weight"
            tensors[gate] = layer[count:].contiguous()
            for part in ("q_proj", "k_proj", "v_proj"):
                place = f"model.layers.{i}.self_attn.{part}"
                if f"{place}.bias" not in base.specs:
                    height = base.specs[f"{place}.weight"].shape[0]
                    tensors[f"{place}.bias"] = torch.zeros(height)
    return tensors


def _settings(family: Family, mixture: Mixture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the mixture that the dense models don't have."""
    settings: dict[str, Any] = {
        family.counted: len(mixture.experts),
        "num_experts_per_tok": mixture.experts_per_token,
        "sliding_window": None,
    }
    if family.block == "mlp":
        size = config["intermediate_size"]
        settings |= {
            "moe_intermediate_size": size,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
            "use_sliding_window": False,
        }
        settings |= {"shared_expert_intermediate_size": size} if mixture.shared else {}
    return settings


def _check_place(result: Checkpoint, base: Checkpoint, family: Family) -> None:
    """Refuse tensors that the mixture's class has no place for, such as biases.

    Raises:
        RecipeError: naming the first of them.
    """
    names = result.names_in_memory
    if names is None:
        return
    used = {old for mapping in names.loading(result.specs).values() for old in mapping.names}
    lost = [name for name in result.specs if name not in used and not names.is_ignored(name)]
    if lost:
        raise RecipeError(
            f"{family.kind} has no place for tensors of {base.ref}: {first_few(lost)}"
        )
