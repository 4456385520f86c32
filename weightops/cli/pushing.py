"""Upload what a verb has written to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from weightops.cli.printing import echo

PUSH = click.Option(
    ["--push"], metavar="ORG/NAME", help="Then upload the folder to the Hugging Face Hub."
)


def check_push(repo: str) -> None:
    """Check that there is somewhere to push to, before the work is done."""
    from weightops.hub import push

    push.check_push(repo)


def push_folder(folder: Path, repo: str | None) -> dict[str, str]:
    """Upload a folder if a repository is named, and return its address by name."""
    from weightops.hub.push import push

    if repo is None:
        return {}
    address = push(folder, repo)
    echo(f"pushed to {address}", err=True)
    return {"pushed": address}
