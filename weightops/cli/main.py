"""``weightops``: find the verb, run it, and turn errors into one line and an exit code."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

import click

from weightops.errors import OptionError, UnknownNameError, WeightopsError
from weightops.support.registry import unknown

VERBS = (
    "patch",
    "negate",
    "add",
    "analogy",
    "soup",
    "lofi",
    "finetune",
    "evaluate",
    "vector",
    "apply",
    "merge",
    "compare",
    "select",
    "inspect",
    "experiment",
    "push",
    "tasks",
    "methods",
    "completion",
)


class Verbs(click.Group):
    """Verbs by the names of the modules that hold them. None of these imports torch before it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are best learnt."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            ctx.fail(str(unknown("verb", cmd_name, VERBS)))
        command: click.Command = import_module(f"weightops.cli.{cmd_name}").command
        return command


@click.group(
    cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="weightops")
def weightops() -> None:
    """Edit models by arithmetic on their weights.

    Results go to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 failed, 2 misused.
    With --debug anywhere, errors come with their traceback.
    """


def main() -> None:
    """The console script."""
    gc.set_threshold(
        100_000
    )  # what torch's import makes lives on: looking it through again and again takes a fifth as long
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("weightops: %(message)s"))
    logging.getLogger("weightops").addHandler(handler)
    logging.getLogger().addHandler(
        logging.NullHandler()
    )  # logging.info of a library adds one that prints if there is none
    logging.getLogger("weightops").setLevel(logging.DEBUG if debug else logging.INFO)
    code = run([argument for argument in arguments if argument != "--debug"], debug=debug)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 1
    os._exit(code)  # taking torch's modules apart one by one would need another half second


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """The interrupts that came, also those that native code below turned into errors of other kinds."""
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    ours = (
        before is signal.default_int_handler
    )  # and not ignored, as in a shell's background, or somebody else's
    if not ours or threading.current_thread() is not threading.main_thread():
        yield came
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run one command line; its exit code."""
    with interrupts() as came:
        return _run(arguments, came, debug)


def _run(arguments: list[str], interrupted: list[int], debug: bool) -> int:
    try:
        weightops.main(arguments, prog_name="weightops", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        click.echo(f"weightops: {error.format_message()}{hint}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, Exception) as error:
        if debug:
            raise
        if isinstance(error, click.Abort) and isinstance(error.__cause__, EOFError):
            error = error.__cause__  # which click takes for the end of what is typed
        if interrupted or isinstance(error, (KeyboardInterrupt, click.Abort)):
            click.echo(
                "weightops: interrupted; nothing is half written (--resume goes on where a verb has it)",
                err=True,
            )
            return 1
        own = isinstance(error, WeightopsError)
        text = str(error) if own else f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.filename and error.strerror:
            own, text = True, f"{error.filename}: {error.strerror}"
        hint = "" if own else " (--debug shows where)"
        click.echo(f"weightops: {text}{hint}", err=True)
        return 2 if isinstance(error, (OptionError, UnknownNameError)) else 1  # misused, or failed
    return 0
