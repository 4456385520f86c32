"""Merges: bases, plans, overwriting, and inputs that aren't sound."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.closeness import bits_equal
from helpers.merges import family, same_files
from helpers.nets import perturbed
from torch import nn

from weightops import Checkpoint, TaskVector, average, open_checkpoint
from weightops.cli.main import run
from weightops.errors import OptionError, OutputError, SpaceError
from weightops.merging.merge import merge
from weightops.merging.methods.source import MethodSource


def test_bases() -> None:
    base, models = family(2)
    with pytest.raises(OptionError, match=r"ties merges task vectors.* no base\nhint: .*base="):
        merge(models, "ties")
    with pytest.raises(OptionError, match=r"alpha is a task vector's .* no base\nhint: .*base="):
        merge(models, "linear", alpha=0.5)
    with pytest.raises(SpaceError, match="ties merges task vectors, not weights"):
        MethodSource("ties", [open_checkpoint(base).form])

    def largest(models: torch.Tensor) -> torch.Tensor:
        return models.amax(0)

    with pytest.raises(OptionError, match="largest merges weights\nhint: leave out base="):
        merge(models, largest, base=base)
    with pytest.raises(SpaceError, match="largest merges weights, not task vectors"):
        MethodSource(largest, [TaskVector(base, models[0]).form])


def test_a_module_gives_a_module(net: nn.Module, tuned: nn.Module) -> None:
    other = perturbed(net, 2)
    merged = merge([tuned, other.state_dict()], "ties", base=net, density=0.5)
    states = [tuned.state_dict(), other.state_dict()]
    of_states = merge(states, "ties", base=net.state_dict(), density=0.5)
    assert type(merged) is type(net)
    assert bits_equal(merged.state_dict(), {n: of_states[n] for n in merged.state_dict()})
    assert merged.out.weight is merged.embed.weight
    assert not merged.frozen.requires_grad
    mean = merge([net, tuned, other], "linear", weights=[1, 1, 2])
    assert bits_equal(mean.state_dict(), average([net, tuned, other], [1, 1, 2]).state_dict())
    assert isinstance(merge([net.state_dict(), tuned]), Checkpoint)


def test_a_dry_run_says_what_is_written(
    model_files: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, models = model_files
    line = ["merge", *models, "--base", base, "--method", "ties", "-o", str(tmp_path / "out")]
    line += ["--max-shard-size", "1KB"]
    assert run([*line, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert run(line) == 0
    written = list((tmp_path / "out").glob("*.safetensors"))
    assert (plan["files"], plan["tensors"]) == (len(written), 8)
    assert plan["bytes_written"] == sum(file.stat().st_size for file in written)
    assert plan["bytes_read"] == 4 * sum(t.numel() * 4 for t in open_checkpoint(base).values())


def test_nothing_stale_is_left_by_overwriting(
    model_files: tuple[str, list[str]], tmp_path: Path
) -> None:
    _, models = model_files
    merged, out = merge(models), tmp_path / "out"
    merged.save(out, max_shard_size=1000)
    assert len(list(out.glob("*.safetensors"))) > 2
    with pytest.raises(OutputError, match=r"exists\nhint: overwrite=True replaces it"):
        merged.save(out)
    merged.save(out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors", "recipe.yaml"]
    with pytest.raises(OptionError, match="give a folder"):
        merged.save(tmp_path / "x.safetensors", max_shard_size=10)


def test_a_merged_folder_is_overwritten_by_its_own_command(
    model_files: tuple[str, list[str]], tmp_path: Path
) -> None:
    line = ["merge", *model_files[1], "-o", str(tmp_path / "out")]
    assert run(line) == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "recipe.yaml"} <= first.keys()
    assert run(line) == 1
    assert run([*line, "--overwrite"]) == 0
    again = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    card = again.pop("README.md").decode()
    assert again == {name: content for name, content in first.items() if name != "README.md"}
    assert card.replace(" --overwrite", "") == first["README.md"].decode()


def test_a_small_file_system(model_files: tuple[str, list[str]], tmp_path: Path) -> None:
    """A real file system of a megabyte, where the system allows to mount one."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount")
    try:
        big = {f"w{i}": torch.ones(100_000) for i in range(4)}
        with pytest.raises(OutputError, match=r"no space left for .*out; nothing was written"):
            merge([big, big]).save(place / "out")
        assert list(place.iterdir()) == []
        merge(model_files[1]).save(place / "out")
        with pytest.raises(OutputError, match="no space left"):
            merge([big, big]).save(place / "out", overwrite=True)
        assert same_files(place / "out", merge(model_files[1]).save(tmp_path / "again"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_an_input_cut_short(
    model_files: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, models = model_files
    data = Path(models[1]).read_bytes()
    Path(models[1]).write_bytes(data[: len(data) // 2])
    assert run(["merge", *models, "-o", str(tmp_path / "out")]) == 1
    assert "is not a sound safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(["merge", *models, "-o", str(tmp_path / "out"), "--max-shard-size", "tiny"]) == 2


def test_nonfinite_inputs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = [{"good": torch.ones(40), "bad": torch.ones(40)} for _ in range(3)]
    states[1]["bad"][7] = float("nan")
    paths = [
        str(open_checkpoint(s).save(tmp_path / f"{i}.safetensors", on_nonfinite="ignore"))
        for i, s in enumerate(states)
    ]
    for method in ("task_arithmetic", "ties", "magnitude", "dare_linear"):
        line = ["merge", *paths[1:], "--base", paths[0], "--method", method]
        assert run([*line, "-o", str(tmp_path / "out"), "--on-nonfinite", "error"]) == 1
        assert "NaN or Inf in 1 tensor: bad" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
