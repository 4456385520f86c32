"""Models that aren't CLIP: a timm classifier with its own head, and a causal language model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import torch
from helpers.transformers_folders import save_letters
from torch import nn

from weightops import TASKS, Checkpoint, TaskVector, TrainingConfig, open_checkpoint
from weightops.cli.main import run
from weightops.errors import OptionError
from weightops.evaluation.perplexity import perplexity, token_loss
from weightops.evaluation.shift import shift
from weightops.tasks.task import Task
from weightops.training import lofi
from weightops.training.finetune import fit
from weightops.training.learners import ModuleLearner, classification
from weightops.training.nodes import Node


def average_of_two_nodes(
    module: nn.Module,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    loss: Callable[..., torch.Tensor],
    config: TrainingConfig,
    out: Path,
) -> nn.Module:
    """Return a copy of the module with the average of two nodes' weights."""
    folders = [out / f"node{index}" for index in range(2)]
    for index, folder in enumerate(folders):
        learner = ModuleLearner(copy.deepcopy(module), inputs, labels, loss, name="it")
        fit(learner, config, out=folder, node=Node(index, 2))
    return lofi.average(folders).load_into(copy.deepcopy(module))


def tiny_classifier(timm: Any, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **sizes, **changes)
    return model


def tiny_language_model(transformers: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


def test_a_timm_classifier_and_its_shift(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = tiny_classifier(timm, img_size=8, num_classes=10, in_chans=1)
    task = TASKS["digits"]

    def pixels(task: Task, split: str) -> torch.Tensor:
        images = task.load(split)
        first = [images[index].convert("L") for index in range(min(len(images), 200))]
        rows = [torch.tensor(list(image.tobytes())) for image in first]
        return torch.stack(rows).view(-1, 1, 8, 8) / 255

    def accuracy(model: nn.Module, task: Task, split: str) -> float:
        with torch.no_grad():
            guesses = model.eval()(pixels(task, split)).argmax(1)
        labels = torch.from_numpy(task.load(split).labels[: len(guesses)])
        return float((guesses == labels).double().mean())

    labels = torch.from_numpy(task.load("train").labels[:200])
    config = TrainingConfig(steps=60, batch_size=64, lr=3e-3)
    images = pixels(task, "train")
    merged = average_of_two_nodes(model, images, labels, classification, config, tmp_path)
    scores = shift(
        lambda task, split: accuracy(merged, task, split),
        task,
        corruptions=["inversion", "blur"],
        severities=[1, 5],
    )
    assert scores["in_distribution"] > 0.5 > accuracy(model, task, "test")
    assert scores["corruptions"]["inversion"]["5"] < scores["in_distribution"]


def test_a_language_model_and_its_perplexity(tmp_path: Path) -> None:
    model = tiny_language_model(pytest.importorskip("transformers"))
    text = Path(__file__).read_text().encode("ascii")
    tokens = torch.tensor(list(text[: len(text) // 32 * 32])).view(-1, 32)
    before = perplexity(model, tokens)
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss  # as transformers computes it
    assert before == pytest.approx(float(loss.exp()), rel=1e-4)
    assert before == pytest.approx(128, rel=0.1)  # it guesses
    config = TrainingConfig(steps=60, batch_size=16, lr=1e-2)
    merged: Any = average_of_two_nodes(model, tokens, tokens, token_loss, config, tmp_path)
    assert perplexity(merged, tokens) < 0.3 * before
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert open_checkpoint(tmp_path / "node0").source.ties  # stored once


def test_a_timm_folder_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head is for 7 classes; it is replaced for the task, by the same one on every node."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = tiny_classifier(timm, img_size=16, num_classes=7)
    folder = open_checkpoint(model).save(tmp_path / "timm")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "model_args": sizes,
        "pretrained_cfg": {"input_size": [3, 16, 16], "crop_pct": 1.0, "num_classes": 7},
    }
    (folder / "config.json").write_text(json.dumps(config))
    training = split("--task digits --steps 120 --lr 4e-3 --batch-size 128 --model")
    training.append(str(folder))
    merged, node1 = tmp_path / "lofi" / "merged", tmp_path / "node1"
    assert run(["lofi", *training, "--nodes", "2", "-o", str(tmp_path / "lofi")]) == 0
    assert run(["finetune", *training, "--node", "1/2", "-o", str(node1)]) == 0
    node = open_checkpoint(tmp_path / "lofi" / "node1")
    tuned = open_checkpoint(node1)
    assert all(torch.equal(node[name], tensor) for name, tensor in tuned.items())
    with torch.no_grad():
        loaded = timm.create_model(f"local-dir:{merged}", pretrained=True)
    assert loaded.num_classes == 10
    capsys.readouterr()
    assert run(["evaluate", str(merged), "--tasks", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["metrics"]["acc1"] > 0.25  # of ten
    edit_classifiers(timm, tmp_path, node)
    capsys.readouterr()
    assert run(["evaluate", str(folder), "--tasks", "digits"]) == 1
    assert "has a head for 7 classes, and digits has 10" in capsys.readouterr().err


def edit_classifiers(timm: Any, folder: Path, node: Checkpoint) -> None:
    """Patch and merge classifiers, as CLIP models are, and load the results in timm."""
    headless = open_checkpoint({**node, "head.weight": torch.zeros_like(node["head.weight"])})
    base = Checkpoint(headless.form, node.architecture).save(folder / "base")
    tuned, patched = folder / "node1", folder / "patched"
    options = split("--task digits --supported mnist --max-supported-drop 1 --alphas 0.5")
    models = ["--model", str(base), "--finetuned", str(tuned)]
    assert run(["patch", *options, *models, "-o", str(patched)]) == 0
    alpha = json.loads((patched / "summary.json").read_text())["alpha"]
    expected = TaskVector(base, tuned).apply(base, alpha)
    written = timm.create_model(f"local-dir:{patched}", pretrained=True).state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    nodes = [str(folder / "lofi" / f"node{index}") for index in range(2)]
    merge = ["merge", *nodes, "--method", "ties", "--base", str(base)]
    assert run([*merge, "-o", str(folder / "ties")]) == 0
    timm.create_model(f"local-dir:{folder / 'ties'}", pretrained=True)


def test_a_language_model_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    start, out = str(tmp_path / "gpt2"), str(tmp_path / "lofi")
    save_letters(Path(start), map(chr, range(128)))
    tiny_language_model(transformers).save_pretrained(start)
    training = split("--steps 60 --lr 1e-2 --batch-size 16")
    training += ["--text", __file__, "--model", start]
    assert run(["lofi", *training, "--nodes", "2", "-o", out]) == 0
    assert run(["finetune", *training, "-o", str(tmp_path / "alone")]) == 0
    capsys.readouterr()
    assert run(["evaluate", start, f"{out}/merged", "--text", __file__, "--json"]) == 0
    before, after = (row["perplexity"] for row in json.loads(capsys.readouterr().out))
    assert before == pytest.approx(128, rel=0.1)
    assert after < 0.3 * before
    transformers.AutoModelForCausalLM.from_pretrained(f"{out}/merged")
    assert run(["finetune", "-o", str(tmp_path / "x")]) == 2
    clip = ["--text", __file__, "--model", "embedded", "-o", str(tmp_path / "x")]
    assert run(["finetune", *clip]) == 1
    assert "not a language model" in capsys.readouterr().err


def test_no_data() -> None:
    with pytest.raises(OptionError, match="3 inputs and 2 labels"):
        ModuleLearner(nn.Linear(1, 1), torch.ones(3), torch.ones(2), classification, name="it")


def test_the_moving_average_of_a_bfloat16_module_moves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(64, 3).bfloat16(), torch.randint(2, (64,))
    config = TrainingConfig(steps=60, batch_size=16, lr=0.1, warmup=0, ema=0.99)
    module = nn.Linear(3, 2).bfloat16()
    means = {name: tensor.detach().float().clone() for name, tensor in module.named_parameters()}

    def follow(step: int) -> None:
        for name, tensor in module.named_parameters():
            means[name].lerp_(tensor.detach().float(), 0.01)

    learner = ModuleLearner(module, inputs, labels, classification, name="them")
    fit(learner, config, out=tmp_path / "run", on_step=follow)
    kept = open_checkpoint(tmp_path / "run" / "ema")
    for name, mean in means.items():
        assert kept[name].dtype == torch.bfloat16
        assert torch.equal(kept[name], mean.bfloat16()), name


def test_a_batch_of_one_with_batch_normalisation() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    inputs, labels = torch.randn(8, 3), torch.zeros(8, dtype=torch.long)
    learner = ModuleLearner(module, inputs, labels, classification, name="zeros")
    with pytest.raises(OptionError, match="needs more than one image at a time"):
        fit(learner, TrainingConfig(steps=1, batch_size=1, warmup=0))
