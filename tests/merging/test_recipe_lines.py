"""Errors in recipes: the line of what is wrong, and the exit code of misuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightops.cli.main import run

HEAD = "method: ties\nbase: embedded\nmodels:\n- embedded\n- embedded\n"


def refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return what is said of a recipe that is refused as misuse, without the file's name."""
    file = tmp_path / "r.yaml"
    file.write_text(text)
    assert run(["merge", str(file), "-o", str(tmp_path / "out"), *options]) == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err.replace(f"weightops: {file}", "")


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("seed: x", "seed is 'x'"),
        ("rank: x", "rank is 'x'"),
        ("rank: 3", "a rank is for adapters"),
        ("alpha: {nosuch*: 3}", "there is no tensor that matches 'nosuch*'"),
        ("options: 3", "options is a mapping"),
        ("options: {dnsity: 3}", "there is no option of ties 'dnsity'"),
        ("options: {density: x}", "density of ties is a finite number"),
        ("options: {density: 7}", "ties at any tensor: density is a fraction"),
        ("options: {density: {nosuch*: 1}}", "there is no tensor that matches 'nosuch*'"),
        ("batchnorm: 3", "batchnorm is 3, and must be a name"),
        ("batchnorm: mnits", "there is no task 'mnits'"),
        ("dtype: [3]", "dtype is [3], and must be a name"),
        ("base_layers: [3]", "layers are [from, to]"),
        ("named: 3", "named is 3"),
    ],
)
def test_the_line_is_that_of_the_key(
    line: str, fact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(f"{HEAD}{line}\n", tmp_path, capsys).startswith(f": line 6: {fact}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models:\n- a\n- {model: b, layers: [3]}\n", ": line 3: layers are"),
        ("models:\n- a\n- model: a\n  weight: {nosuch*: 3}\n", ": line 4: there is no tensor"),
        ("models: [a]\n\nmethod: tise\n", ": line 3: there is no merge method 'tise'"),
        ("dtype: float32\nslices: 3\n", ": line 2: slices is a list of recipes"),
        ("dtype: float32\nmodules: 3\n", ": line 2: modules maps parts"),
        ("models: [a]\nmodels: [b]\n", " repeats the key 'models' in line 2"),
        ("models: [a\n- b\n", " is not valid YAML, in line 3"),
        ("- a\n", " is not a recipe"),
    ],
)
def test_other_lines(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = text.replace("- a", "- embedded").replace("model: a", "model: embedded")
    assert refused(text.replace("- b", "- embedded"), tmp_path, capsys).startswith(said)


def test_hints_are_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused("method: ties\nmodels: [embedded, embedded]\n", tmp_path, capsys)
    assert "there is no base" in said
    assert "base" in said.partition("hint: ")[2]
    assert "--base" not in said
    for name in ("regmean++", "regmean_plus_plus", "RegMeanPlusPlus"):
        said = refused(f"models: [a]\nmethod: {name}\n", tmp_path, capsys)
        assert "gram: {task: ..., after: merged}" in said


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ("ties --base embedded --density 2", "density is a fraction"),
        ("della --base embedded --density 0.1 --epsilon 0.4", "epsilon"),
        ("nearswap --t -1", "can't be -1"),
    ],
)
def test_a_dry_run_refuses_what_the_method_refuses(
    options: str, fact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["merge", *["embedded"] * 2, "--method", *options.split(), "-o", str(tmp_path / "out")]
    assert run([*line, "--dry-run"]) == 2
    assert fact in capsys.readouterr().err


def test_a_dry_run_refuses_options_of_methods_from_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = "- {model: embedded, statistics: {gram: {task: mnist, images: 2}}}\n"
    text = f"method: regmean\nmodels:\n{entry}{entry}options:\n  ratio: 2\n"
    assert ": line 6: regmean at any" in refused(text, tmp_path, capsys, "--dry-run")
