"""``weightops completion``."""

from __future__ import annotations

from typing import Literal

import click
from click.shell_completion import get_completion_class

from weightops.cli.from_signature import command


@command(metavar="bash|zsh|fish")
def completion(shell: Literal["bash", "zsh", "fish"], *, json_: bool = False) -> None:
    """Print the script that completes verbs, options and tasks.

        eval "$(weightops completion bash)"

    Args:
        shell: the shell.
    """
    from weightops.cli.main import weightops

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(weightops, {}, "weightops", "_WEIGHTOPS_COMPLETE").source())
