"""Fine-tuning: what changes, what is kept, and that resuming gives the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.lofi_jobs import equal

from weightops import ImageModel, TrainingConfig, finetune, open_checkpoint
from weightops.errors import CheckpointError, OptionError, OutputError
from weightops.tasks.table import find_task
from weightops.training.run_folder import states_in

CONFIG = TrainingConfig(steps=6, batch_size=16, lr=1e-3, warmup=2, shift=0.1, seed=3)


def test_only_the_image_encoder_changes(tmp_path: Path) -> None:
    model = ImageModel.open("embedded", "cpu")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    random_state = torch.random.get_rng_state()
    tuned = finetune(model, "mnist", CONFIG, out=tmp_path / "run", checkpoint_every=2)
    changed = [name for name, tensor in tuned.items() if not torch.equal(tensor, before[name])]
    assert changed
    assert all(name.startswith("visual.") for name in changed)
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert not model.module.training
    assert all(parameter.requires_grad for parameter in model.module.parameters())


def test_a_finished_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tuned = finetune("embedded", "mnist", CONFIG, out=run, checkpoint_every=2)
    assert sorted(path.name for path in run.iterdir()) == [
        "README.md",
        "config.json",
        "finetuned.safetensors",
        "log.jsonl",
        "merges.txt.gz",
        "open_clip_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 6]
    with pytest.raises(OutputError, match=r"(?s)finetuned.safetensors exists.*overwrite=True"):
        finetune("embedded", "mnist", CONFIG, out=run)
    again = finetune("embedded", "mnist", CONFIG, out=run, resume=True)
    assert again.fingerprint == tuned.fingerprint
    with pytest.raises(CheckpointError, match="holds another run: lr"):
        finetune("embedded", "mnist", replace(CONFIG, lr=0.5), out=run, resume=True)


def test_arguments_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="checkpoint_every is 0, and must be an integer at least 1"
    ):
        finetune("embedded", "mnist", CONFIG, out=tmp_path / "run", checkpoint_every=0)
    assert not (tmp_path / "run").exists()


def test_other_data_are_not_taken_for_the_same(tmp_path: Path) -> None:
    task = find_task("shapes")
    other = replace(task, templates=("an image of a {}.",))
    config = TrainingConfig(steps=1, batch_size=8)
    finetune("embedded", task, config, out=tmp_path / "run", device="cpu")
    assert finetune("embedded", task, config, out=tmp_path / "run", resume=True, device="cpu")
    with pytest.raises(CheckpointError, match="holds another run: digest"):
        finetune("embedded", other, config, out=tmp_path / "run", resume=True, device="cpu")


FULL_DISK = """
import resource, sys
from weightops import finetune, TrainingConfig
from weightops.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
config = TrainingConfig(steps=2, batch_size=8)
try:
    finetune("embedded", "digits", config, out=sys.argv[1], checkpoint_every=1, device="cpu")
except OutputError as error:
    print(error)
"""


def test_a_full_disk_leaves_no_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "no space left" in run.stdout
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys
from weightops import finetune, TrainingConfig
options = {"checkpoint_every": 2, "resume": "resume" in sys.argv, "device": "cpu"}
finetune("embedded", "mnist", TrainingConfig(**CONFIG), out=sys.argv[1], **options)
"""


def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    config = {"steps": 40, "batch_size": 16, "lr": 1e-3, "warmup": 2, "shift": 0.1, "seed": 3}
    command = [sys.executable, "-c", SCRIPT.replace("CONFIG", repr(config))]
    whole, killed, damaged = (tmp_path / name for name in ("whole", "killed", "damaged"))
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    victim = subprocess.Popen([*command, str(killed)], stderr=subprocess.DEVNULL)
    while not states_in(killed) and victim.poll() is None:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not (killed / "finetuned.safetensors").exists()
    with pytest.raises(CheckpointError, match="holds another run"):
        finetune("embedded", "mnist", CONFIG, out=killed, resume=True)
    for folder in (damaged, killed):
        folder.mkdir(exist_ok=True)
        (folder / "training.1.pt").write_bytes(b"PK\3\4")
    message = r"training.1.pt isn't a state that a run can resume from\nhint: delete the file"
    with pytest.raises(CheckpointError, match=message):
        finetune("embedded", "mnist", CONFIG, out=damaged, resume=True)
    subprocess.run([*command, str(killed), "resume"], check=True, capture_output=True)
    assert equal(open_checkpoint(whole), open_checkpoint(killed))


def test_one_run_in_a_folder(tmp_path: Path) -> None:
    """Of two processes, the second is refused at its start; the first isn't disturbed."""
    line = [sys.executable, "-m", "weightops", "finetune", "--task", "digits", "--device", "cpu"]
    line += ["--batch-size", "8", "--checkpoint-every", "1", "-o", str(tmp_path / "run")]
    first = subprocess.Popen([*line, "--steps", "300"], stderr=subprocess.DEVNULL)
    while not states_in(tmp_path / "run"):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    for more in ([], ["--resume"], ["--overwrite"]):
        second = subprocess.run([*line, "--steps", "2", *more], capture_output=True, text=True)
        assert second.returncode == 1
        assert f"run is being written by process {first.pid} on " in second.stderr
    first.kill()
    first.wait()
    assert subprocess.run([*line, "--steps", "2", "--overwrite"]).returncode == 0
    assert not list((tmp_path / "run").glob(".*"))
