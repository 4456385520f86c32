"""Values in mergekit's YAML that depend on the tensor, against what mergekit 0.1.5 gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weightops import open_checkpoint
from weightops.errors import OptionError, UnknownNameError
from weightops.merging.merge import merge
from weightops.merging.recipe import Recipe

Files = tuple[str, list[str]]


def merged(folder: Path, files: Files, text: str) -> dict[str, torch.Tensor]:
    base, models = files
    for name, path in zip(("BASE", "ONE", "TWO"), (base, *models), strict=False):
        text = text.replace(name, path)
    (folder / "recipe.yml").write_text(text)
    return Recipe.read(folder / "recipe.yml").merge().state_dict()


@pytest.mark.parametrize(
    ("setting", "embed", "mlp", "attn", "norm"),
    [
        ("0.25", 0.25, (0.25, 0.25, 0.25), (0.25, 0.25, 0.25), 0.25),
        ("' 25e-2'", 0.25, (0.25, 0.25, 0.25), (0.25, 0.25, 0.25), 0.25),
        ("true", 1, (1, 1, 1), (1, 1, 1), 1),
        ("[0.5]", 0.5, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.5),
        ("[true, '0.5']", 1, (1, 0.75, 0.5), (1, 0.75, 0.5), 1),
        ("[]", 2, (2, 2, 2), (2, 2, 2), 2),
        ("[{filter: layers, value: [0.5, 1]}]", 2, (0.5, 0.75, 1), (0.5, 0.75, 1), 2),
        ("[{filter: layers.1, value: 4}]", 2, (2, 4, 2), (2, 4, 2), 2),
        ("{filter: mlp, value: [3]}", 2, (3, 3, 3), (2, 2, 2), 2),
        ("[{filter: w, value: [1, 0]}, {filter: mlp, value: 5}]", 1, (1, 0.5, 0), (1, 0.5, 0), 1),
        (
            "[{filter: mlp, value: [0, 1]}, {filter: '', value: 3}, {value: 4}]",
            *(3, (0, 0.5, 1), (3, 3, 3), 3),
        ),
        (
            "[{filter: s.0, value: 5}, {filter: layers, value: 6}, {filter: m, value: 7}]",
            *(7, (5, 6, 6), (5, 6, 6), 7),
        ),
    ],
)
def test_a_weight_at_each_tensor(
    setting: str,
    embed: float,
    mlp: tuple[float, ...],
    attn: tuple[float, ...],
    norm: float,
    model_files: Files,
    tmp_path: Path,
) -> None:
    text = "merge_method: linear\nmodels: [{model: ONE, parameters: {weight: SETTING}}]\n"
    shared = "parameters: {weight: 2, normalize: false}\n"
    result = merged(tmp_path, model_files, text.replace("SETTING", setting) + shared)
    one = open_checkpoint(model_files[1][0])
    expected = {"embed.weight": embed, "norm.weight": norm}
    expected |= {f"layers.{i}.mlp.weight": value for i, value in enumerate(mlp)}
    expected |= {f"layers.{i}.attn.weight": value for i, value in enumerate(attn)}
    for name, weight in expected.items():
        assert torch.allclose(result[name], weight * one[name]), name


@pytest.mark.parametrize(
    ("setting", "divided"),
    [
        ("[true, false]", "embed layers.0 layers.1 norm"),
        ("[0, 'yes', 'no']", "layers.1"),
        ("[{filter: layers.2, value: off}]", "embed layers.0 layers.1 norm"),
        ("[{filter: mlp, value: [1, 0]}, {value: n}]", "layers.0.mlp layers.1.mlp"),
        ("[false]", ""),
    ],
)
def test_a_flag_at_each_tensor(
    setting: str, divided: str, model_files: Files, tmp_path: Path
) -> None:
    text = (
        "merge_method: linear\nmodels: [{model: ONE}, {model: TWO}]\n"
        f"parameters: {{weight: 1.5, normalize: {setting}}}\n"
    )
    result = merged(tmp_path, model_files, text)
    one, two = map(open_checkpoint, model_files[1][:2])
    for name, tensor in result.items():
        of_all = any(name.startswith(part) for part in divided.split())
        expected = (one[name] + two[name]) * (0.5 if of_all else 1.5)
        assert torch.allclose(tensor, expected, atol=1e-6), name


def test_a_flag_that_becomes_a_word(model_files: Files, tmp_path: Path) -> None:
    base, models = model_files
    text = (
        "merge_method: ties\nbase_model: BASE\nmodels: [{model: ONE}, {model: TWO}]\n"
        "parameters: {weight: 1, density: 0.5, rescale: [true, false]}\n"
    )
    result = merged(tmp_path, model_files, text)
    for rescale, of_last in (("l1", False), ("none", True)):
        expected = merge(models[:2], "ties", base=base, density=0.5, rescale=rescale)
        names = [name for name in result if ("layers.2" in name) == of_last]
        assert all(torch.equal(result[name], expected[name]) for name in names)
    with pytest.raises(OptionError, match="a list of numbers, not"):
        merge(models[:2], "ties", base=base, density=0.5, rescale=[])
    with pytest.raises(UnknownNameError, match="rescale of ties is"):
        merge(models[:2], "ties", base=base, density=0.5, rescale=["l1", "l2"])


def test_flags_that_choose_rows(model_files: Files, tmp_path: Path) -> None:
    base, models = model_files
    arcs = "merge_method: nuslerp\nmodels: [{model: ONE}, {model: TWO}]\nparameters: {weight: 1, "
    stock = "merge_method: model_stock\nbase_model: BASE\nmodels: [{model: ONE}, {model: TWO}]\n"
    floor = {"cosine_floor": 1e-6, "base": base}
    kinds = {
        "whole": merge(models[:2], "nuslerp"),
        "rows": merge(models[:2], "nuslerp_rows"),
        "columns": merge(models[:2], "nuslerp_rows", along="first"),
        "stock": merge(models[:2], "model_stock", **floor),
        "stock of rows": merge(models[:2], "model_stock_rows", **floor),
    }
    for text, mlp, rest in (
        (arcs + "nuslerp_flatten: [{filter: mlp, value: false}]}", "rows", "whole"),
        (
            arcs + "nuslerp_flatten: false, nuslerp_row_wise: [{filter: mlp, value: 1}]}",
            *("columns", "rows"),
        ),
        (arcs + "nuslerp_row_wise: true}", "whole", "whole"),
        (stock + "parameters: {filter_wise: [{filter: mlp, value: on}]}", "stock of rows", "stock"),
        (stock + "parameters: {filter_wise: [false]}", "stock", "stock"),
    ):
        result = merged(tmp_path, model_files, text)
        for name, tensor in result.items():
            expected = kinds[mlp if "mlp" in name else rest][name]
            assert torch.allclose(tensor, expected, atol=1e-6), (text, name)


def test_what_has_no_effect(
    model_files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ties = "merge_method: ties\nbase_model: BASE\nmodels: [{model: ONE}, {model: TWO}]\n"
    result = merged(tmp_path, model_files, ties + "parameters: {density: 53, weight: 1}\n")
    expected = merge(model_files[1][:2], "ties", base=model_files[0], density=1.0)
    assert all(torch.equal(result[name], expected[name]) for name in result)
    arcs = "merge_method: nuslerp\nmodels: [{model: ONE}, {model: TWO}]\n"
    merged(tmp_path, model_files, arcs + "parameters: {weight: 1, nuslerp_row_wise: true}\n")
    assert caplog.messages == [
        "line 4: density 53 counts as 1: it is a fraction",
        "line 3: nuslerp_row_wise has no effect without nuslerp_flatten: false",
    ]


def test_a_filter_of_a_parameter_with_a_default(model_files: Files, tmp_path: Path) -> None:
    base, models = model_files
    for method, key in (("sce", "select_topk"), ("ramplus_tl", "r")):
        text = (
            f"merge_method: {method}\nbase_model: BASE\nmodels: [{{model: ONE}}, {{model: TWO}}]\n"
        )
        by_filter = f"parameters: {{{key}: {{filter: mlp, value: 0.3}}}}\n"
        result = merged(tmp_path, model_files, text + by_filter)
        fixed = {"equal_below": 1e-6} if method == "sce" else {}
        plain = merge(models[:2], method, base=base, **fixed)
        given = merge(models[:2], method, base=base, **fixed, **{key: 0.3})
        for name, tensor in result.items():
            assert torch.equal(tensor, (given if "mlp" in name else plain)[name]), name


@pytest.mark.parametrize("method", ["sce", "model_stock", "ram", "nuslerp", "multislerp"])
def test_lambda_of_methods_without_it(
    method: str, model_files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = f"merge_method: {method}\nbase_model: BASE\nmodels: [{{model: ONE}}, {{model: TWO}}]\n"
    plain = merged(tmp_path, model_files, text + "parameters: {weight: 1}\n")
    result = merged(tmp_path, model_files, text + "parameters: {weight: 1, lambda: 0.5}\n")
    assert all(torch.equal(result[name], plain[name]) for name in plain)
    assert f"line 4: lambda has no effect in {method}" in caplog.messages


def test_keys_in_the_wrong_place(
    model_files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (
        "merge_method: ties\nbase_model: BASE\nmodels:\n- model: ONE\n  revision: v1\n"
        "  density: 0.5\nparameters: {weight: 1, dtype: float16}\n"
    )
    merged(tmp_path, model_files, text)
    one = model_files[1][0]
    assert sorted(caplog.messages) == [
        f"line 5: revision at {one} has no effect; in the reference to the model it would, as in "
        "model: path@revision+lora",
        f"line 6: density at {one} has no effect; under parameters: it would",
        "line 7: dtype has no effect in ties; at the top level it would",
    ]
