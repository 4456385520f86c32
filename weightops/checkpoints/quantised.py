"""Read quantised weights as floating-point numbers, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from functools import cached_property
from hashlib import sha256
from typing import Any

from weightops.algebra.codes import is_packed
from weightops.algebra.dtypes import ITEM_SIZES
from weightops.algebra.linear_form import LinearForm
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import ComputedSource, Source, cut
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.quantised_layouts import FLOAT8, Decoder, decoders, sound
from weightops.errors import CheckpointError
from weightops.support.lazy import torch
from weightops.support.text import first_few

DEQUANTIZED = "dequantized:"
"""The beginning of a ref whose quantised weights are to be read as floating-point numbers."""
CONFIG_KEYS = ("quantization_config", "compression_config")
"""The keys of a model's configuration under which it says how its weights are quantised."""
_CONFIG_FILES = frozenset(("hf_quant_config.json", "quantize_config.json", "quant_config.json"))
"""Files in which ModelOpt, and older versions of GPTQ and AWQ, say the same."""
_ACTIVATIONS = tuple(f".{of}_scale" for of in ("input", "input_global", "output", *"qkv"))
"""The ends of the names of scales of activations, and of the keys and values of attention."""
_UNREAD = {
    **{"_weight_qdata": "torchao", "_data": "quanto", "W_q": "HQQ", "codebooks": "AQLM"},
    **{"q_weight": "EXL2", "biases": "MLX", "centroids": "VPTQ", "weight_scales": "EETQ"},
}
"""The end of a name of a quantised tensor whose layout isn't read -> the library."""


class Dequantised(ComputedSource):
    """Quantised tensors as floating-point ones; all others as they are stored.

    Args:
        stored: the stored tensors.
        decoders: name -> how the tensor is computed.
    """

    def __init__(self, stored: Source, decoders: Mapping[str, Decoder]) -> None:
        self._stored, self._decoders = stored, decoders
        used = {part for decoder in decoders.values() for part in decoder.parts}
        scales = [n for n in stored.specs if n not in used and _is_activation(n)]
        self.skipped = (*stored.skipped, *scales)
        kept = [n for n in stored.specs if n not in used and n not in scales]
        self.ref, self.files = DEQUANTIZED + stored.ref, stored.files
        self.specs = {
            **{name: stored.specs[name] for name in kept},
            **{name: decoder.spec for name, decoder in decoders.items()},
        }
        self.ties = {a: n for a, n in stored.ties.items() if a in self.specs and n in self.specs}
        self.identity = stored.identity and ("dequantised", stored.identity)

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        if name not in self._decoders:
            return self._stored.open(name, scratch)
        parts, spec, decode = self._decoders[name]
        with sound(self._stored, name):
            computed = decode(*(self._stored.read(part) for part in parts))
            flat = computed.reshape(spec.shape).to(spec.dtype).reshape(-1)
        return lambda start, stop: cut(flat, start, stop)

    def working_bytes(self, name: str) -> int:
        if name not in self._decoders:
            return self._stored.working_bytes(name)
        return 3 * self._decoders[name].spec.numel * ITEM_SIZES["float32"]

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the stored codes, marked: to sample the results is to compute them."""
        return sha256(f"dequantised {self._stored.fingerprint}".encode()).hexdigest()[:16]


def dequantise(checkpoint: Checkpoint) -> Checkpoint:
    """Return a quantised checkpoint in bfloat16; its tensors are computed when they are read.

    Raises:
        CheckpointError: if no weights are quantised in a layout that is known.
    """
    if checkpoint.form.space == "delta":
        raise CheckpointError(f"{checkpoint.ref} holds a change of weights, not quantised weights")
    architecture, stored = checkpoint.architecture, checkpoint.source
    settings = _settings(architecture)
    found = dict(decoders(stored, settings))
    if not found:
        method = settings.get("quant_method") or _looks_like(stored.specs)
        raise CheckpointError(
            f"{checkpoint.ref} has no weights that are quantised in a known layout"
            + (f"; they are those of {method}" if method else ""),
            hint="known: MXFP4, float8 with scales, bitsandbytes, GPTQ, AWQ, pack-quantized; save "
            "others dequantised, with their library",
        )
    used = {part for decoder in found.values() for part in decoder.parts}
    _check_all_read(stored, used)
    own = architecture.own_names(found) if architecture else list(found)
    if len(own) < len(found):
        raise CheckpointError(
            f"{checkpoint.ref} is made of several folders, of which some are quantised",
            hint="name the folder of the quantised one",
        )
    form = LinearForm.of(Dequantised(stored, found))
    if architecture:
        architecture = architecture.changed(_without_settings(architecture.config))
        architecture.left_behind = _CONFIG_FILES
    return checkpoint.with_form(form, architecture).to("bfloat16")


def _check_all_read(stored: Source, used: Set[str]) -> None:
    """Refuse quantised tensors of a layout that isn't read beside those that are."""
    codes = [
        name
        for name, spec in stored.specs.items()
        if name not in used and is_packed(spec) and spec.shape[:2] != (1, 1)  # no mask of attention
    ]
    bare = [name for name in codes if stored.specs[name].dtype_name in FLOAT8]
    others = [name for name in codes if name not in bare]
    if others:
        kinds = ", ".join(dict.fromkeys(stored.specs[name].dtype_name for name in others))
        raise CheckpointError(
            f"{stored.ref} has {len(others)} {kinds} tensors in no layout that is known, beside "
            f"others that are: {first_few(others)}",
            hint="save the model dequantised, with the library that quantised it",
        )
    if bare:
        raise CheckpointError(
            f"{stored.ref} has no scales for {len(bare)} float8 tensors: {first_few(bare)}",
            hint="save the scales beside them, as weight_scale or weight_scale_inv",
        )


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Return whether weights are quantised in a layout that is known."""
    is_weights = checkpoint.form.space == "weights"
    return is_weights and any(decoders(checkpoint.source, _settings(checkpoint.architecture)))


def _settings(architecture: Architecture | None) -> Mapping[str, Any]:
    """Return what the configuration of a model says of its quantisation."""
    config = architecture.config if architecture else {}
    places = (config, *(value for value in config.values() if isinstance(value, Mapping)))
    found = (place[key] for place in places for key in CONFIG_KEYS if place.get(key))
    return next((settings for settings in found if isinstance(settings, Mapping)), {})


def _without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes of a configuration, and of those in it, that take these settings away."""
    removed: dict[str, Any] = {key: None for key in CONFIG_KEYS if key in config}
    for key, value in config.items():
        if key not in removed and isinstance(value, Mapping) and {*CONFIG_KEYS} & {*value}:
            removed[key] = {k: v for k, v in value.items() if k not in CONFIG_KEYS}
    return removed


def _looks_like(names: Iterable[str]) -> str | None:
    """Return the library that gives quantised tensors such names, or None."""
    ends = [name.rpartition(".")[2] for name in names]
    return next((library for end, library in _UNREAD.items() if end in ends), None)


def _is_activation(name: str) -> bool:
    """Return whether a tensor only scales what a quantised layer computes with, or caches."""
    return name.endswith((".weight_format", *_ACTIVATIONS))
