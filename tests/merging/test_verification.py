"""Outputs computed again: those that are what they say, tampered ones, and lost inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.merges import statistic
from helpers.tiny_transformers import MODELS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from weightops import Recipe, TaskVector, average, merge, open_checkpoint, verify
from weightops.cli.main import run
from weightops.errors import OptionError, UnverifiedError

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def work(model_files: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a base and three models."""
    monkeypatch.chdir(Path(model_files[0]).parent)
    return Path(model_files[0]).parent


def tamper(file: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors of a file, and keep all else."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


RECIPES = {
    "linear": "m1.safetensors m2.safetensors m3.safetensors --weights 0.2,0.3,0.5",
    "ties in bfloat16": "m1.safetensors m2.safetensors --method ties --base base.safetensors "
    "--density 0.3 --out-dtype bfloat16",
    "dare with a seed": "m1.safetensors m2.safetensors --method dare_ties --seed 7 "
    "--base base.safetensors --density 0.5 --alpha 0.2,0.9",
    "slerp in shards": "m1.safetensors m2.safetensors --method slerp --max-shard-size 2KB",
    "matrices": "m1.safetensors m2.safetensors --method iso_c --base base.safetensors",
}


@pytest.mark.parametrize("line", RECIPES.values(), ids=RECIPES)
def test_a_merge_is_what_it_says(work: Path, line: str) -> None:
    assert run(["merge", *line.split(), "-o", "merged"]) == 0
    found = verify("merged")
    assert found.holds
    assert found.exact
    assert found.differences.keys() == open_checkpoint("merged").specs.keys()
    assert not any(difference.other for difference in found.differences.values())
    assert run(["verify", "merged"]) == 0
    again = Recipe.read(work / "merged/recipe.yaml").merge()
    assert again.recipe == open_checkpoint("merged").source.made_from["recipe"]


def test_a_factor_and_a_dropped_layer_are_found(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "m1.safetensors m2.safetensors --method ties --base base.safetensors --density 0.3"
    base = load_file("base.safetensors")
    factors = {torch.float32: 1.001, torch.bfloat16: 1.01}  # 1.001 x is x in bfloat16
    for dtype in ("float32", "bfloat16"):
        for name, change in {
            "factor": lambda t: t["layers.1.mlp.weight"].mul_(factors[t["norm.weight"].dtype]),
            "layer": lambda t: t.update(
                {n: base[n].to(x.dtype) for n, x in t.items() if n.startswith("layers.1.")}
            ),
        }.items():
            out = f"{name}_{dtype}"
            assert run(["merge", *line.split(), "-o", out, "--out-dtype", dtype]) == 0
            tamper(work / out / "model.safetensors", change)
            capsys.readouterr()
            assert run(["verify", out, "--json"]) == 1
            told = json.loads(capsys.readouterr().out)
            parts = ("mlp",) if name == "factor" else ("mlp", "attn")
            assert told["differences"].keys() == {f"layers.1.{part}.weight" for part in parts}
            if name == "layer":
                assert told["differences"]["layers.1.attn.weight"]["scale"] == pytest.approx(
                    0, abs=0.01
                )
            assert run(["verify", out]) == 1
            assert "layers.1.mlp.weight" in capsys.readouterr().out


def test_a_missing_tensor_another_shape_and_one_too_many(work: Path) -> None:
    Recipe(("m1.safetensors", "m2.safetensors")).merge().save("merged")

    def change(tensors: Tensors) -> None:
        del tensors["norm.weight"]
        tensors["more"] = torch.zeros(2)
        tensors["embed.weight"] = tensors["embed.weight"][:40].contiguous()

    tamper(work / "merged/model.safetensors", change)
    found = verify("merged")
    assert not found.holds
    assert (found.missing, found.extra) == (["norm.weight"], ["more"])
    assert found.reshaped == {"embed.weight": "float32 (40, 8), and should be float32 (50, 8)"}


def test_a_moved_input_is_found_and_another_is_none(
    work: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, store = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("store")
    absolute = tuple(str(work / f"m{i}.safetensors") for i in (1, 2))
    monkeypatch.chdir(elsewhere)
    Recipe(absolute).merge().save(work / "merged")
    assert verify(work / "merged").holds  # beside it
    shutil.move(absolute[0], store)
    with pytest.raises(UnverifiedError, match=r"its input m1.safetensors isn't here"):
        verify(work / "merged")
    assert run(["verify", str(work / "merged")]) == 3
    assert verify(work / "merged", inputs=[store]).holds
    assert run(["verify", str(work / "merged"), "--inputs", str(store)]) == 0
    with pytest.raises(OptionError, match="there is no folder gone"):
        verify(work / "merged", inputs=[store, "gone"])
    shutil.copy(work / "m3.safetensors", absolute[0])
    with pytest.raises(UnverifiedError, match=r"m1\.safetensors is another one"):
        verify(work / "merged")
    assert verify(work / "merged", inputs=[store]).holds  # the right one among two


def test_statistics_of_an_inner_recipe_that_have_moved(
    work: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = tmp_path_factory.mktemp("store")
    names = ("m1.safetensors", "m2.safetensors")
    for i, name in enumerate(names):
        fisher = statistic("fisher", load_file(work / name), i)
        save_file(fisher, work / f"{i}.fisher.safetensors")
    given = tuple({"fisher": f"{i}.fisher.safetensors"} for i in range(2))
    inner = Recipe(names, "fisher", name="inner", statistics=given)
    outer = Recipe(("inner", "m3.safetensors"), named={"inner": inner})
    outer.merge().save(work / "merged")
    assert verify("merged").holds
    for i in range(2):
        shutil.move(work / f"{i}.fisher.safetensors", store)
    with pytest.raises(UnverifiedError, match=r"its input 0.fisher.safetensors isn't here"):
        verify("merged")
    assert verify("merged", inputs=[store]).holds


def test_a_command_is_told_of_its_own_options(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Recipe((str(work / "m1.safetensors"), str(work / "m2.safetensors"))).merge().save(work / "out")
    assert run(["verify", str(work / "out"), "--base", "pre"]) == 2
    assert "hint: --base, --adapter; or --recipe; or neither" in capsys.readouterr().err
    assert run(["verify", str(work / "m1.safetensors")]) == 3
    assert "hint: --inputs names a folder in which it lies" in capsys.readouterr().err


def test_inputs_of_one_name_are_told_apart(
    work: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in (1, 2):
        (work / f"run{i}").mkdir()
        shutil.move(work / f"m{i}.safetensors", work / f"run{i}/final.safetensors")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    models = tuple(str(work / f"run{i}/final.safetensors") for i in (1, 2))
    Recipe(models, weights=(0.2, 0.8)).merge().save(work / "merged")
    recipe = Recipe.read(work / "merged/recipe.yaml")
    assert recipe.models == ("run1/final.safetensors", "run2/final.safetensors")
    assert verify(work / "merged").holds
    (work / "run1").rename(work / "x")
    (work / "run2").rename(work / "run1")
    (work / "x").rename(work / "run2")  # each in the other's place
    assert not verify(work / "merged").holds


def test_edits_and_averages_without_a_recipe(work: Path) -> None:
    vector = TaskVector("base.safetensors", "m1.safetensors")
    by_layer = {"layers.1.*": 0.3, "*": -0.5}
    vector.apply("base.safetensors", by_layer).save("edited.safetensors")
    assert verify("edited.safetensors").holds
    average(["m1.safetensors", "m2.safetensors"]).save("mean")
    assert verify("mean").holds
    tamper(work / "mean/model.safetensors", lambda t: t["norm.weight"].mul_(1.001))
    assert list(verify("mean").differing) == ["norm.weight"]


def test_merges_in_python_have_a_recipe_too(work: Path) -> None:
    models, base = ["m1.safetensors", "m2.safetensors"], "base.safetensors"
    made = {
        "ties": merge(models, "ties", base=base, weights=[1, 2], alpha=0.7, density=0.4),
        "dare": merge(models, "dare_linear", base=base, density=0.5, seed=9),
        "slerp": merge(models, "slerp", t=0.3),
        "sum": TaskVector(base, models[0]).apply(base, {"layers.1.*": 0.3, "*": -0.5}),
        "mean": average(models, [1, 3]),
    }
    for name, model in made.items():
        model.save(name)
        assert verify(name).exact
        assert verify(name).holds
        again = Recipe.read(f"{name}/recipe.yaml").merge().save(f"{name}-again")
        tensors = [load_file(f"{place}/model.safetensors") for place in (name, again)]
        assert all(torch.equal(x, tensors[1][n]) for n, x in tensors[0].items())
        tamper(Path(name, "model.safetensors"), lambda t: t["embed.weight"].mul_(1.001))
        assert list(verify(name).differing) == ["embed.weight"]
    copy = open_checkpoint("m1.safetensors").save("copy")
    assert not (copy / "recipe.yaml").exists()


def test_a_merge_of_mergekits(work: Path) -> None:
    text = """
merge_method: ties
base_model: base.safetensors
models:
  - model: m1.safetensors
    parameters: {weight: 1.0, density: 0.3}
  - model: m2.safetensors
    parameters: {weight: 0.5, density: 0.6}
dtype: bfloat16
"""
    Path("recipe.yaml").write_text(text)
    merged = Recipe.read("recipe.yaml").merge().state_dict()
    Path("by_mergekit").mkdir()
    Path("by_mergekit/mergekit_config.yml").write_text(text)
    save_file(merged, "by_mergekit/model.safetensors", {"format": "pt"})
    assert verify("by_mergekit").holds
    save_file({n: x * 1.01 for n, x in merged.items()}, "by_mergekit/model.safetensors")
    assert not verify("by_mergekit").holds


def test_experts_that_were_packed_for_a_recipe_of_mergekits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded recipe says so, and repeats the merge to the bit."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("pre", "a", "b")):
        MODELS["mixtral"].build(seed).save_pretrained(name)
    models = [
        {"model": name, "parameters": {"weight": 1.0, "density": density}}
        for name, density in (("a", 0.3), ("b", 0.6))
    ]
    content = {"merge_method": "ties", "base_model": "pre", "dtype": "float32", "models": models}
    text = json.dumps(content)
    Path("mergekit.yaml").write_text(text)
    assert run(["merge", "mergekit.yaml", "-o", "merged"]) == 0
    assert Recipe.read("merged/recipe.yaml").packed_experts
    found = verify("merged")
    assert found.exact
    assert found.holds
    assert run(["merge", "merged/recipe.yaml", "-o", "again"]) == 0
    pairs = [load_file(f"{name}/model.safetensors") for name in ("merged", "again")]
    assert all(torch.equal(tensor, pairs[1][name]) for name, tensor in pairs[0].items())


def test_what_says_nothing_of_its_making(work: Path) -> None:
    save_file({"w": torch.ones(2)}, "bare.safetensors")
    with pytest.raises(UnverifiedError, match="doesn't say how it was made"):
        verify("bare.safetensors")
    with pytest.raises(UnverifiedError, match="nowhere can't be checked"):
        verify("nowhere")
    open_checkpoint({"w": torch.ones(2)}).save("from_memory")
    with pytest.raises(UnverifiedError, match="its input a state dict isn't here"):
        verify("from_memory")
    with pytest.raises(OptionError, match="belong together"):
        verify("m1.safetensors", base="base.safetensors")
    assert run(["verify", "m1.safetensors", "--base", "base.safetensors"]) == 2


def test_a_vector_that_was_applied(work: Path) -> None:
    assert run(["vector", "base.safetensors", "m1.safetensors", "-o", "v.safetensors"]) == 0
    assert run(["verify", "v.safetensors"]) == 0
    line = "apply v.safetensors --base base.safetensors --alpha 0.4 -o edited"
    assert run(line.split()) == 0
    assert verify("edited").holds
    assert run(["merge", "edited/recipe.yaml", "-o", "again"]) == 0
    pairs = [load_file(f"{name}/model.safetensors") for name in ("edited", "again")]
    assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0])


@pytest.fixture
def lora(tmp_path: Path) -> tuple[Path, Path]:
    """A bfloat16 model of transformers, and a LoRA on it that peft saved."""
    import peft

    tiny = MODELS["llama"]
    tiny.build(0).bfloat16().save_pretrained(tmp_path / "pre")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(tiny.build(0).bfloat16(), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "by_peft")
    return tmp_path / "pre", tmp_path / "adapter"


def test_an_adapter_that_others_merged(
    lora: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pre, adapter = map(str, lora)
    base = load_file(f"{pre}/model.safetensors")
    exact = TaskVector(open_checkpoint(pre).to(torch.float32), adapter)
    deltas = exact.apply(open_checkpoint(pre).to(torch.float32)).state_dict()
    deltas = {name: tensor - base[name].float() for name, tensor in deltas.items() if name in base}

    def merged(name: str, scale: Callable[[str], float], *, twice: bool = False) -> str:
        """Write the base with the adapter in, rounded once, or twice as a careless tool does."""
        shutil.copytree(pre, tmp_path / name)
        rounded = {
            n: (d * scale(n)).bfloat16() if twice else d * scale(n) for n, d in deltas.items()
        }
        tensors = {n: (x.to(rounded[n].dtype) + rounded[n]).bfloat16() for n, x in base.items()}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        return str(tmp_path / name)

    right = {
        str(tmp_path / "by_peft"): 1.0,
        merged("rounded_once", lambda _: 1.0): 1.0,
        merged("rounded_twice", lambda _: 1.0, twice=True): 1.0,
    }
    for folder, scale in right.items():
        found = verify(folder, base=pre, adapters=[adapter])
        assert found.holds, found.differing
        assert found.scale == pytest.approx(scale, abs=0.02)
        assert run(["verify", folder, "--base", pre, "--adapter", adapter]) == 0
    wrong = {
        pre: 0.0,
        merged("half", lambda _: 0.5): 0.5,
        merged("twice", lambda _: 2.0): 2.0,
        merged("without_a_layer", lambda name: float(".1." not in name)): None,
    }
    for folder, scale in wrong.items():
        found = verify(folder, base=pre, adapters=[adapter])
        assert not found.holds
        if scale is not None:
            assert found.scale == pytest.approx(scale, abs=0.02)
        capsys.readouterr()
        assert run(["verify", folder, "--base", pre, "--adapter", adapter]) == 1
    assert found.differing.keys() == {n for n in deltas if ".1." in n and bool(deltas[n].any())}
    assert "not in 2 of 4 tensors" in capsys.readouterr().out


def test_adapters_that_were_merged_into_one(lora: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = lora
    other = shutil.copytree(adapter, tmp_path / "other")
    tamper(other / "adapter_model.safetensors", lambda t: [x.mul_(1.5) for x in t.values()])
    recipe = Recipe((str(adapter), str(other)), weights=(3.0, 1.0))
    recipe.merge().save(tmp_path / "both")
    assert verify(tmp_path / "both").holds
    tamper(
        tmp_path / "both/adapter_model.safetensors",
        lambda t: next(x for name, x in t.items() if "lora_B" in name).mul_(1.001),
    )
    assert len(verify(tmp_path / "both").differing) == 1
    assert run(["verify", str(tmp_path / "both")]) == 1


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_adapters_that_were_cut_to_a_rank(
    lora: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    _, adapter = lora
    other = shutil.copytree(adapter, tmp_path / "other")
    generator = torch.Generator().manual_seed(0)
    tamper(
        other / "adapter_model.safetensors",
        lambda t: [x.copy_(torch.randn(x.shape, generator=generator)) for x in t.values()],
    )
    Recipe((str(adapter), str(other)), method, rank=1).merge().save(tmp_path / "cut")
    assert verify(tmp_path / "cut").holds
    file = tmp_path / "cut/adapter_model.safetensors"
    written = file.read_bytes()

    def pair(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        name = next(name for name, x in tensors.items() if "lora_B" in name and x.any())
        return tensors[name], tensors[name.replace("lora_B", "lora_A")]

    tamper(file, lambda t: [x.neg_() for x in pair(t)])  # the same product
    assert verify(tmp_path / "cut").holds
    for factor in (1.001, 0.0):
        file.write_bytes(written)
        tamper(file, lambda t, factor=factor: pair(t)[0].mul_(factor))
        assert len(verify(tmp_path / "cut").differing) == 1
        assert run(["verify", str(tmp_path / "cut")]) == 1


def test_rounding_is_no_excuse_for_a_factor(tmp_path: Path) -> None:
    """In bfloat16 a factor of 1.001 moves most elements by less than their spacing."""
    generator = torch.Generator().manual_seed(0)
    pre = {"w": torch.randn(300, 300, generator=generator).bfloat16()}
    delta = 0.05 * torch.randn(300, 300, generator=generator)
    open_checkpoint(pre).save(tmp_path / "pre")
    save = open_checkpoint({"w": pre["w"].float() + delta}).save(tmp_path / "ft")
    TaskVector(open_checkpoint(tmp_path / "pre").to(torch.float32), save).save(
        tmp_path / "v.safetensors"
    )
    for factor, holds in ((1.0, True), (1.001, False), (0.999, False)):
        weights = ((pre["w"].float() + delta) * factor).bfloat16()
        folder = open_checkpoint({"w": weights}).save(tmp_path / f"merged{factor}")
        (folder / "recipe.yaml").unlink(missing_ok=True)
        found = verify(
            folder, base=str(tmp_path / "pre"), adapters=[str(tmp_path / "v.safetensors")]
        )
        assert found.holds == holds, factor
