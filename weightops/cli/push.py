"""``weightops push``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from weightops.cli.from_signature import Borrowed, command
from weightops.cli.printing import echo, echo_json

if TYPE_CHECKING:
    from pathlib import Path


@command(Borrowed("weightops.hub.push:push", only=("private", "license")))
def push(
    folder: Path, repo: str, *, dry_run: bool = False, json_: bool = False, **given: Any
) -> None:
    """Upload a FOLDER with weights and their model card to the Hugging Face Hub as REPO.

    REPO is org/name. All files go up in one commit.

    Args:
        folder: the folder.
        repo: the repository.
        dry_run: only show what would be uploaded; takes no token.
    """
    from weightops.checkpoints.opening import open_ref
    from weightops.hub import push as hub

    if not folder.is_dir():
        raise click.UsageError(f"there is no folder {folder}")
    hub.check_repo(repo)
    if not dry_run:
        hub.check_login()
    open_ref(folder)
    files = hub.files_to_push(folder, repo, license=given.get("license"))
    sizes = {
        name: len(file) if isinstance(file, bytes) else file.stat().st_size
        for name, file in files.items()
    }
    address = None if dry_run else hub.push(folder, repo, **given)
    if json_:
        private = given.get("private", False)
        echo_json({"repo": repo, "files": sizes, "private": private, "address": address})
        return
    for name, size in sizes.items():
        echo(f"{size:14,}  {name}")
    echo(f"pushed to {address}" if address else f"would be pushed to {repo}")
