"""Addition: several tasks in one model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.drawn_folders import draw

from weightops import Recipe, SearchOptions, TaskVector, add, negate, open_checkpoint
from weightops.checkpoints.matching import convert_to
from weightops.cli.main import run
from weightops.errors import OptionError, UnknownNameError
from weightops.search.descent import Descent, _order
from weightops.search.directions import search_by_gradient
from weightops.search.session import EditSession
from weightops.tasks.table import find_task


@pytest.mark.parametrize(
    ("method", "each"), [("sum", False), ("sum", True), ("ties", False), ("linear", False)]
)
def test_add(
    own: Path, options: dict[str, object], tmp_path: Path, method: str, each: bool
) -> None:
    out = tmp_path / "out"
    paths = [own / "swapped.safetensors", own / "turned.safetensors"]
    tasks = [str(own / "swapped"), str(own / "turned")]
    result = add(tasks, out, method=method, each=each, finetuned=paths, **options)
    for name, task in result["tasks"].items():
        assert task["role"] == "added"
        assert result["normalized"][name] == task["edited"]["acc1"] / task["finetuned"]["acc1"]
    shares = list(result["normalized"].values())
    assert result["mean"]["normalized"] == pytest.approx(np.mean(shares))
    before = [task["base"]["acc1"] for task in result["tasks"].values()]
    assert result["mean"]["accuracy"] > np.mean(before)
    if method == "sum":
        alphas = list(result["alpha"].values()) if each else [result["alpha"]] * 2
        a, b = (TaskVector.load(path) * alpha for path, alpha in zip(paths, alphas, strict=True))
        expected = (a + b).apply(own / "model").state_dict()
        written = open_checkpoint(out).state_dict()
        assert all(torch.allclose(t, expected[name], atol=1e-5) for name, t in written.items())


def test_options_are_recorded(own: Path, options: dict[str, object], tmp_path: Path) -> None:
    paths = [own / "swapped.safetensors", own / "turned.safetensors"]
    tasks = [str(own / "swapped"), str(own / "turned")]
    given = {"method": "ties", "method_options": {"density": 0.3}, "objective": "worst"}
    result = add(tasks, tmp_path / "out", finetuned=paths, **given, **options)
    used = {"method": "ties", "density": 0.3, "normalize": "weights", "scope": "tensor"}
    used["rescale"] = "none"
    used |= {"count": "all", "each": False, "objective": "worst"}
    assert result["options"] == used
    assert json.loads((tmp_path / "out/summary.json").read_text())["options"] == used
    for file in ("README.md", "report.html"):
        text = (tmp_path / "out" / file).read_text(encoding="utf-8")
        assert "density" in text
        assert "worst" in text
    made_from = open_checkpoint(tmp_path / "out").source.made_from
    assert made_from["recipe"] == {"verb": "add", "alpha": result["alpha"], **used}


def test_a_pair_that_nothing_improves_is_measured_at_zero(
    own: Path, options: dict[str, object], tmp_path: Path
) -> None:
    draw(tmp_path / "also-plain", {"star": "star", "cross": "cross", "square": "square"}, 30, 3)
    tasks = [own / "plain", tmp_path / "also-plain", own / "swapped"]
    harmful = TaskVector.load(own / "turned.safetensors") * 30
    vectors = [harmful, harmful, TaskVector.load(own / "swapped.safetensors") - 2 * harmful]
    result = add(
        list(map(str, tasks)),
        tmp_path / "out",
        finetuned=vectors,
        objective="mean",
        pairs=True,
        **options,
    )
    assert result["alpha"] > 0  # the sum of the three doesn't harm
    assert result["subsets"][0]["alpha"] == 0


def test_on_the_command_line(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = ["--vector", own / "swapped.safetensors", "--vector", own / "turned.safetensors"]
    arguments = ["add", "--tasks", f"{own / 'swapped'},{own / 'turned'}", *vectors]
    arguments += ["--model", own / "model", "--alphas", "0.5,1", "--device", "cpu", "-q"]
    command = [*map(str, arguments), "-o", str(tmp_path / "a")]
    assert run([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tasks"] == {"swapped": "added", "turned": "added"}
    assert plan["training_samples"] == 0
    assert run(command) == 0
    assert "normalized accuracy" in capsys.readouterr().out
    assert (tmp_path / "a" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_refusals(own: Path) -> None:
    with pytest.raises(OptionError, match="two tasks at least"):
        add(["mnist"], own / "x")
    with pytest.raises(OptionError, match="one vector of all"):
        add(["mnist", "digits"], own / "x", method="ties", each=True)
    with pytest.raises(UnknownNameError, match="no objective 'best'"):
        add(["mnist", "digits"], own / "x", objective="best")


@pytest.mark.parametrize(("strategy", "per"), [("entropy", "tensor"), ("loss", "task")])
def test_coefficients_by_gradient(
    own: Path, tmp_path: Path, strategy: str, per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own)  # the recipe names files from the working folder on
    out = tmp_path / "out"
    paths = [own / "swapped.safetensors", own / "turned.safetensors"]
    tasks = [str(own / "swapped"), str(own / "turned")]
    given = {"model": own / "model", "device": "cpu", "finetuned": paths, "search_steps": 30}
    found = SearchOptions(strategy=strategy)
    result = add(tasks, out, search=found, per=per, search_lr=0.02, **given)
    values = [set(of_task.values()) for of_task in result["coefficients"].values()]
    assert all(len(of_task) > 1 if per == "tensor" else len(of_task) == 1 for of_task in values)
    assert result["mean"]["accuracy"] > np.mean(
        [t["base"]["acc1"] for t in result["tasks"].values()]
    )
    assert result["transductive"] is False
    assert result["options"]["search"] == strategy
    labels = "without labels" if strategy == "entropy" else "with labels"
    assert result["chosen_on"] == f"the train images, {labels}, of swapped, turned"
    repeated = Recipe.read(out / "recipe.yaml").merge().state_dict()
    written = open_checkpoint(out).state_dict()
    assert all(torch.allclose(t, written[name], atol=1e-6) for name, t in repeated.items())


@pytest.mark.parametrize("per", ["direction", "tensor"])
def test_a_recipe_finds_its_vectors_from_anywhere(
    own: Path, tmp_path: Path, per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors lie beside the recipe, and what was given where the run was."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    open_checkpoint(own / "model").save("pre")
    names = ("swapped", "turned")
    for name in names:
        shutil.copyfile(own / f"{name}.safetensors", f"{name}.safetensors")
    options = {"search": SearchOptions(strategy="entropy"), "per": per, "search_steps": 2}
    given = [f"{name}.safetensors" for name in names]
    tasks = [str(own / name) for name in names]
    add(tasks, "out", model="pre", device="cpu", finetuned=given, **options)
    written = open_checkpoint("out").state_dict()
    if per == "direction":  # another run's vector has the same name
        vectors = [f"task_vector.{name}.safetensors" for name in names]
        shutil.copyfile(f"out/{vectors[1]}", f"elsewhere/{vectors[0]}")
    for place, file in ((".", "out"), ("out", "."), ("elsewhere", "../out")):
        monkeypatch.chdir(tmp_path / place)
        assert run(["merge", f"{file}/recipe.yaml", "-o", "again"]) == 0
        repeated = open_checkpoint("again").state_dict()
        assert all(torch.allclose(t, written[name], atol=1e-6) for name, t in repeated.items())
    monkeypatch.chdir(tmp_path)
    assert run(["merge", "again/recipe.yaml", "-o", "twice"]) == 0
    assert run(["verify", "out"]) == 0


@pytest.mark.parametrize("saved", ["vectors", "weights"])
def test_a_gradient_of_a_model_in_other_names(
    own: Path,
    tmp_path: Path,
    saved: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A CLIP model of transformers is run in open_clip's names, which its files don't have."""
    monkeypatch.chdir(tmp_path)
    model = open_checkpoint(own / "model")
    convert_to(model, "transformers").save("pre")
    names = ("swapped", "turned")
    for name in names:
        vector = TaskVector.load(own / f"{name}.safetensors")
        convert_to(vector.apply(model), "transformers").save(name)
        TaskVector("pre", name).save(f"{name}.safetensors")
    given = [f"{name}.safetensors" if saved == "vectors" else name for name in names]
    found = SearchOptions(strategy="entropy")
    tasks = [str(own / name) for name in names]
    options = {"model": "pre", "device": "cpu", "search": found, "search_steps": 2}
    result = add(tasks, "out", finetuned=given, **options)
    assert len({*result["coefficients"]["swapped"].values()}) > 1
    monkeypatch.chdir("out")
    shutil.copytree("../pre", "pre")  # the base is named from the working folder on
    caplog.clear()
    again = Recipe.read("recipe.yaml").merge()
    assert not caplog.records
    written = convert_to(open_checkpoint("."), "transformers").state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.allclose(tensor, written[name], atol=1e-6)


def test_the_gradient_of_coefficients(own: Path) -> None:
    """One step goes against the derivative of the loss, by differences of it."""
    model = open_checkpoint(own / "model")
    tasks = [find_task(str(own / "swapped")), find_task(str(own / "turned"))]
    session = EditSession(model, tasks, device="cpu")
    vectors = {t.name: TaskVector.load(own / f"{t.name}.safetensors") for t in tasks}
    before = {n: t.clone() for n, t in session.model.module.state_dict().items()}
    options = Descent("loss", "task", "train", 1, 1e-3, 0)
    moved = search_by_gradient(session, vectors, tasks, options)[1]["coefficients"]
    after = session.model.module.state_dict()
    assert all(torch.equal(before[name], t) for name, t in after.items())

    @torch.no_grad()
    def loss(coefficients: dict[str, float]) -> float:
        total = 0.0
        first, second = (vector * coefficients[name] for name, vector in vectors.items())
        edit = first + second
        edit.apply_(session.model.module, base=session.base)
        for task in tasks:
            indices = next(_order(session, task, options))
            pixels = session.model.pixels(task, "train")
            head = session.model.zero_shot_head(task)
            logits = session.model.encode_image(pixels.batch(indices)) @ head.T
            labels = pixels.labels[torch.from_numpy(indices)]
            total += float(torch.nn.functional.cross_entropy(logits, labels)) / 2
        return total

    for name in vectors:
        start = dict.fromkeys(vectors, 0.3)
        slope = loss({**start, name: 0.31}) - loss({**start, name: 0.29})
        step = next(iter(moved[name].values())) - 0.3
        assert step == pytest.approx(-1e-3 * np.sign(slope), rel=1e-3)


def test_refusals_of_a_gradient(own: Path, tmp_path: Path) -> None:
    search = SearchOptions(strategy="entropy")
    with pytest.raises(OptionError, match="coefficients of a sum of vectors"):
        add(["mnist", "digits"], tmp_path / "x", method="ties", search=search)
    with pytest.raises(OptionError, match="search race follows no gradient, which per="):
        add(["mnist", "digits"], tmp_path / "x", per="task")
    with pytest.raises(OptionError, match="search race follows no gradient, which per="):
        add(["mnist", "digits"], tmp_path / "x", search_steps=100)
    with pytest.raises(UnknownNameError, match="no search on 'all'"):
        add(["mnist", "digits"], tmp_path / "x", search=search, search_on="all")
    with pytest.raises(OptionError, match="search entropy is for additions, not for negate"):
        negate(
            str(own / "swapped"),
            tmp_path / "x",
            model=own / "model",
            control=[str(own / "plain")],
            finetuned=own / "swapped.safetensors",
            search=search,
            device="cpu",
        )


def test_a_search_by_gradient_tries_no_alphas(own: Path, tmp_path: Path) -> None:
    found = SearchOptions((0, 1), "entropy")
    with pytest.raises(OptionError, match="follows a gradient, and tries no alphas"):
        add(
            [str(own / "swapped"), str(own / "turned")], tmp_path, model=own / "model", search=found
        )
