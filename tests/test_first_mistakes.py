"""What a tired person types first gets one sentence, and a remedy that works."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weightops
from weightops import (
    TASKS,
    ImageModel,
    TaskVector,
    average,
    evaluate,
    interpolate,
    merge,
    open_checkpoint,
    rank,
    soup,
)
from weightops.cli.main import run
from weightops.errors import WeightopsError
from weightops.search.strategies import SearchOptions
from weightops.workflows.patch import patch

PRE, FT = {"w": torch.zeros(2)}, {"w": torch.ones(2)}

IN_PYTHON: dict[str, tuple[Callable[[], Any], str]] = {
    "average(a, b)": (lambda: average(PRE, FT), r"takes a list of models.*\[a, b\]"),
    "average(path)": (lambda: average("pre"), r"one path, 'pre', was given"),
    "average(module)": (lambda: average(nn.Linear(2, 2)), r"one module, Linear, was given"),
    "average(a, b) of paths": (lambda: average("a", "b"), r"average\(\[a, b\]\)"),
    "average(weights)": (lambda: average([PRE, FT], "even"), r"must be a number for each model"),
    "merge(a)": (lambda: merge(PRE), r"merge takes a list of models, and a state dict was given"),
    "merge(a, b)": (lambda: merge(PRE, FT), r"merge\(\[a, b\]\)"),
    "soup(path)": (lambda: soup("pre", "out"), r"soup takes a list"),
    "rank(path)": (lambda: rank("pre", "mnist"), r"rank takes a list"),
    "TaskVector(a, None)": (lambda: TaskVector(PRE, None), r"None was given where weights"),
    "TaskVector(tensor)": (lambda: TaskVector(torch.ones(2), FT), r'\{"weight": tensor\}'),
    "TaskVector([a])": (lambda: TaskVector([PRE], FT), r"a list was given where weights"),
    "open(3)": (lambda: open_checkpoint(3), r"an int was given"),
    "interpolate([a, b])": (lambda: interpolate([PRE, FT], FT, 0.5), r"a list was given"),
    "apply(None)": (lambda: TaskVector(PRE, FT).apply(None), r"None was given"),
    "alpha='0.4'": (lambda: TaskVector(PRE, FT).apply(PRE, "0.4"), r"finite number, not '0.4'"),
    "alpha=None": (lambda: TaskVector(PRE, FT).apply(PRE, None), r"finite number, not None"),
    "alphas": (
        lambda: TaskVector(PRE, FT).apply(PRE, torch.linspace(0, 1, 3)),
        r"for a in alphas\]",
    ),
    "split='val'": (lambda: evaluate("embedded", "shapes", split="val"), r"mean validation\?"),
    "evaluate(None)": (lambda: evaluate("embedded", None), r"None was given where a task"),
    "evaluator": (lambda: evaluate("embedded", "shapes", evaluator="zeroshot"), r"zero_shot"),
    "batch_size=0": (lambda: evaluate("embedded", "shapes", batch_size=0), r"at least 1"),
    "task": (lambda: patch("mnst", "out"), r"did you mean mnist\?"),
    "task=None": (lambda: patch(None, "out"), r"None was given where a task"),
    "alphas=0.3": (lambda: SearchOptions(alphas=0.3), r"several numbers, not 0\.3"),
    "pixels": (
        lambda: ImageModel.open("embedded", "cpu").pixels(TASKS["mnist"], "valid"),
        r"mean validation\?",
    ),
}


@pytest.mark.parametrize("name", IN_PYTHON)
def test_a_first_mistake_in_python(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    call, sentence = IN_PYTHON[name]
    with pytest.raises(WeightopsError, match=rf"(?s){sentence}") as raised:
        call()
    assert raised.value.hint or "must be" in raised.value.fact
    assert not list(tmp_path.iterdir())


def test_a_generator_of_models_is_several() -> None:
    assert torch.equal(average(model for model in (PRE, FT))["w"], torch.full((2,), 0.5))


def test_a_list_of_alphas_is_told_to_be_over_the_depth(caplog: pytest.LogCaptureFixture) -> None:
    layers = {f"layers.{i}.w": torch.zeros(1) for i in range(3)}
    tau = TaskVector(layers, {name: torch.ones(1) for name in layers})
    with caplog.at_level(logging.WARNING, "weightops"):
        edited = tau.apply(layers, [0.0, 0.5])
        assert "alpha's 2 numbers are spread over the depth" in caplog.text
        caplog.clear()
        assert tau.apply(layers, {"*": [0.0, 0.5]}).keys() == edited.keys()
        assert not caplog.text
    assert [tensor.item() for tensor in edited.values()] == [0.0, 0.25, 0.5]


def test_a_list_of_alphas_for_vectors(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    open_checkpoint(PRE).save("pre.safetensors")
    for name, step in (("a", 1.0), ("b", 10.0)):
        moved = {key: tensor + step for key, tensor in PRE.items()}
        TaskVector(PRE, moved).save(f"{name}.safetensors")
    start = ["apply", "a.safetensors", "b.safetensors", "--base", "pre.safetensors"]
    for i, alphas in enumerate((["0.5,-0.2"], ["0.5", "-0.2"])):
        options = [text for alpha in alphas for text in ("--alpha", alpha)]
        assert run([*start, *options, "-o", f"out{i}.safetensors"]) == 0
        edited = open_checkpoint(f"out{i}.safetensors").state_dict()
        assert all(torch.allclose(edited[key], PRE[key] - 1.5) for key in PRE)
    capsys.readouterr()
    for arguments, sentence in {
        "a.safetensors --alpha 0.3,0.4": "1 vector and 2 alphas: a model for each alpha is a run",
        "a.safetensors b.safetensors --alpha 1,2,3": "2 vectors and 3 alphas: give one alpha, or",
        "a.safetensors --alpha 0.3 0.4": "0.4 is a number, and no vector; .* --alpha 0.3,0.4",
        "a.safetensors,b.safetensors": "separated by spaces: a.safetensors b.safetensors",
        "a.safetensors --alpha 0.3;0.4": "'0.3;0.4' is neither numbers such as 0,0.1,0.4 nor",
        "a.safetensors --alpha nan": "'nan' is neither numbers",
    }.items():
        assert run(["apply", *arguments.split(), "--base", "pre.safetensors", "-o", "out"]) == 2
        assert re.search(sentence, capsys.readouterr().err), arguments


def test_a_misspelt_name_of_the_package() -> None:
    with pytest.raises(AttributeError, match="did you mean TaskVector"):
        _ = weightops.Taskvector  # type: ignore[attr-defined]


def test_a_name_that_changed_still_works() -> None:
    with pytest.warns(DeprecationWarning, match="is called ImageModel"):
        assert weightops.Clip is weightops.ImageModel


ON_THE_COMMAND_LINE = {
    "": "name a verb: `weightops patch --task mnist`",
    "mrege": "did you mean merge",
    "merge a b --metod ties -o out": "Did you mean '--method'?",
    "merge a b --method ties --bse a -o out": "Did you mean '--base'?",
    "merge a b --method ties --base a --densty 1 -o out": "did you mean density?",
    "merge a b -m ties -o out": "Did you mean '--method'?",
    "merge a,b -o out": "several are separated by spaces: a b",
    "patch mnist": "Did you mean --task mnist?",
    "negate mnist": "Did you mean --target mnist?",
    "evaluate --split val --tasks shapes": "'val' is not one of 'train', 'validation', 'test'",
    "patch --task mnst": "did you mean mnist?",
    "patch --task mnist --steps 0": "0 is not in the range x>=1",
}


@pytest.mark.parametrize("line", ON_THE_COMMAND_LINE)
def test_a_first_mistake_on_the_command_line(
    line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(line.split()) == 2
    printed = capsys.readouterr().err
    assert ON_THE_COMMAND_LINE[line] in printed
    assert "Traceback" not in printed


def test_paths_with_commas(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for folder in ("cats, dogs", "more"):
        for split in ("train", "val", "test"):
            for color in ("red", "blue"):
                place = tmp_path / folder / split / color
                place.mkdir(parents=True)
                Image.new("RGB", (8, 8), color).save(place / "0.png")
    assert run(["evaluate", "--tasks", "cats, dogs,shapes,order=natural:more", "--json"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("cats, dogs", "shapes", "more"))
