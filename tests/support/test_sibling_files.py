"""Files beside weights: what goes along, and which links are followed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from weightops.errors import CheckpointError
from weightops.support import sibling_files
from weightops.support.sibling_files import copy_companions, other_companions, sibling

NEEDED = (
    *("config.json", "tokenizer.json", "tekken.json", "source.spm", "qwen.tiktoken", "bpe.codes"),
    *("dict.txt", "modeling_x.py", "modules.json", "1_Pooling/config.json", "chat_template.jinja"),
    *("additional_chat_templates/tool_use.jinja", "LICENSE", "tokenizer.model.v3"),
    *("2_Dense/config.json", "2_Dense/model.safetensors"),
)
LEFT = (
    *("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "README.md"),
    *("optimizer.pt", "trainer_state.json", "rng_state_0.pth", ".gitattributes", ".cache/x"),
    *("summary.json", "results.jsonl", "report.html", "changed.html", "frontier.png"),
    *("run.yaml", "recipe.yaml", "runs/events"),
    *("onnx/model.onnx", "checkpoint-5/model.safetensors"),
)


def write(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_what_belongs_to_a_model_goes_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "model", NEEDED + LEFT)
    (tmp_path / "out").mkdir()
    with caplog.at_level(logging.WARNING, "weightops"):
        copy_companions(tmp_path / "model" / "config.json", tmp_path / "out")
    assert "as they are: 2_Dense/model.safetensors" in caplog.text
    copied = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}
    files = {str(path) for path in copied if (tmp_path / "out" / path).is_file()}
    assert files == set(NEEDED)
    assert (tmp_path / "out" / "dict.txt").read_text() == "dict.txt"


def test_companions_that_another_folder_has_otherwise(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        write(folder, ("config.json", "same.txt", "model.safetensors", "in/config.json"))
    (mine / "only_mine.txt").write_text("")
    (mine / "settings.json").write_text('{"a": 1, "transformers_version": "4.1"}')
    (other / "settings.json").write_text('{"transformers_version": "5.2",\n"a": 1}')
    (other / "config.json").write_text("compared setting by setting")
    (other / "in" / "config.json").write_text("likewise")
    (other / "adapter_config.json").write_text("{}")
    assert other_companions(mine / "config.json", other, ["in"]) == []
    (other / "settings.json").write_text('{"a": 2}')
    (other / "same.txt").write_text("other text")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    expected = ["chat_template.jinja", "in/config.json", "same.txt", "settings.json"]
    assert other_companions(mine / "config.json", other) == expected


def test_a_large_file_is_left_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sibling_files, "LARGEST_COMPANION_BYTES", 12)
    write(tmp_path / "model", ("config.json", "a_large_corpus.txt"))
    (tmp_path / "out").mkdir()
    with caplog.at_level(logging.WARNING, "weightops"):
        copy_companions(tmp_path / "model" / "config.json", tmp_path / "out")
    assert "a_large_corpus.txt is left behind" in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def link(file: Path, target: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(os.path.relpath(target, file.parent))


def test_links_into_the_store_of_the_folder_are_followed(tmp_path: Path) -> None:
    write(tmp_path, ("hub/blobs/ab", "hub/blobs/cd", "store/ab/cd", "store/ef/gh", "secret"))
    hub = tmp_path / "hub" / "snapshots" / "main"
    write(hub, ("config.json",))  # edited, and so no link
    link(hub / "vocab.json", tmp_path / "hub/blobs/cd")
    assert sibling(hub / "config.json", "vocab.json").read_text() == "hub/blobs/cd"
    kept = tmp_path / "kept"
    link(kept / "config.json", tmp_path / "store/ab/cd")
    link(kept / "vocab.json", tmp_path / "store/ef/gh")
    assert sibling(kept / "config.json", "vocab.json").read_text() == "store/ef/gh"
    for folder in (hub, kept):
        link(folder / "stolen.json", tmp_path / "secret")
        with pytest.raises(CheckpointError, match=r"a link to .*secret, outside its folder"):
            sibling(folder / "config.json", "stolen.json")
