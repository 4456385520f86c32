"""``weightops``: find the verb, run it, and turn errors into a message and an exit code."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

import click

from weightops.errors import OptionError, RecipeError, UnverifiedError, WeightopsError, printable
from weightops.support.invocation import invoked_with
from weightops.support.registry import unknown

VERBS = (
    *("patch", "negate", "add", "analogy", "soup", "lofi", "finetune", "evaluate", "explore"),
    *("vector", "apply", "statistics", "merge", "verify", "pack", "compare", "rank", "inspect"),
    *("experiment", "push", "tasks", "methods", "cache", "env", "completion"),
)
"""The verbs, in the order in which they are best learnt; each has a module of its name here."""

_FORMER = {"select": "rank"}
"""Former names of verbs, which still answer."""

_EXIT_CODES: dict[type[WeightopsError], int] = {OptionError: 2, RecipeError: 2, UnverifiedError: 3}
"""The exit codes of errors that have one of their own; that of the others is 1."""

_GC_THRESHOLD = 1_000_000
"""Allocations between garbage collections. What torch's import allocates lives as long as the
process, and looking through it again and again takes a fifth of the import's time."""


class Verbs(click.Group):
    """The verbs. No module of theirs imports torch before the verb runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = _FORMER.get(cmd_name, cmd_name)
        if name not in VERBS:
            ctx.fail(str(unknown("verb", cmd_name, VERBS)))
        module = import_module(f"weightops.cli.{name}")
        found = [getattr(module, member, None) for member in ("command", name)]
        return next(command for command in found if isinstance(command, click.Command))


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
    """Run the console script."""
    gc.set_threshold(_GC_THRESHOLD)
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    _log_to_stderr(logging.DEBUG if debug else logging.INFO)
    code = run([argument for argument in arguments if argument != "--debug"], debug=debug)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 1
    os._exit(code)  # unloading torch's modules one by one would take half a second


_BEGINNING = (
    "name a verb: `weightops patch --task mnist` makes a first model, and "
    "`weightops VERB --help` says what a verb can do"
)
"""What to say to someone who types no verb."""


def _log_to_stderr(level: int) -> None:
    handler = _BetweenBars()
    handler.setFormatter(_OneLine("weightops: %(message)s"))
    logger = logging.getLogger("weightops")
    logger.addHandler(handler)
    logger.setLevel(level)
    # A library that logs to the root logger would otherwise add a handler that prints.
    logging.getLogger().addHandler(logging.NullHandler())


_ALLOCATION = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)
"""What the errors say that torch raises where memory is short, on CPU and on CUDA."""


def _out_of_memory(error: BaseException) -> str:
    """Return what was asked for, and what would help."""
    asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    amount = asked[1] if asked else "more"
    if amount.endswith(" bytes"):
        amount = f"{int(amount.removesuffix(' bytes')) / 1e9:,.2f} GB"
    return (
        f"out of memory: {amount} was asked for in one piece\nhint: fewer threads "
        "(OMP_NUM_THREADS=1) hold fewer pieces at once; --device cpu and a smaller --batch-size "
        "help where a verb has them; --dry-run says what a merge takes"
    )


class _BetweenBars(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes messages to stderr, with the bars of a terminal set aside."""

    def emit(self, record: logging.LogRecord) -> None:
        progress = sys.modules.get("weightops.support.progress")
        if progress is not None:
            progress.set_aside()
        super().emit(record)


class _OneLine(logging.Formatter):
    """Formats a message as one line, whatever the names in it are."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = printable(record.message)
        return super().formatMessage(record)


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run one command line and return its exit code."""
    with interrupts() as received, invoked_with(arguments):
        return _run(arguments, received, debug)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect requests to end, including those that native code turns into other errors."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    # A shell ignores interrupts for its background jobs, and a program may have its own handler.
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours = {number: own for number, own in defaults.items() if signal.getsignal(number) == own}
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    try:
        for number in ours:
            signal.signal(number, interrupt)
        yield received
    finally:
        for number, own in ours.items():
            signal.signal(number, own)


def _run(arguments: list[str], interrupted: list[int], debug: bool) -> int:
    twice = {"--overwrite=all": ["--overwrite", "--overwrite"]}
    arguments = [part for given in arguments for part in twice.get(given, [given])]
    try:
        code = weightops.main(arguments, prog_name="weightops", standalone_mode=False)
        return code if isinstance(code, int) else 0  # click returns the code of an exit
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(f"{error.format_message()}\n\nweightops: {_BEGINNING}", err=True)
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        click.echo(f"weightops: {error.format_message()}{hint}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, Exception) as error:
        if debug:
            raise
        if isinstance(error, click.Abort) and isinstance(error.__cause__, EOFError):
            error = error.__cause__  # click takes an EOFError for the end of what is typed
        if interrupted or isinstance(error, (KeyboardInterrupt, click.Abort)):
            text = "interrupted; nothing is half written (--resume resumes where a verb has it)"
            click.echo(f"weightops: {text}", err=True)
            return 1
        click.echo(f"weightops: {_message(error)}", err=True)
        return next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), 1)


def _message(error: BaseException) -> str:
    """Return what to say of an error: those of weightops and of the system speak for themselves."""
    if isinstance(error, WeightopsError):
        return str(error)
    if isinstance(error, MemoryError) or _ALLOCATION.search(str(error)):
        return _out_of_memory(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return printable(f"{error.filename}: {error.strerror}")
    return printable(f"{type(error).__name__}: {error} (--debug shows where)")
