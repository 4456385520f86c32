"""lo-fi of models that aren't CLIP: a timm classifier with its own head, a causal language model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from weightops import TASKS, TrainingConfig, lofi, open_checkpoint
from weightops.errors import OptionError
from weightops.evaluators.perplexity import perplexity, token_loss
from weightops.evaluators.shift import shift
from weightops.finetuning import fit
from weightops.learners import ModuleLearner, classification
from weightops.nodes import Node
from weightops.tasks.task import Task


def nodes_of(
    module: nn.Module, data: torch.Tensor, labels: torch.Tensor, loss: object, config: TrainingConfig, out: Path
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
        rows = [torch.tensor(list(images[i].convert("L").tobytes())) for i in range(min(len(images), 200))]
        return torch.stack(rows).view(-1, 1, 8, 8) / 255

    def accuracy(model: nn.Module, task: Task, split: str) -> float:
        with torch.no_grad():
            guesses = model.eval()(pixels(task, split)).argmax(1)
        return float((guesses == torch.from_numpy(task.load(split).labels[: len(guesses)])).double().mean())

    labels = torch.from_numpy(task.load("train").labels[:200])
    config = TrainingConfig(steps=60, batch_size=64, lr=3e-3)
    merged = nodes_of(model, pixels(task, "train"), labels, classification, config, tmp_path)
    scores = shift(
        lambda task, split: accuracy(merged, task, split), task, corruptions=["inversion", "blur"], severities=[1, 5]
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
    merged = nodes_of(model, tokens, tokens, token_loss, TrainingConfig(steps=60, batch_size=16, lr=1e-2), tmp_path)
    assert perplexity(merged, tokens) < 0.3 * before
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert open_checkpoint(tmp_path / "node0").source.ties  # stored once


def test_no_data() -> None:
    with pytest.raises(OptionError, match="3 inputs and 2 labels"):
        ModuleLearner(nn.Linear(1, 1), torch.ones(3), torch.ones(2), classification, name="it")
