"""Uploads to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from weightops.errors import CheckpointError, OptionError
from weightops.hub.fetch import REPO, reason


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder to a repository of the Hub in one commit, and return its address.

    Args:
        folder: the folder with weights and their model card.
        repo: the repository, as ``org/name``; it is created if it doesn't exist.
        private: create a private repository.

    Raises:
        CheckpointError: if the upload fails, with the Hub's reason.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        address: str = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Weights computed by weightops"
        )
    except Exception as error:  # the library raises whatever its back ends raise
        raise CheckpointError(
            f"{folder} can't be pushed to {repo}: {reason(error)}",
            hint=f"the folder is complete; `weightops push {folder} {repo}` tries again",
        ) from error
    return address


def check_push(repo: str) -> None:
    """Check the name of a repository and the login, before any work is done for an upload.

    Raises:
        OptionError: if ``repo`` isn't ``org/name``, or nobody is logged in.
    """
    from huggingface_hub import get_token

    if not re.fullmatch(REPO, repo):
        raise OptionError(f"{repo} is not the name of a repository", hint="give ORG/NAME")
    if get_token() is None:
        raise OptionError(
            "nobody is logged in to the Hugging Face Hub",
            hint="run `hf auth login`, or set HF_TOKEN",
        )
