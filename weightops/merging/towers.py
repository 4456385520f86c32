"""The parts of a model by the names of its tensors: towers of layers, and what is around them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from weightops.algebra.names import layer_of

_VISION = r"vis(ion|ual)|image_(tower|encoder|newline)"
_AUDIO = r"audio|speech"
_PROJECTOR = r"projector|merger|connector|mm_projector|soft_emb_norm"
_TEXT = ("default", "text_decoder", "text_model", "language_model", "text")
"""What mergekit and configurations call the tower of a language model."""


def module_pattern(module: str) -> str:
    """Return the pattern of the names of the tensors of a part of a model."""
    if "projector" in module or "merger" in module:
        return _PROJECTOR
    if module.startswith("vis") or "image" in module:
        return rf"^(?!.*({_PROJECTOR})).*({_VISION})"
    if "audio" in module:
        return rf"^(?!.*({_PROJECTOR})).*({_AUDIO})"
    if module in _TEXT:
        return rf"^(?!.*({_PROJECTOR}|{_VISION}|{_AUDIO}))"
    return rf"(^|\.){re.escape(module)}\."


def belongs(name: str, module: str) -> bool:
    """Return whether a tensor belongs to a part of a model, by mergekit's or its own name.

    >>> belongs("model.vision_tower.encoder.layers.0.w", "vision_tower")
    True
    >>> belongs("model.language_model.layers.0.w", "text_decoder")
    True
    """
    return re.search(module_pattern(module), name) is not None


def towers(names: Iterable[str]) -> dict[str, int]:
    """Return the number of layers of each tower, by the names of its layers up to the number.

    >>> towers(["vision.layers.0.w", "text.layers.0.w", "text.layers.1.w", "head.w"])
    {'vision.layers.': 1, 'text.layers.': 2}
    """
    numbers: dict[str, set[int]] = defaultdict(set)
    for layer in filter(None, map(layer_of, names)):
        numbers[layer.before].add(layer.number)
    return {tower: max(found) + 1 for tower, found in numbers.items()}


def stacked_towers(names: Iterable[str], module: str | None = None) -> dict[str, int]:
    """Return the towers whose layers a slice means, with their numbers of layers.

    Without the name of a part of the model, they are the layers of its language model; both of an
    encoder and a decoder.

    >>> stacked_towers(["vision.layers.0.w", "text.layers.0.w", "text.layers.1.w"])
    {'text.layers.': 2}
    """
    found = towers(names)
    chosen = {tower: n for tower, n in found.items() if belongs(tower, module or "text")}
    if not chosen and module is None:
        chosen = found
    coders = {t: n for t, n in chosen.items() if re.search(r"(^|\.)(encoder|decoder)\.", t)}
    if module is None and len(coders) > 1:
        return coders
    most = max(chosen.values(), default=0)
    return {tower: n for tower, n in chosen.items() if n == most}


def depth_keys(tower: str, config: Mapping[str, object]) -> tuple[str | None, tuple[str, ...]]:
    """Return the section of a configuration that a tower is described in, and its keys for depth.

    The section is None for the top level.
    """
    plain = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
    for pattern, section in ((_VISION, "vision_config"), (_AUDIO, "audio_config")):
        if re.search(pattern, tower) and section in config:
            return section, plain
    if re.search(r"(^|\.)decoder\.", tower) and not {"text_config"} & set(config):
        both = any(key in config for key in ("num_decoder_layers", "decoder_layers"))
        if both:
            return None, ("num_decoder_layers", "decoder_layers")
    if re.search(r"(^|\.)encoder\.", tower) and "encoder_layers" in config:
        return None, ("encoder_layers", "num_hidden_layers")
    sections = ("text_config", "llm_config", "language_config")
    return next((section for section in sections if section in config), None), plain
