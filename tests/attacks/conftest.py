from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from gadgets import GADGETS
    from test_mutants import FORMS, INSIDE

    mutants = sum(count for count, *_ in (*FORMS.values(), *INSIDE.values()))
    terminalreporter.write_line(
        f"attacks: {len(GADGETS)} gadgets in 4 containers, {mutants:,} damaged files of {len(FORMS) + len(INSIDE)} kinds"
    )
