"""The patch workflow, small: its files, its resume, and what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.interrupts import heed_interrupts
from huggingface_hub import ModelCard, parse_eval_result_entries

from weightops import (
    SearchOptions,
    TaskVector,
    TrainingConfig,
    config_for,
    evaluate,
    open_checkpoint,
    patch,
    verify,
)
from weightops.checkpoints.matching import convert_to
from weightops.errors import (
    CheckpointError,
    NothingSatisfiesError,
    OptionError,
    OutputError,
    UnknownNameError,
)
from weightops.hub.push import files_to_push
from weightops.support.atomic import check_free
from weightops.workflows.patch import Patch
from weightops.workflows.plan import plan_run

QUICK = {"supported": ["digits"], "search": SearchOptions((0.5,)), "device": "cpu"}


def short() -> TrainingConfig:
    return config_for("embedded", steps=8, batch_size=64, lr=1e-3)


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("patched") / "out"
    patch("mnist", out, max_supported_drop=1.0, training=short(), **QUICK)
    return out


def test_what_a_run_wrote_can_be_overwritten(patched: Path) -> None:
    check_free(patched, overwrite=True)


def test_the_tokenizer_that_is_written_is_no_other(
    patched: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt.gz")
    assert set(names) <= {path.name for path in patched.iterdir()}
    base = open_checkpoint("embedded")
    TaskVector(base, patched).apply(base, 0.5).save(tmp_path / "from the base")
    TaskVector(base, patched).apply(patched, 0.5).save(tmp_path / "from the edit")
    convert_to(open_checkpoint(patched), "transformers").save(tmp_path / "of transformers")
    assert "others have another" not in caplog.text
    other = tmp_path / "other"
    shutil.copytree(patched, other)
    (other / "merges.txt.gz").write_bytes(gzip.compress(b"other merges"))
    TaskVector(base, other).apply(base, 0.5).save(tmp_path / "of two")
    assert "others have another" in caplog.text
    assert "tokenizer.json" in caplog.text


def test_files_and_summary(patched: Path) -> None:
    names = {path.name for path in patched.iterdir()}
    assert {
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "merges.txt.gz",
        "README.md",
        "results.jsonl",
        "summary.json",
        "frontier.png",
    } <= names
    assert sorted(os.listdir(patched.parent)) == ["out"]
    for path in patched.rglob("*"):
        assert path.is_dir() or str(patched.parent).encode() not in path.read_bytes(), path.name
    summary = json.loads((patched / "summary.json").read_text())
    assert summary["alpha"] in (0.5, 1.0)
    assert summary["chosen_on"] == "the validation splits of mnist, digits"
    assert summary["tasks"]["mnist"]["role"] == "patching"
    assert summary["tasks"]["digits"]["role"] == "supported"
    assert {"base", "finetuned", "patched"} <= summary["tasks"]["digits"].keys()
    assert {"finetune", "sweep", "total"} == summary["seconds"].keys()
    assert {"why", "model", "seed", "versions"} <= summary.keys()
    rows = [json.loads(line) for line in (patched / "results.jsonl").read_text().splitlines()]
    assert len(rows) == (2 + 3) * 2
    assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= rows[0].keys()
    assert (patched / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_is_as_the_hub_reads_it(patched: Path) -> None:
    summary = json.loads((patched / "summary.json").read_text())
    card: Any = ModelCard.load(patched / "README.md")
    assert card.data.library_name == "open_clip"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.data.license == "apache-2.0"
    assert "model-index" not in card.content
    assert f"Made on {summary['date']}, on cpu, with python" in card.text
    found = yaml.safe_load((patched / ".eval_results/weightops.yaml").read_text())
    assert {entry["dataset"]["id"]: entry["value"] for entry in found} == {
        name: round(task["patched"]["acc1"], 6) for name, task in summary["tasks"].items()
    }
    entries = parse_eval_result_entries(found)
    assert [entry.date for entry in entries] == [summary["date"]] * 2
    for name in files_to_push(patched, "org/name"):
        assert (patched / name).is_file()
    assert ".eval_results/weightops.yaml" in files_to_push(patched, "org/name")
    assert verify(patched).holds


def test_no_record_names_the_folder_that_is_gone(patched: Path) -> None:
    for path in patched.rglob("*"):
        assert path.is_dir() or b".out.run" not in path.read_bytes(), path
    vector = open_checkpoint(patched / "open_clip_model.safetensors").source.made_from
    assert "embedded fine-tuned on mnist" in {term["ref"] for term in vector["terms"]}


def test_the_patched_model_is_the_one_that_was_tested(patched: Path) -> None:
    summary = json.loads((patched / "summary.json").read_text())
    assert evaluate(patched, "mnist", device="cpu")["mnist"] == summary["tasks"]["mnist"]["patched"]
    edited = (
        TaskVector.load(patched / "task_vector.safetensors")
        .apply("embedded", summary["alpha"])
        .to(torch.float32)
        .state_dict()
    )
    assert all(
        torch.allclose(t, edited[n], atol=1e-6)
        for n, t in open_checkpoint(patched).state_dict().items()
    )


def test_a_finished_run_is_the_same_only_if_the_same_was_asked_for(patched: Path) -> None:
    asked = {"max_supported_drop": 1.0, "training": short(), "resume": True}
    before = (patched / "summary.json").read_bytes()
    again = patch("mnist", patched, **asked, **QUICK)
    assert again == json.loads(before)
    for other in ({"search": SearchOptions((0.25,))}, {"max_supported_drop": 0.5}):
        with pytest.raises(OutputError, match="exists"):
            patch("mnist", patched, **{**QUICK, **asked, **other})
    assert (patched / "summary.json").read_bytes() == before


def test_given_finetuned_weights(patched: Path, tmp_path: Path) -> None:
    summary = patch("mnist", tmp_path / "out", finetuned=patched, max_supported_drop=1.0, **QUICK)
    assert summary["training"] is None
    assert summary["finetuned"] == str(patched)


def test_refusals(patched: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        patch("mnist", patched, **QUICK)
    with pytest.raises(OptionError, match="at least one supported"):
        patch("mnist", tmp_path / "x", supported=["mnist"])
    with pytest.raises(
        OptionError, match=r"max_supported_drop is -2.0, and must be a number at least 0"
    ):
        patch("mnist", tmp_path / "x", max_supported_drop=-2.0)
    with pytest.raises(UnknownNameError, match="no strategy 'both'"):
        patch(["mnist", "digits"], tmp_path / "x", strategy="both")
    with pytest.raises(TypeError, match="suported"):
        patch("mnist", tmp_path / "x", suported=["digits"])
    with pytest.raises(NothingSatisfiesError, match="no alpha improves mnist") as unimproved:
        patch("mnist", tmp_path / "x", finetuned="embedded", **QUICK)
    assert "another fine-tuning" in str(unimproved.value.hint)
    with pytest.raises(OptionError, match="finite"):
        SearchOptions((float("nan"),))
    with pytest.raises(UnknownNameError, match="'fast'"):
        SearchOptions(strategy="fast")
    assert list(tmp_path.iterdir()) == []


def test_plan(tmp_path: Path) -> None:
    workflow = Patch.from_call("mnist", training=short(), **QUICK)
    plan = plan_run(workflow, tmp_path / "x" / "y")
    assert plan.alphas == (0.0, 0.5)
    assert plan.training_samples == 8 * 64
    assert plan.free_bytes > plan.output_bytes > 0
    given = Patch.from_call("mnist", finetuned=str(tmp_path / "nope"), **QUICK)
    with pytest.raises(CheckpointError, match=r"there is no file or folder .*nope"):
        plan_run(given, tmp_path / "x")


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "weightops",
        "patch",
        "--task",
        "mnist",
        "--supported",
        "digits",
        "--alphas",
        "0.5",
        "--steps",
        "8",
        "--batch-size",
        "16",
        "--device",
        "cpu",
        "--max-supported-drop",
        "1",
        "-o",
        str(tmp_path / "out"),
        "-q",
    ]
    victim = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    work = tmp_path / ".out.run"
    while not (work / "mnist" / "finetuned.safetensors").exists() and victim.poll() is None:
        time.sleep(0.01)
    victim.send_signal(signal.SIGINT)
    _, errors = victim.communicate()
    assert victim.returncode == 1, errors
    assert len(errors.split("\n")) <= 3  # the terminal's own ^C, and one line
    assert "interrupted" in errors
    assert not (tmp_path / "out").exists()
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert os.listdir(tmp_path) == ["out"]
