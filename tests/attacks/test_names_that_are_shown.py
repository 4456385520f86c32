"""Names from files with control characters and line breaks: none reaches a terminal or a page."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightops import open_checkpoint
from weightops.cli.main import _OneLine, run
from weightops.errors import CheckpointError, WeightopsError, printable
from weightops.hub.cards import CardFacts, merge_card
from weightops.support.json_files import json_text

EVIL = "a\nweightops: all is well\x1b[2J\x9b\u202e\r\x07.weight"
SEEN = {"\n", "\x1b", "\x9b", "\u202e", "\r", "\x07"}


def harmless(text: str) -> bool:
    """Return whether a text holds none of the characters and no line of its own making."""
    kept = SEEN & set(text) - {"\n"}
    return not kept and "\nweightops: all is well" not in text


@pytest.mark.parametrize("more", [[], ["--tensors"], ["--json"], ["--tensors", "--json"]])
def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    record = {"terms": [{"ref": EVIL, "fingerprint": EVIL, "coefficient": 1}]}
    path = tmp_path / "x.safetensors"
    save_file({EVIL: torch.ones(2), "b": torch.ones(1)}, path, {"weightops": json.dumps(record)})
    torch.save({EVIL: torch.ones(2), f"{EVIL}2": "text"}, tmp_path / "x.pt")
    for file in (path, tmp_path / "x.pt"):
        assert run(["inspect", str(file), *more]) == 0
        shown = capsys.readouterr().out
        assert harmless(shown)
        if "--tensors" in more and "--json" in more:
            assert EVIL in json.loads(shown)["tensors"]


@pytest.mark.parametrize(
    "record", [{"terms": [3]}, {"terms": [{"coefficient": "x"}]}, {"adapter": {}}, {"recipe": {}}]
)
def test_records_that_are_not_sound(
    tmp_path: Path, record: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"b": torch.ones(1)}, path, {"weightops": json.dumps(record)})
    assert run(["inspect", str(path)]) == 0


def test_errors_and_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = WeightopsError(f"{EVIL} is missing", hint=f"choose {EVIL}")
    assert harmless(str(error))
    assert str(error).count("\n") == 1
    assert str(error.prefixed("x")).count("\n") == 1
    folder = tmp_path / f"f{EVIL.replace('/', '')}"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder / "x.safetensors")
    assert harmless(str(caught.value))
    assert run(["inspect", str(folder)]) == 1
    assert harmless(capsys.readouterr().err)
    record = logging.LogRecord("weightops", logging.WARNING, "", 0, "%s", (EVIL,), None)
    assert "\n" not in _OneLine("%(message)s").format(record)
    assert harmless(_OneLine("%(message)s").format(record))


def test_cards_and_json() -> None:
    merge = merge_card("linear", [EVIL, "x`\n# Title <script>"], None, "method: linear\n")
    card = merge.text(CardFacts(), "cpu")
    assert harmless(card)
    assert "<script>" not in card
    assert "\n# Title" not in card
    assert harmless(json_text({EVIL: EVIL}))
    assert json.loads(json_text({EVIL: EVIL})) == {EVIL: EVIL}
    assert printable("ein Gänsefüßchen, 漢字") == "ein Gänsefüßchen, 漢字"
