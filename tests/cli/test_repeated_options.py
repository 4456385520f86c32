"""Options that are repeated, and given as one."""

from __future__ import annotations

import pytest

from weightops.cli.main import run


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "merge a b --method regmean --statistics a,b -o x",
            "once for each model in their order: --statistics A.gram --statistics B.gram",
        ),
        (
            "pack a b --base p -o x --names mnist,digits",
            "there are 2 models and 1 names; --names is repeated, once for each model: --names A",
        ),
        ("pack a b --base p -o x --names c --names c", "each model has a name of its own, not"),
    ],
)
def test_the_way_out_is_told(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 2
    assert said in capsys.readouterr().err


def test_empty_names(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["pack", "a", "b", "--base", "p", "-o", "x", "--names", "", "--names", "b"]
    assert run(line) == 2
    assert "each model has a name of its own" in capsys.readouterr().err
