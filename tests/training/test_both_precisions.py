"""Fine-tuning and evaluation in both precisions: the same bits again, and records of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.transformers_folders import small_gpt2
from torch.nn import functional as F

from weightops import ImageModel, TrainingConfig, evaluate, finetune, open_checkpoint
from weightops.algebra.precision import Precision
from weightops.cli.main import run
from weightops.errors import CheckpointError
from weightops.evaluation.perplexity import perplexity
from weightops.evaluation.zero_shot import encode_split
from weightops.tasks.table import find_task
from weightops.training.run_folder import states_in

CONFIG = TrainingConfig(steps=4, batch_size=16, lr=1e-3, warmup=0, shift=0.1, ema=0.9, seed=3)
BOTH = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


@BOTH
def test_a_run_repeats_and_resumes_to_the_same_bits(tmp_path: Path, precision: Precision) -> None:
    whole = finetune("embedded", "mnist", CONFIG, device="cpu", precision=precision)

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(
            "embedded",
            "mnist",
            CONFIG,
            out=tmp_path / "run",
            checkpoint_every=2,
            device="cpu",
            precision=precision,
            on_step=stop,
        )
    assert list(states_in(tmp_path / "run")) == [2]
    resumed = finetune(
        "embedded",
        "mnist",
        CONFIG,
        out=tmp_path / "run",
        resume=True,
        device="cpu",
        precision=precision,
    )
    assert resumed.fingerprint == whole.fingerprint or all(
        torch.equal(resumed[name], whole[name]) for name in whole
    )
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["precision"] == precision
    assert all(resumed[name].dtype == torch.float32 for name in resumed)


def test_a_run_isn_t_resumed_in_another_precision(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=1)
    finetune("embedded", "shapes", config, out=tmp_path / "run", precision="float32")
    with pytest.raises(CheckpointError, match="another run: precision 'float32', not 'bfloat16'"):
        finetune(
            "embedded", "shapes", config, out=tmp_path / "run", precision="bfloat16", resume=True
        )


def test_bfloat16_learns_what_float32_learns() -> None:
    base = open_checkpoint("embedded")
    config = replace(CONFIG, steps=8, ema=0.0)
    tuned = {
        precision: finetune("embedded", "mnist", config, device="cpu", precision=precision)
        for precision in ("float32", "bfloat16")
    }
    moves = {
        precision: torch.cat([(t[n] - base[n]).flatten() for n in t if n.startswith("visual.")])
        for precision, t in tuned.items()
    }
    assert not torch.equal(moves["float32"], moves["bfloat16"])
    assert F.cosine_similarity(moves["float32"], moves["bfloat16"], dim=0) > 0.9


def test_features_of_both_precisions_agree() -> None:
    task = find_task("shapes")
    model = ImageModel.open("embedded", "cpu", precision="float32")
    exact = encode_split(model, task, "validation")
    lower = [encode_split(model.in_precision("bfloat16"), task, "validation") for _ in range(2)]
    assert lower[0].dtype == torch.float32
    assert torch.equal(lower[0], lower[1])
    assert not torch.equal(lower[0], exact)
    assert F.cosine_similarity(lower[0], exact).min() > 0.999
    head = model.class_features(task)
    assert torch.equal(head, model.in_precision("bfloat16").class_features(task))
    same = ((lower[0] @ head.T).argmax(1) == (exact @ head.T).argmax(1)).double().mean()
    assert same > 0.98


def test_an_open_model_is_run_in_the_precision_that_is_asked_for() -> None:
    model = ImageModel.open("embedded", "cpu", precision="bfloat16")
    assert ImageModel.open(model).precision == "bfloat16"
    assert ImageModel.open(model, precision="float32").precision == "float32"
    scores = [
        evaluate(given, "digits", precision="float32", device="cpu")["digits"]["acc1"]
        for given in (model, "embedded")
    ]
    assert scores[0] == scores[1]


@BOTH
def test_the_commands_record_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    options = ["--precision", precision, "--device", "cpu", "--json"]
    assert run(["evaluate", "embedded", "--tasks", "shapes", *options]) == 0
    assert json.loads(capsys.readouterr().out)[0]["precision"] == precision
    out = tmp_path / "out"
    small = ["--steps", "6", "--batch-size", "32", "--lr", "3e-4", "--alphas", "0,0.5,1"]
    command = ["patch", "--task", "mnist", "--supported", "shapes", "--max-supported-drop", "1"]
    assert run([*command, "-o", str(out), *small, *options]) == 0
    capsys.readouterr()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["precision"] == precision
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    used = {row["split"]: row["precision"] for row in rows}
    assert used == {"validation": precision, "test": "float32"}
    exact = evaluate(str(out), "mnist", precision="float32", device="cpu")["mnist"]["acc1"]
    assert summary["tasks"]["mnist"]["patched"]["acc1"] == exact


def test_perplexity_in_both_precisions() -> None:
    module, tokens = small_gpt2(), torch.arange(32).view(4, 8) % 20
    exact, lower = (perplexity(module, tokens, precision=p) for p in ("float32", "bfloat16"))
    assert exact == perplexity(module, tokens, precision="float32")
    assert exact != lower
    assert lower == pytest.approx(exact, rel=0.02)
