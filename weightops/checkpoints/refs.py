"""Refs: strings that name weights which aren't a path, and where what they name lies once it has been fetched."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from weightops.checkpoints.libraries.open_clip import CONFIG, OpenClipArchitecture
from weightops.errors import CheckpointError
from weightops.hub.fetch import REPO, fetch, reason
from weightops.support.registry import Registry, unknown

log = logging.getLogger("weightops")

_HUB = re.compile(rf"(?P<repo>{REPO})(?:@(?P<revision>[^:@]+))?(?::(?P<file>[^:]+))?")


_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


_BESIDE = ("*.json", "*.txt", "*.model", "vocab*", "merges*")


_WITH = {".metadata": (".metadata", "*.distcp"), "adapter_config.json": ("adapter_model.*",)}
"""What belongs to a file that tells of weights."""


class Place(NamedTuple):
    """Where weights lie, what they are called, and what is known of their model beside what lies there."""

    path: Path
    ref: str
    architecture: OpenClipArchitecture | None = None


def place(ref: str, preferred: Iterable[str]) -> Place | None:
    """Fetch what a ref names; None if it is no ref.

    Args:
        ref: ``org/name`` (where there is no folder ``org``), ``org/name@revision``, ``org/name:file``, or ``scheme:name`` with a scheme of `SCHEMES`.
        preferred: the names of files of weights, the preferred first.

    Raises:
        CheckpointError: if it can't be had, in one line.
    """
    scheme, separator, name = ref.partition(":")
    if separator and scheme in SCHEMES:
        return SCHEMES[scheme](name, tuple(preferred))
    hub = _HUB.fullmatch(ref)
    mistyped = Path(ref).suffix in _SUFFIXES or (Path(ref).parent.is_dir() and "@" not in ref)
    if hub and not hub["file"] and mistyped:
        return None  # a path
    return from_hub(hub["repo"], hub["revision"], hub["file"], tuple(preferred)) if hub else None


def from_hub(
    repo: str, revision: str | None, file: str | None, preferred: tuple[str, ...]
) -> Place:
    """A file, or the weights and all that describes them, of a repository on the Hugging Face Hub, through its cache."""
    from huggingface_hub import hf_hub_download

    try:
        if file is not None:
            path = Path(hf_hub_download(repo, file, revision=revision))
            return Place(path, f"{repo}@{_commit(path)}:{file}")
        path = fetch(
            repo, lambda names: _wanted(names, preferred), revision=revision, known=preferred
        )
    except Exception as error:  # the library raises whatever its many back ends raise
        raise CheckpointError(
            f"{repo} is nothing here, and can't be had from the Hugging Face Hub: {reason(error)}"
        ) from error
    return Place(path, f"{repo}@{path.name}")


def _commit(path: Path) -> str:
    """The revision that a file of the Hub's cache is of."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else "main"


def _wanted(names: list[str], preferred: tuple[str, ...]) -> list[str]:
    """The files to fetch: one form of the weights, with all shards, and what describes them."""
    chosen = next((name for name in preferred if name in names), None)
    if chosen is None:
        suffixes = (
            (".safetensors",)
            if any(name.endswith(".safetensors") for name in names)
            else (".bin", ".pt", ".pth", ".ckpt")
        )
        return [*_BESIDE, *(f"*{suffix}" for suffix in suffixes)]
    stem, index, _ = chosen.partition(".index.json")
    shards = f"{Path(stem).stem}-*{Path(stem).suffix}"
    return [*_BESIDE, shards if index else chosen, *_WITH.get(chosen, ())]


def _open_clip(name: str, preferred: tuple[str, ...]) -> Place:
    """``model/tag``, any pair of ``open_clip.list_pretrained()``; the activation is the one that the weights were trained with."""
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    model, _, tag = name.rpartition("/")
    known = [f"{m}/{t}" for m, t in open_clip.list_pretrained()]
    if name not in known:
        raise unknown("pretrained model of open_clip", name, known)
    pretrained = get_pretrained_cfg(model, tag)
    config = open_clip.get_model_config(model)
    if pretrained.get("quick_gelu") and not config.get("quick_gelu"):
        log.info("%s was trained with QuickGELU: its configuration says so", name)
        config["quick_gelu"] = True
    preprocess = {
        key: pretrained[key]
        for key in ("mean", "std", "interpolation", "resize_mode")
        if key in pretrained
    }
    architecture = OpenClipArchitecture.of_config(
        {"model_cfg": config, "preprocess_cfg": preprocess}
    )
    repo, _, file = pretrained.get("hf_hub", "").rpartition("/")
    if repo:
        found = from_hub(repo, None, file or None, preferred)
        own = (
            "hf_tokenizer_name" in config["text_cfg"] and (found.path / CONFIG).is_file()
        )  # beside its tokenizer
        return Place(found.path, f"open_clip:{name}", None if own else architecture)
    try:
        path = Path(download_pretrained(pretrained))
    except Exception as error:  # the library raises whatever its downloads raise
        raise CheckpointError(f"open_clip:{name} can't be had: {error}") from error
    return Place(path, f"open_clip:{name}", architecture)


def _timm(name: str, preferred: tuple[str, ...]) -> Place:
    """A model of timm with pretrained weights: ``vit_tiny_patch16_224``, with a tag behind a dot or its default one."""
    import timm

    known = timm.list_models(pretrained=True)
    config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    repo = config.hf_hub_id if config else None
    if not repo:
        raise unknown("pretrained model of timm", name, known)
    return from_hub(repo, None, None, preferred)._replace(ref=f"timm:{name}")


SCHEMES: Registry[Callable[[str, tuple[str, ...]], Place]] = Registry(
    "scheme of refs", "refs", {"open_clip": _open_clip, "timm": _timm}
)
"""What may stand before a colon in a ref."""
