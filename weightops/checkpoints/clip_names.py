"""What the tensors of a CLIP model are called by transformers and by open_clip, and how the ones are made of the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

Kind = Literal["copy", "transpose", "stack", "part"]


class TensorMapping(NamedTuple):
    """How a tensor is made: a copy, a transpose, several stacked, or the ``part``-th of three equal parts."""

    kind: Kind
    names: tuple[str, ...]
    part: int = 0


_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_MODULES = {
    "visual.ln_pre": "vision_model.pre_layrnorm",  # as transformers spells it
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_TOWERS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_LAYER = re.compile(r"(.*transformer\.resblocks)\.(\d+)\.(.+)")

WRAPPINGS = ("module.", "_orig_mod.", "model.", "image_encoder.")
"""What wrappers of modules put before every name."""


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Name without what wrappers put before all names, and with a tower's own name before a lone CLIP tower's -> name.

    >>> unwrapped(["module.model.a", "module.model.b"])
    {'a': 'module.model.a', 'b': 'module.model.b'}
    """
    found = {name: name for name in names}
    while found:
        prefix = next((p for p in WRAPPINGS if all(name.startswith(p) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): original for name, original in found.items()}
    for mark, tower in (
        ("embeddings.class_embedding", "vision_model."),
        ("embeddings.token_embedding.weight", "text_model."),
    ):
        if mark in found and any(name.startswith("encoder.layers.") for name in found):
            return {tower + name: original for name, original in found.items()}
    return found


def _nested(mine: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, str]:
    """Names with the first part put before or taken away that brings most of them to others': a model's inside has it not.

    >>> _nested({"h.0.w": "h.0.w"}, {"transformer.h.0.w": "", "head.w": ""})
    {'transformer.h.0.w': 'h.0.w'}
    """
    choices = [dict(mine)]
    for part in sorted({name.partition(".")[0] + "." for name in theirs}):
        choices.append(
            {
                part + name if part + name in theirs else name: original
                for name, original in mine.items()
            }
        )
    for part in sorted({name.partition(".")[0] + "." for name in mine}):
        shorter = {
            name.removeprefix(part) if name.removeprefix(part) in theirs else name: o
            for name, o in mine.items()
        }
        choices.append(shorter)
    return max(
        choices, key=lambda names: (len(names) == len(mine), sum(name in theirs for name in names))
    )


def of_transformers(name: str) -> TensorMapping | None:
    """How a tensor of open_clip is made of transformers'.

    >>> of_transformers("visual.transformer.resblocks.3.attn.in_proj_bias").names[0]
    'vision_model.encoder.layers.3.self_attn.q_proj.bias'
    """
    if name in _WHOLE:
        return TensorMapping("copy", (_WHOLE[name],))
    if name in _TRANSPOSED:
        return TensorMapping("transpose", (_TRANSPOSED[name],))
    module, _, leaf = name.rpartition(".")
    if module in _MODULES:
        return TensorMapping("copy", (f"{_MODULES[module]}.{leaf}",))
    layer = _LAYER.fullmatch(name)
    if layer is None or layer[1] not in _TOWERS:
        return None
    place = f"{_TOWERS[layer[1]]}.{layer[2]}"
    module, _, leaf = layer[3].rpartition(".")
    if layer[3] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        return TensorMapping(
            "stack",
            tuple(f"{place}.self_attn.{x}_proj.{layer[3].rpartition('_')[2]}" for x in "qkv"),
        )
    return (
        TensorMapping("copy", (f"{place}.{_BLOCK[module]}.{leaf}",)) if module in _BLOCK else None
    )


def mappings(
    have: Iterable[str], want: Iterable[str], *, partly: bool = False
) -> dict[str, TensorMapping]:
    """How as many of the wanted tensors as possible are made of those there are.

    Args:
        have: the names there are.
        want: the names that are wanted.
        partly: a stack may lack some of its parts (in a delta, these are zero).
    """
    theirs = unwrapped(want)
    mine = _nested(unwrapped(have), theirs)
    made: dict[str, TensorMapping] = {}
    split = {
        part: TensorMapping("part" if recipe.kind == "stack" else recipe.kind, (name,), i)
        for name in mine
        for recipe in [of_transformers(name)]
        if recipe
        for i, part in enumerate(recipe.names)
    }
    for short, name in theirs.items():
        if short in mine:
            made[name] = TensorMapping("copy", (mine[short],))
            continue
        recipe = of_transformers(short) or split.get(short)
        if recipe is None:
            continue
        there = [part in mine for part in recipe.names]
        if all(there) or (partly and any(there)):
            made[name] = recipe._replace(names=tuple(mine.get(part, "") for part in recipe.names))
            continue
        if short in split:
            made[name] = split[short]._replace(
                names=tuple(mine[part] for part in split[short].names)
            )
    return made


def outside_image_tower(names: Iterable[str]) -> bool:
    """True if these are names of a CLIP model, and none is of its image encoder proper (the projection is not)."""
    shorts = list(names)
    return bool(shorts) and not any(
        name.startswith("vision_model.") or (name.startswith("visual.") and name != "visual.proj")
        for name in shorts
    )


def is_clip(names: Mapping[str, object] | Iterable[str]) -> bool:
    """True for the names of a whole CLIP model, whichever library's."""
    found = set(names)
    return any(
        name in found
        for name in ("visual.class_embedding", "vision_model.embeddings.class_embedding")
    ) and any(
        name in found
        for name in ("token_embedding.weight", "text_model.embeddings.token_embedding.weight")
    )
