"""Plain LoRA (arXiv 2106.09685): deltas that are the product of two small matrices.

The delta of a module is ``s * B @ A`` with ``s = alpha / r``; for rsLoRA (arXiv 2312.03732)
``s = alpha / sqrt(r)``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from weightops.algebra.dtypes import accumulator_name
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import Factors, Source, Spec, record_fingerprint
from weightops.checkpoints.adapters.adapter import CONFIG, PREFIX, Adapter
from weightops.errors import CheckpointError
from weightops.support.lazy import torch

HALF = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<which>[AB])(?:\.weight)?")
"""The name of one of the two matrices of a module, without the prefix."""

_OTHER = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Settings under which the delta isn't ``s * B @ A``."""
_RESIDUAL = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations that change the weights of the base: the adapter isn't a delta to the base."""


def changed_base(config: Mapping[str, Any]) -> str:
    """Return the initialisation of an adapter if it changed the weights of the base, else ""."""
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(_RESIDUAL) else ""


def is_plain(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Return whether an adapter's deltas are products of two matrices, and no more."""
    wrapped = any(
        half and "base_layer" in half["module"].split(".") for half in map(HALF.fullmatch, names)
    )
    settings = any(config.get(setting) for setting in _OTHER)
    return config.get("peft_type") == "LORA" and not (settings or changed_base(config) or wrapped)


_MOST_WILDCARDS = 8
"""The most wildcards of a pattern: each multiplies the time that names which don't match take."""


class Pair(NamedTuple):
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


class LoraSource(Adapter):
    """The deltas of an adapter, computed when they are read.

    Args:
        config: the content of ``adapter_config.json``.
        stored: the tensors of the adapter.
        ref: the name of the adapter in messages.

    Attributes:
        pairs: name of a delta -> its two halves.
        replaced: the modules that are saved whole, as weights; None if there are none.

    Raises:
        CheckpointError: if the tensors aren't the pairs that the configuration describes.
    """

    specs: dict[str, Spec]
    pairs: dict[str, Pair]

    def __init__(self, config: Mapping[str, Any], stored: Source, ref: str) -> None:
        super().__init__(config, stored, ref)
        halves: dict[str, dict[str, str]] = {}
        saved_whole: dict[str, str] = {}
        for name in stored.specs:
            short = name.removeprefix(PREFIX)
            half = HALF.fullmatch(short)
            if half:
                halves.setdefault(half["module"], {})[half["which"]] = name
            elif "lora_" in short:
                raise CheckpointError(
                    f"{ref} holds {name}, which is no part of a plain LoRA, "
                    f"and {CONFIG} asks for no other"
                )
            else:
                saved_whole[short.replace(".base_layer.", ".")] = name
        self.specs, self.pairs = {}, {}
        for module, names in halves.items():
            self._add_pair(config, module, names)
        self.replaced = Selection(stored, saved_whole, ref) if saved_whole else None
        self.needs_base = "replaces whole modules" if self.replaced else ""
        self.describe_as(
            "LoRA",
            ranks=sorted({stored.specs[pair.a].shape[0] for pair in self.pairs.values()}),
            modules=len(halves),
            whole=sorted(saved_whole.values()),
        )

    @property
    def transposed(self) -> bool:
        """Whether the deltas are for modules that keep their weights transposed."""
        return self.config.get("fan_in_fan_out") is True

    def _add_pair(self, config: Mapping[str, Any], module: str, names: Mapping[str, str]) -> None:
        if set(names) != {"A", "B"}:
            raise CheckpointError(f"{self.ref} holds only one half of the pair of {module}")
        a, b = self.stored.specs[names["A"]], self.stored.specs[names["B"]]
        rank = a.shape[0] if a.shape else 0
        alpha = self._check_pair(config, module, a.shape, b.shape)
        shape = (b.shape[0], *a.shape[1:])
        is_linear = len(shape) == 2
        transposed = "lora_embedding_" in names["A"] or (self.transposed and is_linear)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
        self.specs[f"{module}.weight"] = Spec(
            shape[::-1] if transposed else shape, accumulator_name(a.dtype_name)
        )
        self.pairs[f"{module}.weight"] = Pair(names["A"], names["B"], scale, transposed)

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
        if stated_rank != rank or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e30:
            raise CheckpointError(
                f"{self.ref} has rank {rank} for {module}, "
                f"and {CONFIG} says {stated_rank} (alpha {alpha})"
            )
        shape = (b[0], *a[1:])
        if math.prod(shape) > 2**33:
            raise CheckpointError(f"{self.ref} claims a delta of shape {shape} for {module}")
        return alpha

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the stored tensors and the scales of their products."""
        scales = {name: pair.scale for name, pair in self.pairs.items()}
        return record_fingerprint({"stored": self.stored.fingerprint, "scales": scales})

    def read(self, name: str) -> torch.Tensor:
        pair, spec = self.pairs[name], self.specs[name]
        b, a = self._halves(name)
        product = pair.scale * (b @ a)
        return product.T if pair.transposed else product.reshape(spec.shape)

    def rank(self, name: str) -> int | None:
        is_matrix = len(self.specs[name].shape) == 2
        return self.stored.specs[self.pairs[name].a].shape[0] if is_matrix else None

    def factors(self, name: str) -> Factors:
        pair = self.pairs[name]
        b, a = self._halves(name)
        return (a.T, pair.scale * b.T) if pair.transposed else (pair.scale * b, a)

    def _halves(self, name: str) -> Factors:
        """Return B and A as matrices, in the working precision."""
        pair, dtype = self.pairs[name], self.specs[name].dtype
        b, a = (self.stored.read(half).to(dtype).flatten(1) for half in (pair.b, pair.a))
        return b, a


class Selection(Source):
    """Some tensors of a source, under other names."""

    def __init__(self, stored: Source, names: Mapping[str, str], ref: str) -> None:
        self.stored, self._names, self.ref, self.ties = stored, names, ref, {}
        self.specs = {short: stored.specs[name] for short, name in names.items()}
        self.identity = stored.identity and ("kept", tuple(names.items()), stored.identity)
        self.files = stored.files

    def read(self, name: str) -> torch.Tensor:
        return self.stored.read(self._names[name])

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        return self.stored.open(self._names[name], scratch)


def check_pattern(pattern: str) -> None:
    """Refuse a pattern of modules that could take very long to match.

    Raises:
        CheckpointError: naming the pattern.
    """
    wildcards = len(re.findall(r"[*+{]", pattern))
    if wildcards > _MOST_WILDCARDS or re.search(r"\)[*+{]", pattern) or len(pattern) > 2000:
        raise CheckpointError(f"{pattern[:80]!r} is too complicated a pattern of modules")


def _setting_for(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the name of a module or its end."""
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        check_pattern(pattern)
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(
                f"{pattern[:80]!r} is not a pattern of modules: {error}"
            ) from error
    return default
