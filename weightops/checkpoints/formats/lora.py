"""LoRA adapters in peft's folders (arXiv 2106.09685), read as deltas and written from deltas.

The delta of a module is ``s * B @ A`` with ``s = alpha / r``; for rsLoRA ``s = alpha / sqrt(r)``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.source import Source, Spec
from weightops.checkpoints.formats.compressed import float_tensor, squared_norm, write_tensors
from weightops.errors import CheckpointError, OptionError
from weightops.support.json_files import read_json, write_json

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HALF = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<which>[AB])(?:\.weight)?")
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
"""Settings under which the delta isn't ``s * B @ A``, or depends on the input."""
_RESIDUAL = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations that change the weights of the base: the adapter isn't a delta to the base."""


class _Pair(NamedTuple):
    """The two halves of a module's delta.

    Attributes:
        a: the stored name of A.
        b: the stored name of B.
        scale: the factor of their product.
        transposed: whether the weight is the transpose of the product.
    """

    a: str
    b: str
    scale: float
    transposed: bool


class LoraSource(Source):
    """The deltas of an adapter, computed when they are read.

    Args:
        config: the content of ``adapter_config.json``.
        stored: the tensors of the adapter.
        ref: the name of the adapter in messages.

    Raises:
        CheckpointError: if the tensors aren't the pairs that the configuration describes.
    """

    space = "delta"
    computed = True
    specs: dict[str, Spec]

    def __init__(self, config: Mapping[str, Any], stored: Source, ref: str) -> None:
        self.ref, self.skipped, self.ties, self._stored = ref, stored.skipped, {}, stored
        self.files = stored.files
        self.identity = (
            "adapter",
            json.dumps(config, sort_keys=True, default=str),
            stored.identity,
        )
        halves: dict[str, dict[str, str]] = {}
        saved_whole: dict[str, str] = {}
        for name in stored.specs:
            short = name.removeprefix(_PREFIX)
            half = _HALF.fullmatch(short)
            if half:
                halves.setdefault(half["module"], {})[half["which"]] = name
            elif "lora_" in short:
                raise CheckpointError(
                    f"{ref} holds {name}, which is no part of a plain LoRA",
                    hint="weightops doesn't read DoRA and other variants",
                )
            else:
                saved_whole[short.replace(".base_layer.", ".")] = name
        self.specs, self._pairs = {}, {}
        for module, names in halves.items():
            self._add_pair(config, module, names)
        self.replaced = _SavedWhole(stored, saved_whole, ref) if saved_whole else None
        ranks = {stored.specs[pair.a].shape[0] for pair in self._pairs.values()}
        adapter = {
            "kind": "LoRA",
            "base": config.get("base_model_name_or_path"),
            "ranks": sorted(ranks),
            "modules": len(halves),
            "whole": sorted(saved_whole.values()),
        }
        self.made_from = {"adapter": adapter}

    _pairs: dict[str, _Pair]

    def _add_pair(self, config: Mapping[str, Any], module: str, names: Mapping[str, str]) -> None:
        if set(names) != {"A", "B"}:
            raise CheckpointError(f"{self.ref} holds only one half of the pair of {module}")
        a, b = self._stored.specs[names["A"]], self._stored.specs[names["B"]]
        rank = a.shape[0] if a.shape else 0
        alpha = self._check_pair(config, module, a.shape, b.shape)
        shape = (b.shape[0], *a.shape[1:])
        is_linear = len(shape) == 2
        transposed = "lora_embedding_" in names["A"] or (
            config.get("fan_in_fan_out") is True and is_linear
        )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
        self.specs[f"{module}.weight"] = Spec(
            shape[::-1] if transposed else shape, torch.promote_types(a.dtype, torch.float32)
        )
        self._pairs[f"{module}.weight"] = _Pair(names["A"], names["B"], scale, transposed)

    def _check_pair(
        self, config: Mapping[str, Any], module: str, a: tuple[int, ...], b: tuple[int, ...]
    ) -> float:
        """Check the shapes of a pair against the configuration, and return alpha."""
        rank = a[0] if a else 0
        if len(a) < 2 or len(a) != len(b) or rank == 0 or b[1] != rank or set(b[2:]) - {1}:
            raise CheckpointError(
                f"{self.ref} holds a pair of shapes {a} and {b} for {module}, "
                "which isn't one of LoRA"
            )
        stated_rank = _setting_for(config.get("rank_pattern"), module, config.get("r"))
        alpha = _setting_for(config.get("alpha_pattern"), module, config.get("lora_alpha"))
        if stated_rank != rank or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise CheckpointError(
                f"{self.ref} has rank {rank} for {module}, "
                f"and {CONFIG} says {stated_rank} (alpha {alpha})"
            )
        shape = (b[0], *a[1:])
        if math.prod(shape) > 2**33:
            raise CheckpointError(f"{self.ref} claims a delta of shape {shape} for {module}")
        return alpha

    def read(self, name: str) -> torch.Tensor:
        pair, spec = self._pairs[name], self.specs[name]
        a = self._stored.read(pair.a).to(spec.dtype).flatten(1)
        b = self._stored.read(pair.b).to(spec.dtype).flatten(1)
        product = pair.scale * (b @ a)
        return product.T if pair.transposed else product.reshape(spec.shape)

    def describe(self) -> dict[str, object]:
        """Return the description of a source, with its kind."""
        return {**super().describe(), "kind": "LoRA adapter"}


class _SavedWhole(Source):
    """The modules and biases that an adapter saves whole, as weights."""

    def __init__(self, stored: Source, names: Mapping[str, str], ref: str) -> None:
        self._stored, self._names, self.ref, self.ties = stored, names, ref, {}
        self.specs = {short: stored.specs[name] for short, name in names.items()}
        self.identity, self.files = ("kept", stored.identity), stored.files

    def read(self, name: str) -> torch.Tensor:
        return self._stored.read(self._names[name])


def _setting_for(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the name of a module or its end.

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
    """Return whether a file is a JSON object with a ``peft_type``."""
    if path.suffix != ".json":
        return False
    try:
        return "peft_type" in read_json(path)
    except CheckpointError:
        return False


def open_adapter(path: Path, open_stored: Callable[[Path], Source]) -> Source:
    """Open the adapter that a configuration describes.

    Args:
        path: the configuration.
        open_stored: opens the weights file beside it.

    Raises:
        CheckpointError: naming the setting, if the delta of such an adapter isn't ``s * B @ A``.
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
            f"{path} asks for {', '.join(refused)}, with which it is no plain LoRA: "
            "weightops would read it wrongly"
        )
    for name in (_WEIGHTS, "adapter_model.bin"):
        if (path.parent / name).is_file():
            return LoraSource(config, open_stored(path.parent / name), str(path.parent))
    raise CheckpointError(f"{path.parent} holds {CONFIG}, but no {_WEIGHTS} beside it")


def write_adapter(
    form: LinearForm,
    folder: Path,
    rank: int,
    *,
    fan_in_fan_out: bool = False,
    base: str | None = None,
) -> dict[str, float]:
    """Write the best LoRA of a rank for a delta, from the first singular triplets of each matrix.

    With ``delta = U diag(s) V^T``: ``B = U sqrt(diag(s))``, ``A = sqrt(diag(s)) V^T``, cut to
    the rank. Everything but weights of linear and embedding layers is left out.

    Args:
        form: the delta.
        folder: the folder to write to.
        rank: the rank of the adapter.
        fan_in_fan_out: whether the layers keep their weights transposed, as GPT-2 does.
        base: the name of the base for peft.

    Returns:
        ``relative_error``: the norm of the part of the delta that is lost over the norm of the
        delta; ``left_out``: how many changed tensors have no part in the adapter.

    Raises:
        OptionError: if the rank is below 1, or no matrix changed.
    """
    if rank < 1:
        raise OptionError(f"a rank is at least 1, not {rank}")
    tensors: dict[str, torch.Tensor] = {}
    modules, total, lost, left_out = [], 0.0, 0.0, 0
    for name, spec in form.specs.items():
        delta = float_tensor(form, name)
        square = squared_norm(delta)
        total += square
        if not square:
            continue
        if len(spec.shape) != 2 or not name.endswith(".weight"):
            lost, left_out = lost + square, left_out + 1
            continue
        modules.append(name.removesuffix(".weight"))
        pair, lost_square = _best_pair(delta, modules[-1], rank, fan_in_fan_out)
        lost += lost_square
        tensors |= pair
    if not modules:
        raise OptionError("no matrix of the task vector changed: a LoRA would be empty")
    error = {"relative_error": math.sqrt(lost / total), "left_out": left_out}
    write_tensors(folder / _WEIGHTS, tensors, {"lora": error})
    write_json(folder / CONFIG, _config(modules, rank, fan_in_fan_out, base))
    return error


def _best_pair(
    delta: torch.Tensor, module: str, rank: int, fan_in_fan_out: bool
) -> tuple[dict[str, torch.Tensor], float]:
    """Return A and B by name, and the squared norm of the part of the delta that is lost."""
    embedding = "embed" in module.rpartition(".")[2]
    u, s, vh = torch.linalg.svd(
        delta.T if embedding or fan_in_fan_out else delta, full_matrices=False
    )
    count = min(rank, len(s))
    root = s[:count].sqrt()
    a, b = torch.zeros(rank, vh.shape[1]), torch.zeros(u.shape[0], rank)
    a[:count], b[:, :count] = root[:, None] * vh[:count], u[:, :count] * root
    halves = ("lora_embedding_A", "lora_embedding_B")
    if not embedding:
        halves = ("lora_A.weight", "lora_B.weight")
    names = [f"{_PREFIX}{module}.{half}" for half in halves]
    lost = s[rank:].square().sum(dtype=torch.float64)
    return {names[0]: a, names[1]: b}, float(lost)


def _config(
    modules: list[str], rank: int, fan_in_fan_out: bool, base: str | None
) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``."""
    return {
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
