"""``weightops completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the script that completes verbs, options and tasks: eval "$(weightops completion bash)"."""
    from weightops.cli.main import weightops

    completion = get_completion_class(shell)
    assert completion is not None
    click.echo(completion(weightops, {}, "weightops", "_WEIGHTOPS_COMPLETE").source())
