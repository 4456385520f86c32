"""Fine-tuning: the recipe, what it touches, and resuming to the bit."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from weightops import ImageModel, TrainingConfig, finetune, open_checkpoint
from weightops.errors import CheckpointError, OutputError
from weightops.tasks.table import find_task
from weightops.training.config import config_for
from weightops.training.finetune import batch_indices
from weightops.training.run_folder import states_in

CONFIG = TrainingConfig(steps=6, batch_size=16, lr=1e-3, warmup=2, shift=0.1, seed=3)


def same(a: Path, b: Path) -> bool:
    x, y = open_checkpoint(a).state_dict(), open_checkpoint(b).state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def test_the_papers_recipe() -> None:
    config = TrainingConfig()
    assert (
        config.steps,
        config.batch_size,
        config.lr,
        config.weight_decay,
        config.warmup,
        config.max_grad_norm,
    ) == (2000, 128, 1e-5, 0.1, 200, 1.0)
    assert config.learning_rate(0) == pytest.approx(1e-5 / 200)
    assert config.learning_rate(199) == pytest.approx(1e-5)
    assert config.learning_rate(1100) == pytest.approx(0.5e-5)
    assert config.learning_rate(1999) == pytest.approx(
        0.5e-5 * (1 + math.cos(math.pi * 1799 / 1800))
    )
    assert config_for(open_checkpoint({"w": torch.zeros(1)})) == config
    own = config_for(open_checkpoint("embedded"), lr=None)
    assert own != config
    assert config_for(open_checkpoint("embedded"), steps=5) == replace(own, steps=5)
    short = TrainingConfig(steps=50)
    assert short.learning_rate(4) == pytest.approx(1e-5)
    assert short.learning_rate(49) < 1e-7


def test_every_image_once_an_epoch() -> None:
    epochs = np.concatenate([batch_indices(10, 4, step, 0) for step in range(5)]).reshape(2, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()


def test_only_the_image_encoder_changes(tmp_path: Path) -> None:
    clip = ImageModel.open("embedded", "cpu")
    before = {n: t.clone() for n, t in clip.module.state_dict().items()}
    random = torch.random.get_rng_state()
    tuned = finetune(clip, "mnist", CONFIG, out=tmp_path / "run", checkpoint_every=2)
    changed = {n for n, t in tuned.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all(n.startswith("visual.") for n in changed)
    assert torch.equal(random, torch.random.get_rng_state())
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "README.md",
        "finetuned.safetensors",
        "log.jsonl",
        "merges.txt.gz",
        "open_clip_config.json",
        "training.json",
    ]
    assert not clip.module.training
    assert all(p.requires_grad for p in clip.module.parameters())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 6]
    with pytest.raises(OutputError, match="--overwrite"):
        finetune("embedded", "mnist", CONFIG, out=tmp_path / "run")
    again = finetune("embedded", "mnist", CONFIG, out=tmp_path / "run", resume=True)
    assert again.fingerprint == tuned.fingerprint
    with pytest.raises(CheckpointError, match="holds another run"):
        finetune("embedded", "mnist", replace(CONFIG, lr=0.5), out=tmp_path / "run", resume=True)


FULL_DISK = """
import resource, sys
from weightops import finetune, TrainingConfig
from weightops.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    finetune("embedded", "digits", TrainingConfig(steps=2, batch_size=8), out=sys.argv[1], checkpoint_every=1, device="cpu")
except OutputError as error:
    print(error)
"""


def test_a_full_disk_leaves_no_folder(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "no space left" in run.stdout
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys
from weightops import finetune, TrainingConfig
finetune("embedded", "mnist", TrainingConfig(**{config}), out=sys.argv[1], checkpoint_every=2, resume="resume" in sys.argv, device="cpu")
"""


def test_other_data_are_not_taken_for_the_same(tmp_path: Path) -> None:
    task = find_task("shapes")
    other = replace(task, templates=("an image of a {}.",))
    config = TrainingConfig(steps=1, batch_size=8)
    finetune("embedded", task, config, out=tmp_path / "run", device="cpu")
    assert finetune("embedded", task, config, out=tmp_path / "run", resume=True, device="cpu")
    with pytest.raises(CheckpointError, match="holds another run: digest"):
        finetune("embedded", other, config, out=tmp_path / "run", resume=True, device="cpu")
    assert finetune(
        "embedded", task, replace(config, steps=0), out=tmp_path / "none", device="cpu"
    ).fingerprint


def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    config = {"steps": 40, "batch_size": 16, "lr": 1e-3, "warmup": 2, "shift": 0.1, "seed": 3}
    command = [sys.executable, "-c", SCRIPT.replace("{config}", repr(config))]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    victim = subprocess.Popen([*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    while not states_in(tmp_path / "killed") and victim.poll() is None:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "finetuned.safetensors").exists()
    with pytest.raises(CheckpointError, match="holds another run"):
        finetune("embedded", "mnist", CONFIG, out=tmp_path / "killed", resume=True)
    for place in ("damaged", "killed"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "training.1.pt").write_bytes(b"PK\3\4")
    with pytest.raises(
        CheckpointError, match=r"training.1.pt isn't a state to go on from; delete it"
    ):
        finetune("embedded", "mnist", CONFIG, out=tmp_path / "damaged", resume=True)
    subprocess.run([*command, str(tmp_path / "killed"), "resume"], check=True, capture_output=True)
    assert same(
        tmp_path / "whole" / "finetuned.safetensors", tmp_path / "killed" / "finetuned.safetensors"
    )
