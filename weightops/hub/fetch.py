"""Downloads from the Hugging Face Hub, through its cache."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

REPO = r"\w[\w.-]*/\w[\w.-]*"
"""The pattern of names of repositories."""


_REF = re.compile(rf"(?:dequantized:)?({REPO})(?:@([^:@]+))?(?::.+)?")


def repository_of(ref: str) -> tuple[str, str | None] | None:
    """Return the repository that a ref names, and its revision; None if it names a place here.

    >>> repository_of("org/base@1a2b:model.safetensors"), repository_of("base")
    (('org/base', '1a2b'), None)
    """
    match = _REF.fullmatch(ref)
    return (match[1], match[2]) if match and not Path(ref).exists() else None


def fetch(
    repo: str,
    wanted: Callable[[list[str]], list[str]],
    *,
    revision: str | None = None,
    kind: Literal["model", "dataset"] = "model",
    known: Iterable[str] = (),
) -> Path:
    """Return the folder of the cache that holds the wanted files of a repository.

    Without a network, this is the folder with the files that were downloaded before.

    Args:
        repo: the repository, as ``org/name``.
        wanted: chooses the files to download, or patterns of them, from the names of all files.
        revision: a branch, tag or commit.
        kind: the kind of the repository.
        known: names of files by which to find the repository in the cache without a network.

    Raises:
        Exception: any error of the library's many back ends; see `reason`.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging as hub_logging

    # The library warns at each of its retries.
    hub_logging.get_logger("huggingface_hub").setLevel(logging.ERROR)
    try:
        names = HfApi().list_repo_files(repo, revision=revision, repo_type=kind)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception as error:  # there is no network, or it must not be used
        try:
            return _cached(repo, revision, kind, known)
        except Exception:
            raise error from None
    patterns = wanted(names)
    return Path(snapshot_download(repo, revision=revision, repo_type=kind, allow_patterns=patterns))


def _cached(repo: str, revision: str | None, kind: str, known: Iterable[str]) -> Path:
    """Return the folder of the cache with the files of a repository that were downloaded."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    for name in known:
        path = try_to_load_from_cache(repo, name, revision=revision, repo_type=kind)
        if isinstance(path, str):
            return Path(path).parents[name.count("/")]
    return Path(snapshot_download(repo, revision=revision, repo_type=kind, local_files_only=True))


def reason(error: Exception) -> str:
    """Return the first line of an error's text, or its type if there is no text."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
