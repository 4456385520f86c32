"""Upload what a verb has written to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from weightops.cli.printing import echo

PUSHING = (
    click.Option(
        ["--push"], metavar="ORG/NAME", help="Then upload the folder to the Hugging Face Hub."
    ),
    click.Option(
        ["--license"],
        help="With --push: the license of the weights, as the Hub names it, such as mit or "
        "apache-2.0. Default: the one that the inputs' model cards state.",
    ),
)


def check_push(repo: str | None, license: str | None, *, dry_run: bool = False) -> None:
    """Refuse a push by its options, before any work is done; a dry run takes no login."""
    from weightops.hub import push

    if repo is None:
        if license is not None:
            raise click.UsageError("--license is for --push")
        return
    push.check_repo(repo)
    if license is not None:
        push.check_license(license)
    if not dry_run:
        push.check_login()


def check_known_license(
    repo: str | None, license: str | None, inputs: Iterable[str | Path]
) -> None:
    """Refuse a push of weights whose license nobody states: neither an option nor the inputs."""
    from weightops.errors import OptionError
    from weightops.hub.cards import license_of

    if repo is not None and license is None and not license_of([*inputs]):
        raise OptionError(
            "the model cards of the inputs state no license that all agree on, and people need one "
            "to use the weights",
            hint="--license mit states one, or another",
        )


def push_folder(folder: Path, repo: str | None, license: str | None) -> dict[str, str]:
    """Upload a folder if a repository is named, and return its address by name."""
    from weightops.hub.push import push

    if repo is None:
        return {}
    address = push(folder, repo, license=license)
    echo(f"pushed to {address}", err=True)
    return {"pushed": address}
