"""Refs: strings that name weights on the Hugging Face Hub, or pretrained models of a library."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from weightops.checkpoints.folders import MODULES, PIPELINE
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.open_clip import CONFIG, OpenClipArchitecture
from weightops.errors import CheckpointError
from weightops.hub.fetch import REPO, fetch, reason
from weightops.support.registry import Registry, unknown

log = logging.getLogger("weightops")

_HUB = re.compile(rf"(?P<repo>{REPO})(?:@(?P<revision>[^:@]+))?(?::(?P<file>[^:]+))?")

_SAFETENSORS, _PICKLED = ".safetensors", (".bin", ".pt", ".pth", ".ckpt")

_DESCRIPTIONS = ("*.json", "*.txt", "*.model", "vocab*", "merges*", "README.md")
"""Patterns of the files that describe a model."""

_COMPANIONS = {".metadata": (".metadata", "*.distcp"), "adapter_config.json": ("adapter_model.*",)}
"""A file that describes weights -> patterns of the files that hold them."""


class FetchedRef(NamedTuple):
    """The weights that a ref names.

    Attributes:
        path: the file or folder of the weights.
        ref: the ref with the revision that was fetched.
        architecture: the model of the weights, if the files beside them don't describe it.
    """

    path: Path
    ref: str
    architecture: Architecture | None = None


def fetch_ref(ref: str, preferred: Iterable[str]) -> FetchedRef | None:
    """Fetch the weights that a ref names; None if the text isn't a ref.

    Args:
        ref: ``org/name`` (if there is no folder ``org``), ``org/name@revision``, ``org/name:file``,
            or ``scheme:name`` with a scheme of `SCHEMES`.
        preferred: the names of weights files, the preferred first.

    Raises:
        CheckpointError: in one line, if the weights can't be fetched.
        UnknownNameError: if the library of the scheme has no such pretrained model.
    """
    scheme, separator, name = ref.partition(":")
    if separator and scheme in SCHEMES:
        return SCHEMES[scheme](name, tuple(preferred))
    hub = _HUB.fullmatch(ref)
    if hub is None:
        return None
    has_suffix = Path(ref).suffix in (_SAFETENSORS, *_PICKLED)
    in_a_folder = Path(ref).parent.is_dir() and "@" not in ref
    if not hub["file"] and (has_suffix or in_a_folder):
        return None  # a path with a slip
    return from_hub(hub["repo"], hub["revision"], hub["file"], tuple(preferred))


def nothing_at(ref: str, hint: str) -> CheckpointError:
    """Return the error for a path where nothing is, and which is no ref.

    Args:
        ref: the path.
        hint: what it might have been, unless its suffix says that a file is meant.
    """
    path = Path(ref)
    fact = f"there is no file or folder {ref}"
    if path.suffix not in (_SAFETENSORS, *_PICKLED):
        return CheckpointError(f"{fact} (and no ref of that name)", hint=hint)
    if not path.parent.is_dir():
        return CheckpointError(fact, hint=f"there is no folder {path.parent}")
    beside = sorted(p.stem for p in path.parent.iterdir() if p.suffix == path.suffix)
    close = [str(path.with_stem(stem)) for stem in get_close_matches(path.stem, beside)]
    return CheckpointError(fact, hint=f"did you mean {' or '.join(close)}?" if close else "")


def from_hub(
    repo: str, revision: str | None, file: str | None, preferred: tuple[str, ...]
) -> FetchedRef:
    """Fetch weights from a repository on the Hugging Face Hub, through its cache.

    Args:
        repo: ``org/name``.
        revision: a branch, tag or commit; the main branch by default.
        file: the one file to fetch; by default one form of the weights and all that describes them.
        preferred: the names of weights files, the preferred first.

    Raises:
        CheckpointError: in one line, if the weights can't be fetched.
    """
    from huggingface_hub import hf_hub_download

    try:
        if file is not None:
            path = Path(hf_hub_download(repo, file, revision=revision))
            return FetchedRef(path, f"{repo}@{_commit_of(path)}:{file}")
        path = fetch(
            repo, lambda names: _wanted(names, preferred), revision=revision, known=preferred
        )
    except Exception as error:  # the library raises whatever its many back ends raise
        raise CheckpointError(
            f"{repo} is not a local path, and can't be fetched from the Hugging Face Hub: "
            f"{reason(error)}"
        ) from error
    return FetchedRef(path, f"{repo}@{path.name}")


def _commit_of(path: Path) -> str:
    """Return the commit of a file in the Hub's cache."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else "main"


def _wanted(names: list[str], preferred: tuple[str, ...]) -> list[str]:
    """Return patterns of the files to fetch: one form of the weights, and the descriptions."""
    chosen = next((name for name in preferred if name in names), None)
    if PIPELINE in names or MODULES[0] in names:
        top = [chosen] if chosen and PIPELINE not in names else []
        return [*_DESCRIPTIONS, *top, *_in_folders(names)]
    if chosen is None:
        has_safetensors = any(name.endswith(_SAFETENSORS) for name in names)
        suffixes = (_SAFETENSORS,) if has_safetensors else _PICKLED
        return [*_DESCRIPTIONS, *(f"*{suffix}" for suffix in suffixes)]
    weights, index, _ = chosen.partition(".index.json")
    if index:
        chosen = f"{Path(weights).stem}-*{Path(weights).suffix}"
    return [*_DESCRIPTIONS, chosen, *_COMPANIONS.get(chosen, ())]


def _in_folders(names: list[str]) -> list[str]:
    """Return the weights in the folders of a repository, one form in each."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder and file.endswith((_SAFETENSORS, *_PICKLED)):
            folders.setdefault(folder, []).append(name)
    chosen = []
    for files in folders.values():
        safe = [name for name in files if name.endswith(_SAFETENSORS)] or files
        whole = [name for name in safe if Path(name).name.count(".") == 1]  # without variants
        chosen += whole or safe
    return chosen


def _open_clip(name: str, preferred: tuple[str, ...]) -> FetchedRef:
    """Fetch ``model/tag``, any pair of ``open_clip.list_pretrained()``."""
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    model, _, tag = name.rpartition("/")
    known = [f"{m}/{t}" for m, t in open_clip.list_pretrained()]
    if name not in known:
        raise unknown("pretrained model of open_clip", name, known)
    ref = f"open_clip:{name}"
    pretrained = get_pretrained_cfg(model, tag)
    config = open_clip.get_model_config(model)
    architecture = _pretrained_architecture(name, config, pretrained)
    repo, _, file = pretrained.get("hf_hub", "").rpartition("/")
    if repo:
        path = from_hub(repo, None, file or None, preferred).path
        # Its own configuration is beside the tokenizer that a model of this kind needs.
        described = "hf_tokenizer_name" in config["text_cfg"] and (path / CONFIG).is_file()
        return FetchedRef(path, ref, None if described else architecture)
    try:
        path = Path(download_pretrained(pretrained))
    except Exception as error:  # the library raises whatever its downloads raise
        raise CheckpointError(f"{ref} can't be fetched: {error}") from error
    return FetchedRef(path, ref, architecture)


def _pretrained_architecture(
    name: str, config: dict[str, Any], pretrained: Mapping[str, Any]
) -> OpenClipArchitecture:
    """Return the architecture with the activation and preprocessing of the training."""
    if pretrained.get("quick_gelu") and not config.get("quick_gelu"):
        log.info("%s was trained with QuickGELU: its configuration says so", name)
        config["quick_gelu"] = True
    settings = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {key: pretrained[key] for key in settings if key in pretrained}
    return OpenClipArchitecture.of_config({"model_cfg": config, "preprocess_cfg": preprocess})


def _timm(name: str, preferred: tuple[str, ...]) -> FetchedRef:
    """Fetch a pretrained model of timm, such as ``vit_tiny_patch16_224``, with or without a tag."""
    import timm

    known = timm.list_models(pretrained=True)
    config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    repo = config.hf_hub_id if config else None
    if not repo:
        raise unknown("pretrained model of timm", name, known)
    return from_hub(repo, None, None, preferred)._replace(ref=f"timm:{name}")


SCHEMES: Registry[Callable[[str, tuple[str, ...]], FetchedRef]] = Registry(
    "scheme of refs", "refs", {"open_clip": _open_clip, "timm": _timm}
)
"""The scheme before the colon of a ref -> the function that fetches the name behind it."""
