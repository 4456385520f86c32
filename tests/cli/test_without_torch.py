"""What answers from headers and signatures: in a process that has no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_transformers import MODELS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from weightops import TaskVector, open_checkpoint

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "transformers", "datasets"):
            raise ImportError(f"{name} is imported")

sys.meta_path.insert(0, Blocked())
from weightops.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of every kind of file that has a header."""
    folder = tmp_path_factory.mktemp("without-torch")
    model = MODELS["llama"].build(0)
    for name, seed in (("base", 0), ("tuned", 1)):
        MODELS["llama"].build(seed).save_pretrained(folder / name)
    model.save_pretrained(folder / "shards", max_shard_size=2000)
    torch.save(load_file(folder / "base" / "model.safetensors"), folder / "state.pt")
    tensors = {"x": torch.ones(3), "y": torch.zeros(2, 2, dtype=torch.bfloat16)}
    save_file(tensors, folder / "a.safetensors")
    save_file({"x": torch.ones(3)}, folder / "other.safetensors")
    save_file({**tensors, "x": torch.ones(4)}, folder / "wide.safetensors")
    tau = TaskVector(folder / "base", folder / "tuned")
    tau.save(folder / "v.safetensors")
    tau.save(folder / "small.safetensors", compress="int8")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    (folder / "recipe.yaml").write_text(
        f"method: ties\nbase: {folder / 'base'}\nmodels: [{folder / 'tuned'}, {folder / 'base'}]\n"
        "dtype: bfloat16\n"  # options would be tried on tensors
    )
    (folder / "mergekit.yaml").write_text(
        f"merge_method: passthrough\nmodels: [{{model: {folder / 'tuned'}}}]\ndtype: float16\n"
    )
    return folder


def weightops(folder: Path, command: str) -> tuple[int, str]:
    process = subprocess.run(
        [sys.executable, "-c", BLOCKED, *command.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return process.returncode, process.stdout + process.stderr


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "merge --help",
        "methods",
        "methods ties",
        "methods --markdown",
        "methods --json",
        "tasks",
        "inspect a.safetensors",
        "inspect a.safetensors --json",
        "inspect base",
        "inspect shards",
        "inspect state.pt",
        "inspect adapter",
        "inspect v.safetensors",
        "inspect small.safetensors",
        "inspect embedded",
        "merge base tuned -o x --dry-run",
        "merge base tuned -o x --dry-run --json --max-shard-size 2KB --out-dtype bfloat16",
        "merge shards tuned -o x --dry-run --method slerp",
        "merge tuned state.pt -o x.safetensors --dry-run",
        "merge tuned --base base --method task_arithmetic --alpha 0.4 -o x --dry-run",
        "merge tuned tuned --base base --method dare_ties -o x --dry-run",
        "merge recipe.yaml -o x --dry-run",
        "merge mergekit.yaml -o x --dry-run",
        "merge recipe.yaml --print-recipe",
        "merge mergekit.yaml --print-recipe",
        "merge base tuned --method ties --base base --density 0.3 --print-recipe",
        "apply v.safetensors --base base -o x --dry-run",
    ],
)
def test_answers(folder: Path, command: str) -> None:
    code, shown = weightops(folder, command)
    assert (code, "is imported" in shown) == (0, False), shown


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("inspect missing.safetensors", 1, "there is no file or folder missing.safetensors"),
        ("inspect recipe.yaml", 1, "recipe.yaml is not a checkpoint"),
        ("inspect base --tensor", 2, "No such option"),
        ("merge base tuned --method tiles -o x", 2, "there is no merge method 'tiles'"),
        ("merge base tuned --method ties -o x", 2, "there is no base"),
        ("merge tuned --method ties --base base --density x -o x", 2, "density of ties is float"),
        ("merge tuned --method ties --base base --dense 1 -o x", 2, "density"),
        ("merge missing base -o x", 1, "there is no file or folder missing"),
        ("merge missing.yaml -o x", 2, "missing.yaml can't be read"),
        ("merge a.safetensors other.safetensors -o x --dry-run", 1, "only in the first: y"),
        ("merge a.safetensors wide.safetensors -o x", 1, "of other shape: x (3,) / (4,)"),
        ("merge base tuned -o adapter", 1, "adapter exists"),
        ("vector base tuned -o v.safetensors", 1, "v.safetensors exists"),
        ("vector base tuned -o w.safetensors --compress zip", 2, "zip"),
        ("vector a.safetensors other.safetensors", 1, "only in the first: y"),
        ("apply v.safetensors --base missing -o x", 1, "there is no file or folder missing"),
        ("compare tuned missing --base base", 1, "there is no file or folder missing"),
        ("pack missing --base base -o x.safetensors", 1, "there is no file or folder missing"),
        ("evaluate base --tasks mnits", 2, "there is no task 'mnits'"),
        ("patch --task mnits", 2, "there is no task 'mnits'"),
        ("finetune --task mnist --steps some", 2, "--steps"),
        ("lofi mine", 2, "mine"),
        ("push missing me/mine", 2, "there is no folder missing"),
    ],
)
def test_refusals(folder: Path, command: str, code: int, error: str) -> None:
    exit_code, shown = weightops(folder, command)
    assert error in shown, shown
    assert exit_code == code
    assert "is imported" not in shown


@pytest.mark.parametrize("name", ["shards", "state.pt", "a.safetensors", "adapter"])
def test_samples_are_those_of_the_tensors(folder: Path, name: str) -> None:
    """What is read from the file without torch is what torch makes of it."""
    source = open_checkpoint(folder / name).source if name != "adapter" else None
    if source is None:
        from weightops.checkpoints.opening import open_ref

        source = open_ref(folder / name).form.sources[0].stored
    by_torch = [
        source.read(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name in source.specs
    ]
    assert list(source.samples(source.specs)) == by_torch
