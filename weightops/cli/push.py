"""``weightops push``."""

from __future__ import annotations

from pathlib import Path

import click

from weightops.cli import options


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be uploaded; takes no token.")
@options.printing
def command(folder: Path, repo: str, private: bool, dry_run: bool, as_json: bool) -> None:
    """Upload a FOLDER with weights and their model card to the Hugging Face Hub as REPO (org/name), in one commit."""
    from weightops.checkpoints.opening import open_ref
    from weightops.errors import CheckpointError
    from weightops.hub.push import check_push, push

    if not dry_run:
        check_push(repo)
    open_ref(folder)
    if not (folder / "README.md").is_file():
        raise CheckpointError(
            f"{folder} has no model card; write what these weights are, and what was measured, to {folder}/README.md"
        )
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    address = None if dry_run else push(folder, repo, private=private)
    if as_json:
        options.echo_json({"repo": repo, "files": sizes, "private": private, "address": address})
        return
    for name, size in sizes.items():
        click.echo(f"{size:14,}  {name}")
    click.echo(f"pushed to {address}" if address else f"would be pushed to {repo}")
