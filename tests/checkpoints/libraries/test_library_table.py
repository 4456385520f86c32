"""The table of libraries: folders are recognised, and each library refuses what it can't do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.transformers_folders import saved, small_clip

from weightops import open_checkpoint
from weightops.checkpoints.libraries.clip_conversion import convert
from weightops.checkpoints.libraries.table import LIBRARIES, architecture_of
from weightops.checkpoints.matching import as_open_clip, convert_to
from weightops.errors import CheckpointError, UnknownNameError


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A folder of each library."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text(
        json.dumps({"architecture": "test_vit", "num_classes": 1000})
    )
    return {
        "open_clip": open_checkpoint("embedded").save(tmp_path / "open_clip"),
        "transformers": saved(small_clip(0), tmp_path / "transformers"),
        "timm": tmp_path / "timm",
    }


def test_folders_are_recognised(folders: dict[str, Path], tmp_path: Path) -> None:
    for library, folder in folders.items():
        architecture = architecture_of(folder)
        assert type(architecture) is LIBRARIES[library]
        assert architecture.library == architecture.card_facts.library_name == library
        assert architecture.is_classifier is (library == "timm")
        assert "{folder}" in architecture.card_facts.usage
    (tmp_path / "other").mkdir()
    assert architecture_of(tmp_path / "other") is None
    (tmp_path / "other" / "config.json").write_text("{}")
    assert architecture_of(tmp_path / "other") is None
    (tmp_path / "other" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        architecture_of(tmp_path / "other")


def test_a_library_refuses_what_it_cannot_do(folders: dict[str, Path]) -> None:
    open_clip = LIBRARIES["open_clip"](folders["open_clip"])
    timm = LIBRARIES["timm"](folders["timm"])
    with pytest.raises(CheckpointError, match=r"number of layers of .* can't be changed"):
        open_clip.with_layers([(0, 1)], [open_clip])
    with pytest.raises(CheckpointError, match=r"number of classes of .* can't be changed"):
        open_clip.with_classes(list("abc"))
    with pytest.raises(CheckpointError, match="isn't a folder of transformers"):
        timm.tokens("a text")
    with pytest.raises(CheckpointError, match="is a model of timm, not a language model"):
        _ = timm.context
    with pytest.raises(CheckpointError, match="is a model of images: it has no tokenizer"):
        timm.tokenizer()


def test_changes_are_written(folders: dict[str, Path], tmp_path: Path) -> None:
    changed = LIBRARIES["timm"](folders["timm"]).with_classes(list("abc"))
    assert changed.in_dtype(torch.float16) is changed
    (tmp_path / "out").mkdir()
    changed.write(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"architecture": "test_vit", "num_classes": 3, "label_names": list("abc")}


def test_conversions_that_there_are_not(folders: dict[str, Path]) -> None:
    timm = LIBRARIES["timm"](folders["timm"])
    assert convert(timm, "open_clip") is None
    checkpoint = open_checkpoint({"w": torch.zeros(2)})
    assert as_open_clip(checkpoint) is checkpoint
    with pytest.raises(CheckpointError, match="is of no model that is known, and can't be written"):
        convert_to(checkpoint, "timm")
    with pytest.raises(CheckpointError, match="is a model of open_clip, and can't be written"):
        convert_to(open_checkpoint("embedded"), "timm")
    with pytest.raises(UnknownNameError, match="did you mean transformers"):
        convert_to(checkpoint, "transformer")
