"""lo-fi of models that aren't CLIP: a timm classifier with its own head, a causal language model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
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


def nodes_of(
    module: nn.Module,
    data: torch.Tensor,
    labels: torch.Tensor,
    loss: object,
    config: TrainingConfig,
    out: Path,
) -> nn.Module:
    """The module with the average of two nodes' weights."""
    folders = []
    for index in range(2):
        learner = ModuleLearner(copy.deepcopy(module), data, labels, loss, name="it")
        folders.append(out / f"node{index}")
        fit(learner, config, out=folders[-1], node=Node(index, 2))
    return lofi.average(folders).load_into(copy.deepcopy(module))


def test_a_timm_classifier_and_its_shift(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1, **sizes)
    task = TASKS["digits"]

    def pixels(task: Task, split: str) -> torch.Tensor:
        images = task.load(split)
        rows = [
            torch.tensor(list(images[i].convert("L").tobytes()))
            for i in range(min(len(images), 200))
        ]
        return torch.stack(rows).view(-1, 1, 8, 8) / 255

    def accuracy(model: nn.Module, task: Task, split: str) -> float:
        with torch.no_grad():
            guesses = model.eval()(pixels(task, split)).argmax(1)
        return float(
            (guesses == torch.from_numpy(task.load(split).labels[: len(guesses)])).double().mean()
        )

    labels = torch.from_numpy(task.load("train").labels[:200])
    config = TrainingConfig(steps=60, batch_size=64, lr=3e-3)
    merged = nodes_of(model, pixels(task, "train"), labels, classification, config, tmp_path)
    scores = shift(
        lambda task, split: accuracy(merged, task, split),
        task,
        corruptions=["inversion", "blur"],
        severities=[1, 5],
    )
    assert scores["in_distribution"] > 0.5 > accuracy(model, task, "test")
    assert scores["corruptions"]["inversion"]["5"] < scores["in_distribution"]


def test_a_language_model_and_its_perplexity(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    text = Path(__file__).read_text().encode("ascii")
    tokens = torch.tensor(list(text[: len(text) // 32 * 32])).view(-1, 32)
    before = perplexity(model, tokens)
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss  # as transformers has it
    assert before == pytest.approx(float(loss.exp()), rel=1e-4)
    assert before == pytest.approx(128, rel=0.1)  # it guesses
    merged = nodes_of(
        model,
        tokens,
        tokens,
        token_loss,
        TrainingConfig(steps=60, batch_size=16, lr=1e-2),
        tmp_path,
    )
    assert perplexity(merged, tokens) < 0.3 * before
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert open_checkpoint(tmp_path / "node0").source.ties  # stored once


def test_a_timm_folder_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its head is for 7 classes: it gets a new one for the task, the same on every node."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **sizes)
    folder = open_checkpoint(model).save(tmp_path / "timm")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "model_args": sizes,
        "pretrained_cfg": {"input_size": [3, 16, 16], "crop_pct": 1.0, "num_classes": 7},
    }
    (folder / "config.json").write_text(json.dumps(config))
    training = [
        "--task",
        "digits",
        "--model",
        str(folder),
        "--steps",
        "120",
        "--lr",
        "4e-3",
        "--batch-size",
        "128",
    ]
    assert run(["lofi", *training, "--nodes", "2", "-o", str(tmp_path / "lofi")]) == 0
    assert run(["finetune", *training, "--node", "1/2", "-o", str(tmp_path / "node1")]) == 0
    node = open_checkpoint(tmp_path / "lofi" / "node1")
    assert all(
        torch.equal(node[name], tensor)
        for name, tensor in open_checkpoint(tmp_path / "node1").items()
    )
    with torch.no_grad():
        assert (
            timm.create_model(
                f"local-dir:{tmp_path / 'lofi' / 'merged'}", pretrained=True
            ).num_classes
            == 10
        )
    capsys.readouterr()
    assert run(["evaluate", str(tmp_path / "lofi" / "merged"), "--tasks", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["metrics"]["acc1"] > 0.25  # of ten
    # And what one does with CLIP models one does with classifiers.
    headless = open_checkpoint({**node, "head.weight": torch.zeros_like(node["head.weight"])})
    base = Checkpoint(headless.form, node.architecture).save(tmp_path / "base")
    arguments = [
        "--task",
        "digits",
        "--supported",
        "mnist",
        "--max-supported-drop",
        "1",
        "--alphas",
        "0.5",
    ]
    tuned = ["--model", str(base), "--finetuned", str(tmp_path / "node1")]
    assert run(["patch", *arguments, *tuned, "-o", str(tmp_path / "patched")]) == 0
    alpha = json.loads((tmp_path / "patched" / "summary.json").read_text())["alpha"]
    patched = TaskVector(base, tmp_path / "node1").apply(base, alpha)
    written = timm.create_model(f"local-dir:{tmp_path / 'patched'}", pretrained=True).state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in patched.items())
    models = [str(tmp_path / "lofi" / f"node{i}") for i in range(2)]
    assert (
        run(
            [
                "merge",
                *models,
                "--method",
                "ties",
                "--base",
                str(base),
                "-o",
                str(tmp_path / "ties"),
            ]
        )
        == 0
    )
    timm.create_model(f"local-dir:{tmp_path / 'ties'}", pretrained=True)
    capsys.readouterr()
    assert run(["evaluate", str(folder), "--tasks", "digits"]) == 1
    assert "has a head for 7 classes, and digits has 10" in capsys.readouterr().err


def test_a_language_model_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    letters = {chr(i): i for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(
        tmp_path / "gpt2"
    )
    config = transformers.GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    start, out = str(tmp_path / "gpt2"), str(tmp_path / "lofi")
    training = [
        "--text",
        __file__,
        "--model",
        start,
        "--steps",
        "60",
        "--lr",
        "1e-2",
        "--batch-size",
        "16",
    ]
    assert run(["lofi", *training, "--nodes", "2", "-o", out]) == 0
    assert run(["finetune", *training, "-o", str(tmp_path / "alone")]) == 0
    capsys.readouterr()
    assert run(["evaluate", start, f"{out}/merged", "--text", __file__, "--json"]) == 0
    before, after = (row["perplexity"] for row in json.loads(capsys.readouterr().out))
    assert before == pytest.approx(128, rel=0.1)
    assert after < 0.3 * before
    transformers.AutoModelForCausalLM.from_pretrained(f"{out}/merged")
    assert run(["finetune", "-o", str(tmp_path / "x")]) == 2
    assert (
        run(["finetune", "--text", __file__, "--model", "embedded", "-o", str(tmp_path / "x")]) == 1
    )
    assert "isn't a folder of transformers" in capsys.readouterr().err


def test_no_data() -> None:
    with pytest.raises(OptionError, match="3 inputs and 2 labels"):
        ModuleLearner(nn.Linear(1, 1), torch.ones(3), torch.ones(2), classification, name="it")
