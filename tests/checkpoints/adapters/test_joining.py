"""Adapters merged into an adapter: what peft computes with it is the sum of the deltas."""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from weightops import TaskVector, merge, open_checkpoint
from weightops.cli.main import run
from weightops.errors import MismatchError, NonfiniteError, OptionError, OutputError, SpaceError


class Net(nn.Module):
    """A plain model with the layers that a LoRA is made on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 16)
        self.conv = nn.Conv2d(16, 4, 3)
        self.head = nn.Linear(4, 2)
        self.config = {"model_type": "custom"}


def adapter(folder: Path, base: nn.Module, seed: int, **settings: Any) -> Path:
    """Save a random LoRA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"lora_alpha": 5, "init_lora_weights": False, **settings})
        torch.manual_seed(seed)
        model: Any = peft.get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


def by_peft(base: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights after peft's merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        merged: dict[str, torch.Tensor] = loaded.merge_and_unload().state_dict()
        return merged


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def two(base: nn.Module, tmp_path: Path) -> list[Path]:
    """Two adapters of different ranks, scales and modules."""
    return [
        adapter(tmp_path / "a", base, 1, r=3, target_modules=["first", "second", "conv", "embed"]),
        adapter(
            tmp_path / "b",
            base,
            2,
            r=2,
            target_modules=["second", "conv", "embed"],
            use_rslora=True,
            rank_pattern={"second": 5},
        ),
    ]


@pytest.mark.parametrize(
    ("method", "weights", "shares"),
    [
        ("linear", None, (0.5, 0.5)),
        ("linear", [3.0, 1.0], (0.75, 0.25)),
        ("task_arithmetic", None, (1.0, 1.0)),
        ("task_arithmetic", [1.0, -0.5], (1.0, -0.5)),
    ],
)
def test_sums_are_exact(
    base: nn.Module,
    two: list[Path],
    tmp_path: Path,
    method: str,
    weights: list[float] | None,
    shares: tuple[float, float],
) -> None:
    out = merge(two, method, weights=weights).save(tmp_path / "out")
    start, parts = base.state_dict(), [by_peft(base, folder) for folder in two]
    got = by_peft(base, out)
    for name, tensor in start.items():
        wanted = sum(
            (c * (part[name] - tensor) for c, part in zip(shares, parts, strict=True)), tensor
        )
        assert torch.allclose(got[name], wanted, atol=2e-6), name
    ours = TaskVector(base, out).apply(base).state_dict()
    assert all(torch.allclose(ours[name], got[name], atol=2e-6) for name in got)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["rank_pattern"] == {"^first": 3, "^conv": 5, "^embed": 5}


def test_the_average_of_equal_adapters_is_the_adapter(
    base: nn.Module, two: list[Path], tmp_path: Path
) -> None:
    out = merge([two[0], two[0]]).save(tmp_path / "out")
    got, wanted = by_peft(base, out), by_peft(base, two[0])
    assert all(torch.allclose(got[name], wanted[name], atol=1e-6) for name in wanted)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3


def test_compressed_to_a_rank(
    base: nn.Module, two: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merged = merge(two, "task_arithmetic", rank=3)
    with caplog.at_level(logging.WARNING):
        out = merged.save(tmp_path / "out")
    assert f"lacks {merged.relative_error:.3g} of its norm" in caplog.text  # type: ignore[attr-defined]
    start, parts = base.state_dict(), [by_peft(base, folder) for folder in two]
    got = by_peft(base, out)
    total = lost = 0.0
    for name, tensor in start.items():
        delta = parts[0][name] + parts[1][name] - 2 * tensor
        total += float(delta.square().sum())
        lost += float((got[name] - tensor - delta).square().sum())
        if delta.any():
            s = torch.linalg.svdvals(delta.flatten(1))
            error = (got[name] - tensor - delta).square().sum()
            assert torch.allclose(error, s[3:].square().sum(), rtol=1e-3, atol=1e-6), name
    assert merged.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)  # type: ignore[attr-defined]


def test_methods_that_give_no_sum_need_a_rank(base: nn.Module, tmp_path: Path) -> None:
    settings = {"r": 2, "target_modules": ["first", "conv", "embed"]}
    both = [adapter(tmp_path / name, base, i, **settings) for i, name in enumerate("ab")]
    with pytest.raises(OptionError, match="no sum of adapters"):
        merge(both, "ties").save(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    out = merge(both, "ties", rank=16).save(tmp_path / "out")
    wanted = merge(both, "ties", base=open_checkpoint(base))
    got = by_peft(base, out)
    assert all(torch.allclose(got[name], wanted[name], atol=1e-5) for name in wanted)


def test_whole_modules_are_averaged_or_refused(base: nn.Module, tmp_path: Path) -> None:
    settings = {"r": 2, "target_modules": ["first"], "modules_to_save": ["head"]}
    both = [adapter(tmp_path / name, base, i, **settings) for i, name in enumerate("ab")]
    got = by_peft(base, merge(both, weights=[1, 3]).save(tmp_path / "out"))
    parts = [by_peft(base, folder) for folder in both]
    wanted = 0.25 * parts[0]["head.weight"] + 0.75 * parts[1]["head.weight"]
    assert torch.allclose(got["head.weight"], wanted, atol=1e-6)
    with pytest.raises(MismatchError, match="head"):
        merge(both, "task_arithmetic").save(tmp_path / "sum")


def test_no_base_is_opened(two: list[Path], tmp_path: Path) -> None:
    for folder in two:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / "nowhere")
        (folder / "adapter_config.json").write_text(json.dumps(config))
    out = merge(two).save(tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "nowhere"  # no folder of this machine


def test_what_needs_its_base_is_refused(base: nn.Module, two: list[Path], tmp_path: Path) -> None:
    dora = adapter(tmp_path / "dora", base, 3, r=2, target_modules=["first"], use_dora=True)
    with pytest.raises(SpaceError, match="no plain LoRA"):
        merge([two[0], dora])
    with pytest.raises(SpaceError, match="holds an adapter, not weights"):
        merge([two[0], base])
    with pytest.raises(OptionError, match="an adapter is a folder"):
        merge(two).save(tmp_path / "out.safetensors")
    with pytest.raises(OptionError, match="a rank is for adapters"):
        merge([base, base], rank=3)


def test_on_the_command_line(
    base: nn.Module, two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = ["merge", *map(str, two), "--weights", "1,3", "--rank", "4", "-o", str(out)]
    assert run([*line, "--print-recipe"]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert "rank: 4" in recipe.read_text()
    assert run(line) == 0
    assert "rank: 4" in (out / "README.md").read_text()
    again = tmp_path / "again"
    assert run(["merge", str(recipe), "-o", str(again)]) == 0
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (out, again)]
    assert files[0] == files[1]
    by_peft(base, out)


def test_an_input_is_not_replaced(two: list[Path]) -> None:
    before = (two[0] / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="is an input"):
        merge(two).save(two[0], overwrite=True)
    assert (two[0] / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("then", ["ties", "task_arithmetic", "magnitude"])
def test_knots_of_factors_is_knots_of_whole_matrices(
    base: nn.Module, tmp_path: Path, then: str, scaled: bool
) -> None:
    settings = {"target_modules": ["first", "second", "embed"], "use_rslora": True}
    both = [adapter(tmp_path / n, base, i, r=i + 2, **settings) for i, n in enumerate("abc")]
    models = [by_peft(base, folder) for folder in both]
    options: dict[str, Any] = {"then": then, "density": 0.4, "weights": [1.0, 0.5, 2.0]}
    options["scaled"] = scaled
    if then == "ties":
        options.pop("weights")
    whole = merge(models, "knots", base=base.state_dict(), alpha=0.7, **options)
    in_base = merge(both, "knots", base=open_checkpoint(base), alpha=0.7, **options)
    assert all(torch.allclose(in_base[n], whole[n], atol=3e-6) for n in whole)
    out = merge(both, "knots", alpha=0.7, **options).save(tmp_path / "out")
    got = by_peft(base, out)
    assert all(torch.allclose(got[n], whole[n], atol=3e-6) for n in whole)
    assert json.loads((out / "adapter_config.json").read_text())["r"] <= 9


def test_knots_never_makes_the_whole_matrix(tmp_path: Path) -> None:
    """The delta has 32 GB."""
    size, names = (
        90_000,
        ("base_model.model.big.lora_A.weight", "base_model.model.big.lora_B.weight"),
    )
    folders = []
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        folder = tmp_path / str(i)
        folder.mkdir()
        halves = [torch.randn(s, generator=generator) for s in ((2, size), (size, 2))]
        save_file(dict(zip(names, halves, strict=True)), folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["big"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(folder)
    out = merge(folders, "knots", then="task_arithmetic").save(tmp_path / "out")
    a, b = (load_file(out / "adapter_model.safetensors")[name] for name in names)
    parts = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    rows = sum(part[names[1]][:3] @ part[names[0]] for part in parts)
    assert a.shape[0] <= 4
    assert torch.allclose(b[:3] @ a, rows, atol=1e-4)


def test_knots_of_an_adapter_that_is_not_finite(base: nn.Module, tmp_path: Path) -> None:
    both = [
        adapter(tmp_path / n, base, i, r=2, target_modules=["first"]) for i, n in enumerate("ab")
    ]
    tensors = load_file(both[0] / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = math.nan
    save_file(tensors, both[0] / "adapter_model.safetensors")
    assert merge(both, "knots", base=open_checkpoint(base))["first.weight"].isnan().all()


def test_options_of_weights_and_values_that_are_none(two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="an adapter is one file"):
        merge(two).save(tmp_path / "out", max_shard_size=100)
    file = two[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(NonfiniteError, match="NaN or Inf in"):
        merge(two).save(tmp_path / "out", on_nonfinite="error")
    with pytest.raises(NonfiniteError, match="hold NaN or Inf"):
        merge(two, rank=1).save(tmp_path / "out")


def test_remedies_on_the_command_line(
    base: nn.Module, two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter where weights are needed, and the reverse, name commands that help."""
    weights = tmp_path / "base.safetensors"
    save_file(base.state_dict(), weights)
    out = ["-o", str(tmp_path / "out")]
    assert run(["apply", str(two[0]), "--base", str(two[1]), *out]) == 1
    assert "`weightops apply`" in capsys.readouterr().err
    assert run(["apply", str(weights), "--base", str(weights), *out]) == 1
    assert f"`weightops vector BASE {weights} -o VECTOR`" in capsys.readouterr().err
