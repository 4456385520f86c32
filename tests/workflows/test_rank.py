"""The ranking of task vectors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from weightops import rank
from weightops.cli.main import run
from weightops.errors import OptionError
from weightops.workflows.rank import spearman


def test_the_order_and_its_agreement(own: Path, tmp_path: Path) -> None:
    vectors = {name: own / f"{name}.safetensors" for name in ("swapped", "turned")}
    target, model = str(own / "turned"), own / "model"
    outcome = rank(
        vectors, target, tmp_path / "out", model=model, steps=3, labels=8, truth=True, device="cpu"
    )
    assert outcome.more["order"][0] == "turned"
    assert outcome.more["agreement"].keys() == {"cosine", "gain"}
    text = (tmp_path / "out" / "table.txt").read_text()
    assert text.startswith("What should help turned most: turned")
    unlabelled = rank(vectors, target, model=model, steps=2, labels=0, device="cpu")
    assert unlabelled.header == ["vector", "cosine %"]


def test_rank_correlation() -> None:
    assert spearman([3, 1, 2], [30, 10, 20]) == 1
    assert spearman([3, 1, 2], [1, 3, 2]) == -1
    assert math.isnan(spearman([1], [2]))


@pytest.mark.parametrize("verb", ["rank", "select"])
def test_on_the_command_line(own: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    vectors = [own / "swapped.safetensors", own / "turned.safetensors"]
    target = ["--target", own / "swapped", "--model", own / "model", "--steps", "2", "--json", "-q"]
    assert run([verb, *map(str, [*vectors, *target])]) == 0
    assert json.loads(capsys.readouterr().out)["order"][0] == "swapped"


def test_refusals() -> None:
    with pytest.raises(OptionError, match="no vectors"):
        rank({}, "mnist")
    with pytest.raises(OptionError, match="steps is 0, and must be an integer at least 1"):
        rank({"a": "a"}, "mnist", steps=0)
