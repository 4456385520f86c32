"""The Hugging Face Hub: files of a repository, through its cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

REPO = r"\w[\w.-]*/\w[\w.-]*"
"""What the name of a repository looks like."""


def fetch(
    repo: str,
    wanted: Callable[[list[str]], list[str]],
    *,
    revision: str | None = None,
    kind: Literal["model", "dataset"] = "model",
    known: Iterable[str] = (),
) -> Path:
    """The folder of the cache that has some files of a repository; without a network, with those that were fetched before.

    Args:
        repo: ``org/name``.
        wanted: from the names of all files, those to fetch, or patterns of them.
        revision: a branch, tag or commit.
        kind: what it is a repository of.
        known: files by which the cache is asked where there is no network.

    Raises:
        Exception: whatever the library's many back ends raise: `reason` makes a line of it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.get_logger("huggingface_hub").setLevel(
        logging.ERROR
    )  # each of its retries is a warning
    try:
        names = HfApi().list_repo_files(repo, revision=revision, repo_type=kind)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception as error:  # no network, or not to be used
        try:
            return _cached(repo, revision, kind, known)
        except Exception:
            raise error from None
    return Path(
        snapshot_download(repo, revision=revision, repo_type=kind, allow_patterns=wanted(names))
    )


def _cached(repo: str, revision: str | None, kind: str, known: Iterable[str]) -> Path:
    """The folder that the cache has of a repository, with whatever of it was fetched."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    for name in known:
        found = try_to_load_from_cache(repo, name, revision=revision, repo_type=kind)
        if isinstance(found, str):
            return Path(found).parents[name.count("/")]
    return Path(snapshot_download(repo, revision=revision, repo_type=kind, local_files_only=True))


def reason(error: Exception) -> str:
    """The first line of what a library says."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
