"""TODO."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from weightops.errors import CheckpointError, OptionError
from weightops.hub.fetch import REPO, reason

log = logging.getLogger("weightops")


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder to a repository of the Hub, which is made if there is none, in one commit; its address.

    Raises:
        CheckpointError: if the Hub refuses it, in one line.
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
            f"{folder} can't be pushed to {repo}: {reason(error)}; it is complete, and `weightops push {folder} {repo}` tries again"
        ) from error
    return address


def check_push(repo: str) -> None:
    """See that there is something to push to, before the work is done.

    Raises:
        OptionError: if it isn't the name of a repository, or nobody is logged in.
    """
    from huggingface_hub import get_token

    if not re.fullmatch(REPO, repo):
        raise OptionError(f"{repo} is not the name of a repository: it is ORG/NAME")
    if get_token() is None:
        raise OptionError(
            "nobody is logged in to the Hugging Face Hub: `hf auth login` does that, or set HF_TOKEN"
        )
