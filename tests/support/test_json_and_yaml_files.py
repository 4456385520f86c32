"""JSON and YAML files that ask for much: refused in time that is in proportion to them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from weightops.errors import CheckpointError, RecipeError
from weightops.support.json_files import read_json
from weightops.support.yaml_files import read_documents

JSON = {
    "empty lists": ('{"a": [' + "[]," * 500_000 + "[]]}", "more than 16 times its size"),
    "empty objects": ('{"a": [' + "{}," * 500_000 + "{}]}", "more than 16 times its size"),
    "depth": ("[" * 5000 + "]" * 5000, "nested too deep"),
    "a depth that Python reads": ("[" * 101 + "]" * 101, "nested too deep"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', "repeats the key 'b'"),
    "a very long number": ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
}


@pytest.mark.parametrize("kind", JSON)
def test_json_that_asks_for_much(tmp_path: Path, kind: str) -> None:
    content, refusal = JSON[kind]
    (tmp_path / "x.json").write_text(content)
    begun = time.process_time()
    with pytest.raises(CheckpointError, match=refusal):
        read_json(tmp_path / "x.json")
    assert time.process_time() - begun < 2


YAML = {
    "a number of very many sixtieths": ("a: 1" + ":59" * 300_000, "a number of 900001 char"),
    "a very long hexadecimal number": ("a: 0x" + "f" * 5000, "a number of 5002 characters"),
    "a list of lists of lists by aliases": (
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n"
            for old, new in zip("abcdefg", "bcdefgh", strict=True)
        ),
        "repeats values by aliases too often",
    ),
    "merged mappings": ("a: &a {<<: *a}\n", "holds a value that holds itself|not valid YAML"),
    "a key twice": ("a: 1\nb: {c: 1, c: 2}\n", "repeats the key 'c' in line 2"),
    "depth": ("a: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
    "great depth": ("a: " + "[" * 3000, "not valid YAML"),
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml_that_asks_for_much(tmp_path: Path, kind: str) -> None:
    content, refusal = YAML[kind]
    (tmp_path / "x.yaml").write_text(content)
    begun = time.process_time()
    with pytest.raises(RecipeError, match=refusal):
        read_documents(tmp_path / "x.yaml")
    assert time.process_time() - begun < 10
