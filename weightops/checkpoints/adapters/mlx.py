"""Open the adapters of mlx-lm: LoRA with both factors transposed, and a scale in place of alpha.

The change of a layer is ``scale * (lora_a @ lora_b).T``, with ``lora_a`` of shape ``(in, rank)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightops.algebra.source import Source, Spec
from weightops.checkpoints.adapters.adapter import PREFIX
from weightops.checkpoints.adapters.lora import LoraSource
from weightops.checkpoints.conversion import TensorMapping
from weightops.checkpoints.renamed import Renamed
from weightops.errors import CheckpointError

WEIGHTS = "adapters.safetensors"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[ab])")
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings)")
_HINT = "`mlx_lm.fuse` merges it into its model"


def is_of_mlx(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration is of an adapter of mlx-lm."""
    return "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config)


def open_mlx(path: Path, config: Mapping[str, Any], stored: Source) -> LoraSource:
    """Open an adapter of mlx-lm.

    Args:
        path: its configuration.
        config: the content of the configuration.
        stored: its tensors.

    Raises:
        CheckpointError: naming the kind, tensor or setting, if it is no plain LoRA.
    """
    kind, settings = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind != "lora":
        raise CheckpointError(
            f"{path.parent} holds what mlx-lm trained as {kind!r}, which weightops can't apply",
            hint=_HINT,
        )
    settings = settings if isinstance(settings, Mapping) else {}
    rank, scale = settings.get("rank"), settings.get("scale")
    if type(rank) is not int or not isinstance(scale, (int, float)):
        raise CheckpointError(f"{path} states no rank and scale in lora_parameters", hint=_HINT)
    mapped: dict[str, TensorMapping] = {}
    specs: dict[str, Spec] = {}
    for name, spec in stored.specs.items():
        found = _FACTOR.fullmatch(name)
        if found is None or len(spec.shape) != 2:
            raise CheckpointError(
                f"{path.parent / WEIGHTS} holds {name} of shape {spec.shape}, "
                "which is no factor of a plain LoRA",
                hint=_HINT,
            )
        end = f"lora_{found['which'].upper()}.weight"
        if _EMBEDDING.fullmatch(found["module"]):
            end = f"lora_embedding_{found['which'].upper()}"
        new = f"{PREFIX}{found['module']}.{end}"
        mapped[new] = TensorMapping("transpose", (name,))
        specs[new] = Spec(spec.shape[::-1], spec.dtype_name)
    as_peft = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "base_model_name_or_path": config.get("model"),
    }
    return LoraSource(as_peft, Renamed(stored, mapped, specs), str(path.parent))
