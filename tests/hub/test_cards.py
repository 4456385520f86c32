"""Model cards: what the Hub reads in them, and what a person needs to repeat a run."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.hub_cache import python, repository
from helpers.tiny_transformers import MODELS
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from weightops import (
    Recipe,
    SearchOptions,
    TaskVector,
    TrainingConfig,
    average,
    config_for,
    finetune,
    lofi,
    open_checkpoint,
    patch,
)
from weightops.cli.main import run
from weightops.tasks.table import find_task


def card_of(folder: Path) -> tuple[ModelCardData, str]:
    """Return metadata and text of a card, as the Hub's own library reads them."""
    card: Any = ModelCard.load(folder / "README.md")
    return card.data, card.text


@pytest.fixture
def llamas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with three language models, of which the first states a license."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("pre", "a", "b")):
        MODELS["llama"].build(seed).save_pretrained(name)
    Path("pre/README.md").write_text("---\nlicense: llama3.2\n---\n")
    return tmp_path


def test_a_merge_can_be_repeated_by_copying_one_command(llamas: Path) -> None:
    line = "merge a b --method dare_ties --base pre --density 0.4 --seed 3 --out-dtype bfloat16"
    assert run([*line.split(), "-o", "merged one"]) == 0
    data, text = card_of(llamas / "merged one")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.license == "llama3.2"
    assert "density 0.4" in text
    assert "seed 3" in text
    assert datetime.now(timezone.utc).date().isoformat() in text
    assert "on cpu, with python" in text
    assert 'AutoModelForCausalLM.from_pretrained("merged one")' in text
    [command] = re.findall(r"```sh\nweightops (.*)\n```", text)
    assert command == f"{line} -o 'merged one'"
    again = command.replace("'merged one'", "again").split()
    assert run(again) == 0
    first, second = (llamas / name / "model.safetensors" for name in ("merged one", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert run(["merge", "merged one/recipe.yaml", "-o", "by_recipe"]) == 0
    tensors, wide = load_file(first), load_file("by_recipe/model.safetensors")
    assert all(wide[name].bfloat16().equal(tensor) for name, tensor in tensors.items())


def test_other_licenses_and_absolute_paths(llamas: Path) -> None:
    Path("a/README.md").write_text("---\nlicense: mit\n---\n")
    assert run(["merge", str(llamas / "a"), "b", "--base", "pre", "-o", "merged"]) == 0
    data, text = card_of(llamas / "merged")
    assert data.license is None  # two are stated
    assert "weightops merge a b --base pre -o merged" in text


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_adapters(llamas: Path) -> None:
    assert run(["vector", "pre", "a", "--lora", "2", "-o", "lora"]) == 0
    data, text = card_of(llamas / "lora")
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert data.license == "llama3.2"
    assert 'PeftModel.from_pretrained(base, "lora")' in text
    config = yaml.safe_load((llamas / "lora/adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(llamas / "lora")
    assert type(model).__name__ == "PeftModelForCausalLM"
    Recipe(("lora", "lora"), weights=(0.5, 0.5)).merge().save("both")
    data, _ = card_of(llamas / "both")
    assert data.library_name == "peft"


def test_a_base_elsewhere_is_named_without_its_folder(
    llamas: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    TaskVector("pre", "a").save_lora("lora", 2)
    assert "without its folder" not in caplog.text
    (llamas / "elsewhere").mkdir()
    monkeypatch.chdir(llamas / "elsewhere")
    TaskVector("../pre", "../a").save_lora("lora", 2)
    config = yaml.safe_load(Path("lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "pre"
    assert "the adapter names its base pre, without its folder" in caplog.text


AN_ADAPTER = """
import json, os
from weightops import Recipe
from weightops.cli.main import run
os.chdir(os.environ["WORK"])
assert run("vector org/pre org/a --lora 2 -o lora".split()) == 0
Recipe(("lora", "lora"), weights=(0.5, 0.5)).merge().save("both")
from peft import AutoPeftModelForCausalLM
for folder in ("lora", "both"):
    config = json.load(open(f"{folder}/adapter_config.json"))
    assert config["base_model_name_or_path"] == "org/pre", config
    assert len(config["revision"]) == 40, config
    AutoPeftModelForCausalLM.from_pretrained(folder)
"""


def test_an_adapter_finds_its_base_on_the_hub(tmp_path: Path) -> None:
    for seed, name in enumerate(("pre", "a")):
        MODELS["llama"].build(seed).save_pretrained(tmp_path / name)
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        repository(tmp_path / "home" / "hub", f"org/{name}", files)
    python(AN_ADAPTER, WORK=str(tmp_path), HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    data, _ = card_of(tmp_path / "lora")
    assert data.base_model == ["org/pre"]


FROM_THE_HUB = """
import os
from weightops.cli.main import run
os.chdir(os.environ["WORK"])
assert run("merge org/a org/b --method ties --base org/pre -o merged".split()) == 0
"""


def test_the_base_is_named_with_its_revision(tmp_path: Path) -> None:
    files = {}
    for seed, name in enumerate(("pre", "a", "b")):
        MODELS["llama"].build(seed).save_pretrained(tmp_path / name)
        files[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        files[name]["README.md"] = b"---\nlicense: apache-2.0\n---\n"
        repository(tmp_path / "home" / "hub", f"org/{name}", files[name])
    python(FROM_THE_HUB, WORK=str(tmp_path), HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    data, text = card_of(tmp_path / "merged")
    assert data.base_model == ["org/pre", "org/a", "org/b"]
    assert data["base_model_relation"] == "merge"
    assert data.license == "apache-2.0"
    [revision] = set(data["base_model_revision"].values())
    assert re.fullmatch("[0-9a-f]{40}", revision)
    assert f"org/pre@{revision}" in text


def test_the_model_spec_of_the_base_is_kept(tmp_path: Path) -> None:
    spec = {"modelspec.title": "Ours", "modelspec.license": "mit", "modelspec.architecture": "x"}
    tensors = {f"{i}.weight": torch_of(i) for i in range(2)}
    for name, told in (("pre", spec), ("a", {"modelspec.title": "Another"}), ("b", {})):
        own = {"modelspec.hash_sha256": "0x00"} if told else {}
        save_file(tensors, tmp_path / f"{name}.safetensors", {"format": "pt", **told, **own})
    pre, a, b = (str(tmp_path / f"{name}.safetensors") for name in ("pre", "a", "b"))
    outputs = [
        Recipe((a, b), "ties", base=pre).merge().save(tmp_path / "merged.safetensors"),
        TaskVector(pre, b).apply(pre, 0.5).save(tmp_path / "edited.safetensors"),
        open_checkpoint(pre).save(tmp_path / "shards", max_shard_size=16)
        / "model-00001-of-00002.safetensors",
    ]
    for output in outputs:
        with safe_open(output, "pt") as opened:
            metadata = opened.metadata()
        kept = {key: value for key, value in metadata.items() if key.startswith("modelspec.")}
        assert kept == spec
    whole = open_checkpoint(tmp_path / "shards").save(tmp_path / "whole.safetensors")
    with safe_open(whole, "pt") as opened:
        assert opened.metadata()["modelspec.title"] == "Ours"


def torch_of(i: int) -> Any:
    """Return a small tensor."""
    import torch

    return torch.full((4,), float(i))


def lines_of(folder: Path) -> str:
    """Return the lines of Python in a card that repeat its run."""
    (lines,) = re.findall(r"```python\n(from weightops .*?)\n```", card_of(folder)[1], re.DOTALL)
    return str(lines)


def test_runs_of_python_can_be_repeated_by_copying_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = config_for("embedded", steps=2, batch_size=8)
    finetune("embedded", "shapes", short, out="tuned")
    search = SearchOptions((0.5, 1.0), strategy="grid")
    shared = {"supported": ["digits"], "max_supported_drop": 1.0, "search": search}
    patch("mnist", tmp_path / "one", training=short, device="cpu", **shared)
    lofi.run("mnist", "nodes", nodes=2, training=short)
    TaskVector("embedded", "tuned").apply("embedded", 0.4).save("edited")
    average(["tuned", "edited"]).save("mean")
    for place, name in (
        *(("tuned", "tuned"), ("one", "one"), ("nodes/merged", "nodes")),
        *(("edited", "again"), ("mean", "again")),
    ):
        lines = lines_of(tmp_path / place)
        assert "/" not in lines.replace("/recipe.yaml", "")  # of this machine
        again = lines.replace(f'"{name}"', '"repeated"')
        assert again != lines
        exec(again, {})
        first, second = (
            open_checkpoint(tmp_path / folder).state_dict()
            for folder in (place, place.replace(name, "repeated") if name in place else "repeated")
        )
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
        shutil.rmtree("repeated")


def test_what_is_in_memory_is_named_and_told(tmp_path: Path) -> None:
    task = find_task("shapes")
    finetune(
        open_checkpoint("embedded"),
        replace(task, name='a "task"'),
        TrainingConfig(steps=1, batch_size=4),
        out=tmp_path / "out",
        on_step=print,
    )
    lines = lines_of(tmp_path / "out")
    assert "# model = Checkpoint(" in lines
    assert "# task = Task('a \"task\"', 10 classes" in lines
    assert "finetune(model, task, TrainingConfig(steps=1, batch_size=4), out=" in lines
    assert "on_step=on_step" in lines
    compile(lines, "lines", "exec")
