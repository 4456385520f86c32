"""Fisher merging and RegMean, against formulas in float64, and the statistics that they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.merges import State, family, statistic
from safetensors import safe_open
from safetensors.torch import save_file

from weightops import Recipe, average, collect, merge, open_checkpoint
from weightops.cli.main import run
from weightops.errors import (
    MethodError,
    MismatchError,
    NonfiniteError,
    OptionError,
    RecipeError,
    SpaceError,
    UnknownNameError,
    WeightopsError,
)
from weightops.evaluation.zero_shot import logits
from weightops.statistics.statistic import statistic_source

SHAPES = {"matrix": (6, 4), "conv": (3, 2, 2, 2), "vector": (33,), "frozen": (5, 5)}


def models_and(kind: str, k: int = 3) -> tuple[list[State], list[dict[str, State]]]:
    _, models = family(k, shapes=SHAPES)
    statistics = [{kind: statistic(kind, model, i)} for i, model in enumerate(models)]
    for entry in statistics:
        entry[kind].pop("frozen")
    return models, statistics


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher_against_the_formula(normalize: bool) -> None:
    models, statistics = models_and("fisher")
    given = {"weights": [1.0, 2.0, 0.5], "normalize": normalize, "floor": 0.01}
    merged = merge(models, "fisher", statistics=statistics, **given)
    fishers = [{n: t.double().numpy() for n, t in entry["fisher"].items()} for entry in statistics]
    norms = [np.sqrt(sum((f**2).sum() for f in fisher.values())) for fisher in fishers]
    for name in ("matrix", "conv", "vector"):
        shares = [
            w / (norm + 0.01 if normalize else 1) * (fisher[name] + 0.01)
            for w, norm, fisher in zip(given["weights"], norms, fishers, strict=True)
        ]
        values = [model[name].double().numpy() for model in models]
        expected = sum(s * v for s, v in zip(shares, values, strict=True)) / sum(shares)
        np.testing.assert_allclose(merged[name].numpy(), expected, atol=1e-6)
    plain = average([{"frozen": m["frozen"]} for m in models], given["weights"])
    assert torch.allclose(merged["frozen"], plain["frozen"], atol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 0.6, 0.0])
def test_regmean_against_the_formula(ratio: float) -> None:
    models, statistics = models_and("gram")
    weights = [1.0, 2.0, 0.5]
    merged = merge(models, "regmean", statistics=statistics, weights=weights, ratio=ratio)
    for name in ("matrix", "conv"):
        numerator, total = 0.0, 0.0
        for w, model, entry in zip(weights, models, statistics, strict=True):
            gram = entry["gram"][name].double().numpy()
            gram = w * (ratio * gram + (1 - ratio) * np.diag(np.diag(gram)))
            numerator = (
                numerator + model[name].double().numpy().reshape(len(model[name]), -1) @ gram
            )
            total = total + gram
        expected = numerator @ np.linalg.inv(total)
        got = merged[name].reshape(expected.shape).numpy()
        np.testing.assert_allclose(got, expected, atol=1e-5)
    plain = average([{"frozen": m["frozen"]} for m in models], weights)
    assert torch.allclose(merged["frozen"], plain["frozen"], atol=1e-6)


def test_regmean_where_the_input_is_first_or_the_weight_has_parts() -> None:
    """A map is merged in whatever layout the weights have it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    maps = [draw(2, 4, 5) for _ in range(2)]  # two maps of each model, (out, in)
    inputs = [draw(2, 30, 5) for _ in range(2)]
    grams = [x.mT @ x / 30 for x in inputs]
    alone = [
        merge(
            [{"w": m[i]} for m in maps],
            "regmean",
            statistics=[{"gram": {"w": g[i]}} for g in grams],
        )["w"]
        for i in range(2)
    ]
    packed = [
        {
            "rows": m.reshape(8, 5),
            "columns": m.transpose(0, 1)
            .reshape(8, 5)
            .view(4, 2, 5)
            .transpose(0, 1)
            .flatten(0, 1)
            .T,
            "experts": m,
            "turned": m.mT.contiguous(),
        }
        for m in maps
    ]
    record = {"kind": "gram", "input_first": ["columns", "turned"]}
    statistics = [
        {"gram": open_checkpoint_of(dict.fromkeys(packed[0], gram), record)} for gram in grams
    ]
    merged = merge(packed, "regmean", statistics=statistics)
    assert torch.allclose(merged["rows"], torch.cat(alone), atol=1e-6)
    assert torch.allclose(merged["columns"], torch.cat(alone).T, atol=1e-6)
    assert torch.allclose(merged["experts"], torch.stack(alone), atol=1e-6)
    assert torch.allclose(merged["turned"], torch.stack(alone).mT, atol=1e-6)


def open_checkpoint_of(tensors: State, record: dict[str, Any]) -> Any:
    from weightops.algebra.linear_form import LinearForm
    from weightops.checkpoints.checkpoint import Checkpoint

    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return Checkpoint(LinearForm.of(statistic_source(copies, "a statistic", record)))


def test_an_input_that_is_always_zero_is_averaged() -> None:
    models, statistics = models_and("gram", 2)
    for entry in statistics:
        entry["gram"]["matrix"][:, 1] = entry["gram"]["matrix"][1] = 0
    merged = merge(models, "regmean", statistics=statistics, ratio=1.0)["matrix"]
    mean = (models[0]["matrix"] + models[1]["matrix"]) / 2
    assert torch.allclose(merged[:, 1], mean[:, 1], atol=1e-6)
    assert not torch.allclose(merged, mean, atol=1e-3)


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models near to the embedded one, with their statistics in files."""
    root = tmp_path_factory.mktemp("two")
    base = open_checkpoint("embedded")
    for i, task in enumerate(("mnist", "digits")):
        generator = torch.Generator().manual_seed(i)
        state = {
            name: tensor + 0.02 * tensor.std() * torch.randn(tensor.shape, generator=generator)
            if name.startswith("visual.transformer") and tensor.dim() > 1
            else tensor
            for name, tensor in base.state_dict().items()
        }
        model = base.with_form(open_checkpoint(state).form, base.architecture)
        folder = model.save(root / f"m{i}")
        for kind in ("gram", "fisher"):
            collect(folder, task, kind, images=20).save(root / f"m{i}.{kind}.safetensors")
    return root


def test_regmean_keeps_outputs_better_than_the_average(two_models: Path) -> None:
    from weightops import ImageModel
    from weightops.tasks.table import find_task

    files = [two_models / f"m{i}" for i in range(2)]
    statistics = [{"gram": two_models / f"m{i}.gram.safetensors"} for i in range(2)]
    merged = merge(files, "regmean", statistics=statistics)
    mean = merge(files, "linear")
    errors = []
    for candidate in (merged, mean):
        total = 0.0
        for file, task in zip(files, ("mnist", "digits"), strict=True):
            own, other = (
                torch.cat(list(logits(ImageModel.open(m, "cpu"), find_task(task), "validation")))
                for m in (file, candidate)
            )
            total += float((own - other).detach().square().mean())
        errors.append(total)
    assert errors[0] < errors[1]


def test_recipes_and_the_command_line(two_models: Path, tmp_path: Path, capsys: Any) -> None:
    files = [str(two_models / f"m{i}") for i in range(2)]
    grams = [str(two_models / f"m{i}.gram.safetensors") for i in range(2)]
    named = ["--statistics", grams[0], "--statistics", grams[1]]
    command = ["merge", *files, "--method", "regmean", *named]
    assert run([*command, "--print-recipe"]) == 0
    (tmp_path / "r.yaml").write_text(text := capsys.readouterr().out)
    assert Recipe.read(tmp_path / "r.yaml").to_yaml() == text
    assert run([*command, "-o", str(tmp_path / "a"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    sizes = [sum(s.nbytes for s in open_checkpoint(g).specs.values()) for g in (*files, *grams)]
    assert plan["bytes_read"] >= sum(sizes) * 0.95
    assert run([*command, "-o", str(tmp_path / "a")]) == 0
    assert run(["merge", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "b")]) == 0
    a, b = (open_checkpoint(tmp_path / name) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    record = json.dumps(a.source.made_from)
    assert open_checkpoint(grams[0]).fingerprint in record
    made = Recipe.of(
        {
            "method": "fisher",
            "models": [
                {"model": file, "statistics": {"fisher": {"task": task, "images": 20}}}
                for file, task in zip(files, ("mnist", "digits"), strict=True)
            ],
        }
    )
    fishers = [{"fisher": two_models / f"m{i}.fisher.safetensors"} for i in range(2)]
    same = merge(files, "fisher", statistics=fishers)
    assert all(torch.equal(same[name], tensor) for name, tensor in made.merge().items())
    assert run([*command[:-2], "-o", str(tmp_path / "c")]) == 2
    assert "there are 2 models, and --statistics names 1" in capsys.readouterr().err
    out = tmp_path / "gram.safetensors"
    assert run(["statistics", files[0], "--task", "mnist", "--images", "20", "-o", str(out)]) == 0
    assert out.read_bytes() == Path(grams[0]).read_bytes()


def test_statistics_that_do_not_fit(two_models: Path) -> None:
    models, statistics = models_and("gram", 2)
    wide = [{n: t.double() for n, t in m.items()} for m in models]
    swapped = [{"gram": two_models / f"m{i}.gram.safetensors"} for i in (1, 0)]
    files = [two_models / f"m{i}" for i in range(2)]
    one_less = [statistics[0], {"gram": {"conv": statistics[1]["gram"]["conv"]}}]
    strange = [{"gram": {"other": torch.eye(4)}} for _ in range(2)]
    flat = [{"gram": {"matrix": torch.eye(6)}} for _ in range(2)]
    half = [{"gram": {"matrix": torch.eye(4).half()}} for _ in range(2)]
    few = [{"gram": {"matrix": torch.ones(4, 4)}} for _ in range(2)]
    nan = [{"gram": {"matrix": torch.full((4, 4), torch.nan)}} for _ in range(2)]
    fisher = [{"gram": two_models / f"m{i}.fisher.safetensors"} for i in range(2)]
    lopsided = [{"gram": {"matrix": torch.ones(4, 4).triu()}} for _ in range(2)]
    negative = [{"gram": {"matrix": -torch.eye(4)}} for _ in range(2)]
    weights = [{"gram": file} for file in files]
    opened = [collect(file, "mnist", images=2) for file in files]
    refused: list[tuple[Any, Any, type[WeightopsError], str]] = [
        (models, None, OptionError, "regmean needs the gram statistics of 2 models"),
        (models, statistics[:1], OptionError, "there are those of 1"),
        (models, [{"fisher": {}}] * 2, OptionError, "takes the statistics gram, and model 1 has"),
        (files, swapped, MismatchError, r"m1 \(\w+\), not of .*m0 \(\w+\)"),
        (files, fisher, MismatchError, "is a fisher statistic, and a gram is needed"),
        (models, one_less, MismatchError, "only one has matrix"),
        (models, strange, MismatchError, "a statistic of other, which the models don't have"),
        (models, flat, MismatchError, r"matrix with shape \(6, 6\), and no gram of a weight"),
        (models, half, MismatchError, "holds matrix in float16, and a statistic needs float32"),
        (wide, statistics, MismatchError, "in float32, and the weight is float64"),
        (models, nan, NonfiniteError, "regmean at matrix: a state dict holds NaN or Inf"),
        (models, few, MethodError, "regmean at matrix: the sum of the Gram matrices is singular"),
        (models, lopsided, MismatchError, "regmean at matrix: a state dict holds no symmetric"),
        (models, negative, MismatchError, "regmean at matrix: a state dict holds negative squares"),
        (files, weights, SpaceError, "m0 holds weights, not a gram statistic"),
        (models, ["a", "b"], OptionError, "has a mapping for each model, not 'a'"),
        (models, "a.safetensors", OptionError, "has a mapping for each model, not 'a.safe"),
        (models, {"gram": ["a", "b"]}, OptionError, "has a mapping for each model, not {'gram'"),
        (models, opened, OptionError, "has a mapping for each model, not Checkpoint"),
        (
            models,
            [statistics[0], {}],
            OptionError,
            "takes the statistics gram, and model 2 has none",
        ),
    ]
    for inputs, given, error, match in refused:
        with pytest.raises(error, match=match):
            merge(inputs, "regmean", statistics=given, ratio=1.0)["matrix"]
    with pytest.raises(SpaceError, match="holds a fisher statistic, not weights"):
        merge([entry["gram"] for entry in fisher], "linear")
    with pytest.raises(OptionError, match="linear takes no statistics"):
        merge(models, "linear", statistics=statistics)
    with pytest.raises(UnknownNameError, match="kind of statistic 'grams'"):
        Recipe.of({"models": [{"model": "a", "statistics": {"grams": "b"}}]})
    with pytest.raises(RecipeError, match="gram is a ref or a mapping"):
        Recipe.of({"models": [{"model": "a", "statistics": {"gram": 3}}]})
    after = {"fisher": {"task": "mnist", "after": "merged"}}
    with pytest.raises(RecipeError, match="after: merged is for gram, not for fisher"):
        Recipe.of({"models": [{"model": "a", "statistics": after}]})
    merged_after = {"gram": {"task": "mnist", "images": 2, "after": "merged"}}
    entries = [
        {"model": str(files[0]), "statistics": merged_after},
        {"model": str(files[1]), "statistics": {"gram": str(two_models / "m1.gram.safetensors")}},
    ]
    with pytest.raises(RecipeError, match="after: merged is for all models"):
        Recipe.of({"method": "regmean", "models": entries}).merge()


def test_fishers_and_weights_that_cannot_be() -> None:
    models, statistics = models_and("fisher", 2)
    refused: list[tuple[Any, dict[str, Any], type[WeightopsError], str]] = [
        (lambda t: -t, {}, MismatchError, "a state dict holds negative squares"),
        (torch.zeros_like, {}, MismatchError, "a state dict is 0 everywhere"),
        (lambda t: t, {"floor": -1.0}, OptionError, "floor is at least 0"),
    ]
    for change, options, error, match in refused:
        changed = {name: change(tensor) for name, tensor in statistics[0]["fisher"].items()}
        given = [{"fisher": changed}, statistics[1]]
        with pytest.raises(error, match=match):
            merge(models, "fisher", statistics=given, **options)["matrix"]
    models, statistics = models_and("gram", 2)
    with pytest.raises(MethodError, match="as some weights are negative"):
        merge(models, "regmean", statistics=statistics, weights=[-2, 3])["matrix"]


@pytest.mark.parametrize(
    "command",
    [
        "vector {gram} {model}",
        "vector {model} {gram}",
        "evaluate {gram} --tasks mnist --device cpu",
        "statistics {gram} --task mnist -o x.safetensors",
        "merge {model} {model} --base {gram} --method ties -o x",
        "pack {gram} --base {model} -o x.safetensors",
    ],
)
def test_statistics_where_weights_are_needed(
    two_models: Path,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"gram": two_models / "m0.gram.safetensors", "model": two_models / "m1"}
    assert run(command.format(**given).split()) == 1
    error = capsys.readouterr().err
    assert "m0.gram.safetensors holds a gram statistic, not weights" in error
    assert "--statistics" in error


def test_statistics_on_another_task_than_a_model_learnt(
    two_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learnt, other = str(tmp_path / "learnt"), str(two_models / "m1")
    given = ["--task", "mnist", "--steps", "1", "--batch-size", "2"]
    assert run(["finetune", "--model", str(two_models / "m0"), *given, "-o", learnt]) == 0
    of_other = str(two_models / "m1.gram.safetensors")
    for task, code in (("digits", 1), ("mnist", 0), ("first-half:mnist", 0)):
        own = str(tmp_path / f"{code}{task[:5]}.safetensors")
        assert run(["statistics", learnt, "--task", task, "--images", "8", "-o", own]) == 0
        capsys.readouterr()
        named = ["--statistics", own, "--statistics", of_other, "-o", str(tmp_path / task)]
        assert run(["merge", learnt, other, "--method", "regmean", *named]) == code
    recipe = {"method": "regmean", "models": []}
    for model, task in ((learnt, "digits"), (other, "digits")):
        entry = {"model": model, "statistics": {"gram": {"task": task, "images": 8}}}
        recipe["models"].append(entry)
    with pytest.raises(MismatchError, match=r"on digits, and the model has learnt mnist"):
        Recipe.of(recipe).merge()


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        ("resblocks.2.mlp", r"0\.safetensors lacks visual\.\S*resblocks\.2\.mlp\.c_fc"),
        ("visual.proj", r"0\.safetensors holds \d+ of the \d+ tensors"),
    ],
)
@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_statistics_without_a_layer(
    two_models: Path,
    tmp_path: Path,
    kind: str,
    left_out: str,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    method = {"gram": "regmean", "fisher": "fisher"}[kind]
    files, named = [str(two_models / f"m{i}") for i in range(2)], []
    for i in range(2):
        with safe_open(two_models / f"m{i}.{kind}.safetensors", "pt") as file:
            names = [name for name in sorted(file.keys()) if left_out not in name]
            kept = {name: file.get_tensor(name) for name in names}
            save_file(kept, tmp_path / f"{i}.safetensors", file.metadata())
        named += ["--statistics", str(tmp_path / f"{i}.safetensors")]
    out = str(tmp_path / "merged")
    assert run(["merge", *files, "--method", method, *named, "-o", out]) == 1
    error = capsys.readouterr().err
    assert re.search(told, error)
    assert "collect it again" in error


def test_a_method_of_ones_own_with_statistics() -> None:
    def most_certain(models: torch.Tensor, fishers: torch.Tensor | None) -> torch.Tensor:
        """Take each parameter from the model with the most information."""
        if fishers is None:
            return models.mean(0)
        return models.gather(0, fishers.argmax(0, keepdim=True))[0]

    models, statistics = models_and("fisher")
    merged = merge(models, most_certain, statistics=statistics)
    stacked = torch.stack([entry["fisher"]["vector"] for entry in statistics])
    wanted = [models[int(i)]["vector"][j] for j, i in enumerate(stacked.argmax(0))]
    assert torch.equal(merged["vector"], torch.stack(wanted))


def test_too_few_images_are_told(caplog: pytest.LogCaptureFixture) -> None:
    for images, warned in ((2, True), (96, False)):
        caplog.clear()
        gram = collect("embedded", "mnist", images=images)
        merge(["embedded"] * 2, "regmean", statistics=[{"gram": gram}] * 2)
        assert ("from too few images, at visual.conv1.weight" in caplog.text) == warned
