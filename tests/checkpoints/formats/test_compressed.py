"""Compressed task vectors: their size, the error that their metadata state, and their use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from weightops import TaskVector, merge, open_checkpoint
from weightops.checkpoints.formats.compressed import CODINGS, coding
from weightops.cli.main import run
from weightops.errors import CheckpointError, OptionError, UnknownNameError

LARGEST_ERRORS = {
    "bf16": 0.004,
    "int8": 0.01,
    "sparse:0.1": 0.8,
    "sparse:1": 0.004,
    "lowrank:4": 0.9,
    "lowrank:1000": 0.004,
}


@pytest.fixture(scope="module")
def pair() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    pre = {
        "w": torch.randn(64, 48),
        "conv": torch.randn(16, 8, 3, 3),
        "b": torch.randn(64),
        "s": torch.tensor(2.0),
        "z": torch.zeros(4, 4),
        "n": torch.arange(3),
    }
    pre["empty"] = torch.zeros(0, 3)
    pre["tied"] = pre["w"]
    ft = {
        name: tensor + 0.01 * torch.randn_like(tensor)
        if name in ("w", "conv", "b", "s")
        else tensor
        for name, tensor in pre.items()
    }
    ft["tied"] = ft["w"]
    return pre, ft


@pytest.mark.parametrize("how", LARGEST_ERRORS)
def test_the_metadata_state_the_error(
    pair: tuple[dict[str, torch.Tensor], ...], tmp_path: Path, how: str
) -> None:
    pre, ft = pair
    exact = TaskVector(pre, ft)
    path = exact.save(tmp_path / "v.safetensors", compress=how)
    loaded = TaskVector.load(path)
    assert list(loaded) == list(exact)
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["weightops"])
    stated = record["compressed"]["relative_error"]
    squares = [
        (
            float((loaded[n] - exact[n]).double().square().sum()),
            float(exact[n].double().square().sum()),
        )
        for n in exact
        if n != "tied"
    ]
    assert stated == pytest.approx(
        (sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5, rel=1e-3
    )
    assert stated < LARGEST_ERRORS[how]
    assert record["base"]["fingerprint"] == open_checkpoint(pre).fingerprint
    assert loaded.form.sources[0].ties == {"tied": "w"}
    edited = loaded.apply(pre)
    assert torch.allclose(edited["w"], pre["w"] + loaded["w"])
    assert torch.equal(edited["n"], pre["n"])
    assert edited["tied"] is edited["w"]


def test_the_mode_is_that_of_other_files(
    pair: tuple[dict[str, torch.Tensor], ...], tmp_path: Path
) -> None:
    plain = TaskVector(*pair).save(tmp_path / "plain.safetensors")
    small = TaskVector(*pair).save(tmp_path / "small.safetensors", compress="int8")
    assert small.stat().st_mode == plain.stat().st_mode


def test_sizes_and_what_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pre, ft = ({"w": torch.randn(256, 256)} for _ in range(2))
    tau = TaskVector(pre, ft)
    size = {
        how: tau.save(tmp_path / f"{how}.safetensors", compress=how).stat().st_size
        for how in ("bf16", "int8", "sparse:0.1", "lowrank:8")
    }
    full = tau.save(tmp_path / "full.safetensors").stat().st_size
    assert size["bf16"] < 0.52 * full
    assert size["int8"] < 0.27 * full
    assert size["sparse:0.1"] < 0.17 * full
    assert size["lowrank:8"] < 0.08 * full
    delta = tau["w"]
    sparse = TaskVector.load(tmp_path / "sparse:0.1.safetensors")["w"]
    kept = delta.abs() >= delta.abs().flatten().kthvalue(delta.numel() - 6554 + 1).values
    assert torch.equal(sparse, torch.where(kept, delta.bfloat16().float(), 0))
    rows = delta.abs().amax(1, keepdim=True) / 127
    assert (
        (TaskVector.load(tmp_path / "int8.safetensors")["w"] - delta)
        .abs()
        .le(rows / 2 * 1.001)
        .all()
    )
    u, s, vh = torch.linalg.svd(delta)
    assert torch.allclose(
        TaskVector.load(tmp_path / "lowrank:8.safetensors")["w"],
        u[:, :8] * s[:8] @ vh[:8],
        atol=1e-4,
    )


def test_on_the_command_line_and_in_merges(
    net: nn.Module,
    tuned: nn.Module,
    saved: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pre, ft = map(str, saved)
    vector = str(tmp_path / "v.safetensors")
    assert run(["vector", pre, ft, "-o", vector, "--compress", "int8", "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["relative_error"] < 0.01
    assert run(["inspect", vector]) == 0
    assert "compressed   int8, relative error 0.0" in capsys.readouterr().out
    assert (
        run(["apply", vector, "--base", pre, "-o", str(tmp_path / "e.safetensors"), "--strict"])
        == 0
    )
    assert torch.allclose(
        open_checkpoint(tmp_path / "e.safetensors")["hidden.weight"], tuned.hidden.weight, atol=1e-2
    )
    assert set(merge([vector, ft], "ties", base=pre)) == set(net.state_dict())
    assert run(["vector", pre, ft, "-o", str(tmp_path / "lora"), "--lora", "2"]) == 0
    assert "stored with a relative error of" in capsys.readouterr().out
    assert "hidden.weight" in TaskVector.load(tmp_path / "lora")
    assert run(["vector", pre, ft, "--compress", "int8"]) == 2
    assert run(["vector", pre, ft, "-o", vector, "--compress", "int8", "--lora", "3"]) == 2


def test_names_that_are_no_compression(
    pair: tuple[dict[str, torch.Tensor], ...], tmp_path: Path
) -> None:
    tau = TaskVector(*pair)
    for how in (
        "sparse",
        "sparse:0",
        "sparse:2",
        "sparse:x",
        "lowrank:0",
        "lowrank:1.5",
        "lowrank:nan",
        "int8:3",
        "sparse:nan",
    ):
        with pytest.raises(OptionError, match="a compression is bf16"):
            tau.save(tmp_path / "v.safetensors", compress=how)
    with pytest.raises(UnknownNameError, match="did you mean int8"):
        coding("int9")
    with pytest.raises(OptionError, match="has the dtypes of its compression"):
        tau.save(tmp_path / "v.safetensors", compress="int8", dtype=torch.bfloat16)
    assert list(tmp_path.iterdir()) == []
    assert set(CODINGS) == {how.partition(":")[0] for how in LARGEST_ERRORS}


def test_damaged_files(pair: tuple[dict[str, torch.Tensor], ...], tmp_path: Path) -> None:
    path = TaskVector(*pair).save(tmp_path / "v.safetensors", compress="sparse:0.1")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["weightops"])

    def rewritten(compressed: object, **changed: torch.Tensor) -> Path:
        save_file(
            {**tensors, **changed},
            path,
            metadata={"weightops": json.dumps({**record, "compressed": compressed})},
        )
        return path

    sound = record["compressed"]
    for broken in (
        [],
        3,
        {},
        {**sound, "how": 3},
        {**sound, "shapes": {"w": [2**40, 2**40]}},
        {**sound, "shapes": {"w": ["a"]}},
        {**sound, "ties": 1},
    ):
        with pytest.raises(CheckpointError, match=r"metadata aren't sound|holds other tensors"):
            TaskVector.load(rewritten(broken))
    with pytest.raises(CheckpointError, match="holds other tensors than its metadata say"):
        TaskVector.load(rewritten({**sound, "shapes": {"w": [64, 48]}}))
    far = {**sound, "shapes": {**sound["shapes"], "w": [2**15, 2**15]}}
    with pytest.raises(
        CheckpointError, match="damaged at w: it holds fewer entries than any density leaves"
    ):
        TaskVector.load(rewritten(far))["w"]
    with pytest.raises(CheckpointError, match="damaged at w: its indices don't rise"):
        TaskVector.load(
            rewritten(sound, **{"w:indices": torch.full_like(tensors["w:indices"], 10**6)})
        )["w"]


def test_what_changed_is_kept_exactly(tmp_path: Path) -> None:
    base = {"w": torch.randn(300, 200), "frozen": torch.randn(400, 300), "b": torch.randn(7)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["w"][5, 3:9] += 1e-3
    tuned["b"][6] = -2.0
    vector = TaskVector(base, tuned)
    path = vector.save(tmp_path / "v.safetensors", compress="sparse:lossless")
    stored = TaskVector.load(path)
    assert all(torch.equal(stored[name], vector[name]) for name in base)
    assert path.stat().st_size < 2_000
    assert load_file(path)["w:values"].numel() == 6
    for wrong in ("sparse:-1", "int8:lossless", "lowrank:lossless"):
        with pytest.raises(OptionError, match="sparse:lossless"):
            vector.save(tmp_path / "x.safetensors", compress=wrong)
