"""Processes that are interrupted."""

import signal


def heed_interrupts() -> None:
    """Let a child process be ended by Ctrl-C, which a shell's background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
