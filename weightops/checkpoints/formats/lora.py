r"""LoRA adapters in peft's folders, as deltas :math:`s\,BA` with :math:`s = \alpha / r` or :math:`\alpha / \sqrt r` (arXiv 2106.09685)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.source import Source, Spec
from weightops.checkpoints.formats.compressed import write_file
from weightops.engine.evaluate import allocate, materialize
from weightops.errors import CheckpointError, OptionError
from weightops.support.json_files import read_json, write_json

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<which>[AB])(?:\.weight)?")
_REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "arrow_config",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Settings under which the delta is another than alpha / r B A, or depends on the input."""
_RESIDUAL = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations that change the base's own weights: the adapter is no delta to these."""


class LoraSource(Source):
    """The products of an adapter's pairs, computed when they are read.

    Attributes:
        replaced: modules and biases that the adapter holds whole, as weights; None if there are none.
    """

    space = "delta"
    computed = True

    def __init__(self, config: Mapping[str, Any], stored: Source, ref: str) -> None:
        self.ref, self.skipped, self.ties, self._stored = ref, stored.skipped, {}, stored
        self.identity = (
            "adapter",
            json.dumps(config, sort_keys=True, default=str),
            stored.identity,
        )
        pairs: dict[str, dict[str, str]] = {}
        kept: dict[str, str] = {}
        for name in stored.specs:
            short = name.removeprefix(_PREFIX)
            part = _PART.fullmatch(short)
            if part:
                pairs.setdefault(part["module"], {})[part["which"]] = name
            elif "lora_" in short:
                raise CheckpointError(
                    f"{ref} holds {name}, which is no part of a plain LoRA (DoRA and others aren't read)"
                )
            else:
                kept[short.replace(".base_layer.", ".")] = name
        self._pairs: dict[str, tuple[str, str, float, bool]] = {}
        self.specs = {}
        for module, pair in pairs.items():
            self._add(config, module, pair)
        self.replaced = _Kept(stored, kept, ref) if kept else None
        ranks = sorted({stored.specs[a].shape[0] for a, *_ in self._pairs.values()})
        self.made_from = {
            "adapter": {
                "kind": "LoRA",
                "base": config.get("base_model_name_or_path"),
                "ranks": ranks,
                "modules": len(pairs),
                "whole": sorted(kept.values()),
            }
        }

    specs: dict[str, Spec]

    def _add(self, config: Mapping[str, Any], module: str, pair: Mapping[str, str]) -> None:
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{self.ref} holds only one half of the pair of {module}")
        a, b = (self._stored.specs[pair[which]] for which in "AB")
        rank = a.shape[0] if a.shape else 0
        said = _pattern(config.get("rank_pattern"), module, config.get("r"))
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
        if (
            len(a.shape) < 2
            or len(a.shape) != len(b.shape)
            or rank == 0
            or b.shape[1] != rank
            or set(b.shape[2:]) - {1}
        ):
            raise CheckpointError(
                f"{self.ref} holds a pair of shapes {a.shape} and {b.shape} for {module}, which isn't one of LoRA"
            )
        if said != rank or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise CheckpointError(
                f"{self.ref} has rank {rank} for {module}, and {CONFIG} says {said} (alpha {alpha})"
            )
        shape = (b.shape[0], *a.shape[1:])
        if math.prod(shape) > 2**33:
            raise CheckpointError(f"{self.ref} claims a delta of shape {shape} for {module}")
        turned = "lora_embedding_" in pair["A"] or (
            config.get("fan_in_fan_out") is True and len(shape) == 2
        )
        name = f"{module}.weight"
        self.specs[name] = Spec(
            shape[::-1] if turned else shape, torch.promote_types(a.dtype, torch.float32)
        )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
        self._pairs[name] = (pair["A"], pair["B"], scale, turned)

    def read(self, name: str) -> torch.Tensor:
        first, second, scale, turned = self._pairs[name]
        spec = self.specs[name]
        a, b = (self._stored.read(part).to(spec.dtype).flatten(1) for part in (first, second))
        product = scale * (b @ a)
        return product.T if turned else product.reshape(spec.shape)

    def describe(self) -> dict[str, object]:
        """The adapter, and that it is one."""
        return {**super().describe(), "kind": "LoRA adapter"}


class _Kept(Source):
    """The modules and biases of an adapter that are whole."""

    def __init__(self, stored: Source, names: Mapping[str, str], ref: str) -> None:
        self._stored, self._names, self.ref, self.ties = stored, names, ref, {}
        self.specs = {short: stored.specs[name] for short, name in names.items()}
        self.identity = ("kept", stored.identity)

    def read(self, name: str) -> torch.Tensor:
        return self._stored.read(self._names[name])


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module's name or its end.

    Raises:
        CheckpointError: for a pattern that could take very long to match.
    """
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if (
            len(re.findall(r"[*+{?]", pattern)) > 2
            or re.search(r"\)[*+{?]", pattern)
            or len(pattern) > 500
        ):
            raise CheckpointError(f"{pattern[:80]!r} is too complicated a pattern of modules")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(
                f"{pattern[:80]!r} is not a pattern of modules: {error}"
            ) from error
    return default


def recognises(path: Path) -> bool:
    """A JSON object with a ``peft_type``."""
    if path.suffix != ".json":
        return False
    try:
        return "peft_type" in read_json(path)
    except CheckpointError:
        return False


def open_adapter(path: Path, open_stored: Callable[[Path], Source]) -> Source:
    """The adapter that a configuration describes, from the weights beside it.

    Raises:
        CheckpointError: naming the setting, if the adapter is of a kind whose delta would be wrong.
    """
    config = read_json(path)
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    if kind != "LORA":
        raise CheckpointError(f"{path} is an adapter of kind {kind}; weightops reads LoRA")
    refused = [setting for setting in _REFUSED if config.get(setting)]
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        refused.append(f"init_lora_weights={start}")
    if refused:
        raise CheckpointError(
            f"{path} asks for {', '.join(refused)}, with which it is no plain LoRA: weightops would read it wrongly"
        )
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (path.parent / name).is_file():
            return LoraSource(config, open_stored(path.parent / name), str(path.parent))
    raise CheckpointError(
        f"{path.parent} holds {CONFIG}, but no adapter_model.safetensors beside it"
    )


def write_adapter(
    form: LinearForm,
    folder: Path,
    rank: int,
    *,
    fan_in_fan_out: bool = False,
    base: str | None = None,
) -> dict[str, float]:
    r"""Write the best LoRA of a rank for a delta: for each matrix its first singular triplets, :math:`B = U\sqrt\Sigma`, :math:`A = \sqrt\Sigma V^T`.

    What isn't the weight of a layer with two dimensions is left out, and counted in the error.

    Returns:
        ``relative_error``, the norm of what is left out over the norm of all, and ``left_out``, how many changed tensors have no part in it.

    Raises:
        OptionError: if no matrix changed.
    """
    if rank < 1:
        raise OptionError(f"a rank is at least 1, not {rank}")
    tensors: dict[str, torch.Tensor] = {}
    modules, total, lost, left_out = [], 0.0, 0.0, 0
    for name, spec in form.specs.items():
        part = form.part([name])
        out = allocate(part)
        materialize(part, out)
        delta = out[name].float()
        square = float(delta.square().sum(dtype=torch.float64))
        total += square
        if not square:
            continue
        if len(spec.shape) != 2 or not name.endswith(".weight"):
            lost, left_out = lost + square, left_out + 1
            continue
        module = name.removesuffix(".weight")
        embedding = "embed" in module.rpartition(".")[2]
        u, s, vh = torch.linalg.svd(
            delta.T if embedding or fan_in_fan_out else delta, full_matrices=False
        )
        kept = torch.zeros(rank)
        kept[: len(s)] = s[:rank].sqrt()
        lost += float(s[rank:].square().sum(dtype=torch.float64))
        a, b = torch.zeros(rank, vh.shape[1]), torch.zeros(u.shape[0], rank)
        a[: len(s)], b[:, : len(s)] = kept[: len(s), None] * vh[:rank], u[:, :rank] * kept[: len(s)]
        label = (
            ("lora_embedding_A", "lora_embedding_B")
            if embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors |= {f"{_PREFIX}{module}.{label[0]}": a, f"{_PREFIX}{module}.{label[1]}": b}
        modules.append(module)
    if not modules:
        raise OptionError(
            "no matrix of the task vector changed: there is nothing for a LoRA to hold"
        )
    error = {"relative_error": math.sqrt(lost / total), "left_out": left_out}
    write_file(folder / "adapter_model.safetensors", tensors, {"lora": error})
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "modules_to_save": None,
    }
    write_json(folder / CONFIG, config)
    return error
