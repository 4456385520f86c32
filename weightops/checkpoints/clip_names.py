"""The names of CLIP's tensors in open_clip and in transformers, and mappings between them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from weightops.checkpoints.conversion import Kind, TensorMapping

_COPIED = {
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
    "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers' own spelling
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

WRAPPER_PREFIXES = (
    *("module.", "_orig_mod.", "_forward_module.", "model.", "image_encoder.", "ema_model."),
)
"""Prefixes that wrappers of modules put before every name."""

WRAPPER_INFIXES = re.compile(
    r"(^|(?<=\.))(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\."
)
"""What FSDP1, checkpoint_wrapper and torch.compile put into names of inner modules."""

COUNTERS = ("n_averaged", "initted", "step")
"""Counters that averages of weights keep beside them, without a prefix."""


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Return canonical name -> name, without the prefixes and infixes of wrappers.

    A lone tower of CLIP gets the prefix that the tower has in a whole model.

    >>> unwrapped(["module.model.a", "module.model.b"])
    {'a': 'module.model.a', 'b': 'module.model.b'}
    """
    originals = {WRAPPER_INFIXES.sub("", name): name for name in names}
    while wrapped := [name for name in originals if name not in COUNTERS]:
        prefix = next(
            (p for p in WRAPPER_PREFIXES if all(name.startswith(p) for name in wrapped)), None
        )
        if prefix is None:
            break
        originals = {name.removeprefix(prefix): old for name, old in originals.items()}
    for embedding, tower in (
        ("embeddings.class_embedding", "vision_model."),
        ("embeddings.token_embedding.weight", "text_model."),
    ):
        layers = any(name.startswith("encoder.layers.") for name in originals)
        if embedding in originals and layers:
            return {tower + name: old for name, old in originals.items()}
    return originals


def _aligned(originals: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """Return the names with one leading part added or removed, whichever matches most wanted names.

    A model without its head, for example, lacks the part that the whole model puts before names.

    >>> _aligned({"h.0.w": "h.0.w"}, {"transformer.h.0.w": "", "head.w": ""})
    {'transformer.h.0.w': 'h.0.w'}
    """
    longer = [{name: part + name for name in originals} for part in _leading_parts(wanted)]
    shorter = [
        {name: name.removeprefix(part) for name in originals} for part in _leading_parts(originals)
    ]
    choices = [dict(originals)]
    for renamed in (*longer, *shorter):
        choices.append(
            {renamed[n] if renamed[n] in wanted else n: old for n, old in originals.items()}
        )
    return max(
        choices,
        key=lambda names: (len(names) == len(originals), sum(name in wanted for name in names)),
    )


def _leading_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.partition(".")[0] + "." for name in names})


def from_transformers(name: str) -> TensorMapping | None:
    """Return how a tensor of open_clip is obtained from transformers'; None for other names.

    >>> from_transformers("visual.transformer.resblocks.3.attn.in_proj_bias").names[0]
    'vision_model.encoder.layers.3.self_attn.q_proj.bias'
    """
    if name in _COPIED:
        return TensorMapping("copy", (_COPIED[name],))
    if name in _TRANSPOSED:
        return TensorMapping("transpose", (_TRANSPOSED[name],))
    module, _, leaf = name.rpartition(".")
    if module in _MODULES:
        return TensorMapping("copy", (f"{_MODULES[module]}.{leaf}",))
    layer = _LAYER.fullmatch(name)
    if layer is None or layer[1] not in _TOWERS:
        return None
    place, inner = f"{_TOWERS[layer[1]]}.{layer[2]}", layer[3]
    if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = inner.rpartition("_")[2]
        return TensorMapping("stack", tuple(f"{place}.self_attn.{x}_proj.{kind}" for x in "qkv"))
    module, _, leaf = inner.rpartition(".")
    if module not in _BLOCK:
        return None
    return TensorMapping("copy", (f"{place}.{_BLOCK[module]}.{leaf}",))


def _from_open_clip(names: Iterable[str]) -> dict[str, TensorMapping]:
    """Return transformers' name -> how its tensor is obtained from open_clip's ``names``."""
    result = {}
    for name in names:
        mapping = from_transformers(name)
        if mapping is not None:
            kind: Kind = "part" if mapping.kind == "stack" else mapping.kind
            for i, theirs in enumerate(mapping.names):
                result[theirs] = TensorMapping(kind, (name,), i)
    return result


def mappings(
    have: Iterable[str], want: Iterable[str], *, partly: bool = False
) -> dict[str, TensorMapping]:
    """Map as many of the wanted tensors as possible to tensors that exist.

    Args:
        have: the names that exist.
        want: the wanted names.
        partly: allow stacks that lack some of their parts (in a delta, these are zero).

    Returns:
        Wanted name -> how its tensor is obtained.
    """
    wanted = unwrapped(want)
    existing = _aligned(unwrapped(have), wanted)
    open_clip_mappings = _from_open_clip(existing)
    result: dict[str, TensorMapping] = {}
    for name, original in wanted.items():
        if name in existing:
            result[original] = TensorMapping("copy", (existing[name],))
            continue
        for mapping in (from_transformers(name), open_clip_mappings.get(name)):
            if mapping is None:
                continue
            available = [old in existing for old in mapping.names]
            if all(available) or (partly and any(available)):
                names = tuple(existing.get(old, "") for old in mapping.names)
                result[original] = mapping._replace(names=names)
                break
    return result


def outside_image_tower(names: Iterable[str]) -> bool:
    """Return whether all names of a CLIP model are outside its image encoder proper.

    The image encoder's projection counts as outside. No names at all give False.
    """
    listed = list(names)
    return bool(listed) and not any(
        name.startswith("vision_model.") or (name.startswith("visual.") and name != "visual.proj")
        for name in listed
    )


def is_clip(names: Iterable[str]) -> bool:
    """Return whether the names are those of a model of images and texts, of either library.

    CLIP and its kin, such as SigLIP or models with a tower of timm, have an image tower ``visual``
    or ``vision_model``, and a text tower ``text``, ``text_model`` or (CLIP alone) without a prefix.
    """
    listed = set(names)
    has_images = any(name.startswith(("visual.", "vision_model.")) for name in listed)
    has_texts = any(name.startswith(("text.", "text_model.")) for name in listed)
    return has_images and (has_texts or "token_embedding.weight" in listed)
