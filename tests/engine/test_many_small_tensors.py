"""Small tensors are joined into one step where they are computed alike, to the same bits."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers.threads import one_torch_thread
from safetensors.torch import load_file, save_file

from weightops import merge, open_checkpoint
from weightops.engine.plan import SEGMENT, joined, plan, units
from weightops.errors import CheckpointError

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def models(folder: Path, count: int = 3) -> list[Path]:
    """Models of tensors of many sizes and dtypes, some equal in all, in other orders in files."""
    paths = [folder / f"m{i}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        same, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(i + 1)
        tensors = {}
        for k in range(300):
            tensor = torch.randn((1, 7, 100, 0, 33)[k % 5], generator=same)
            if k % 4:
                tensor = tensor + 0.1 * torch.randn(tensor.shape, generator=own)
            elif tensor.numel():
                tensor[0] = -0.0
            tensors[f"layers.{k}.weight"] = tensor.to(KINDS[k // 30 % 4])
            tensors[f"layers.{k}.ids"] = torch.arange(k % 3)
        save_file(dict(reversed(tensors.items())) if i % 2 else tensors, path)
    return paths


def by_formula(paths: list[Path], base: Path | None) -> dict[str, torch.Tensor]:
    """The mean, or the base plus the deltas, of each tensor alone."""
    loaded = [load_file(path) for path in paths]
    origin = load_file(base) if base else loaded[0]
    results = {}
    for name, start in origin.items():
        stack = torch.stack([tensors[name].double() for tensors in loaded])
        wide = start.double()
        mean = stack.mean(0) if base is None else wide + (stack - wide).sum(0)
        results[name] = mean.to(start.dtype) if start.is_floating_point() else start
    return results


@pytest.mark.parametrize("with_base", [False, True])
def test_joined_tensors_are_each_what_they_are_alone(tmp_path: Path, with_base: bool) -> None:
    base, *others = models(tmp_path)
    method = "task_arithmetic" if with_base else "linear"
    merged = merge(others, method, base=base if with_base else None)
    merged.save(tmp_path / "joined.safetensors")
    joint = load_file(tmp_path / "joined.safetensors")
    right = by_formula(others, base if with_base else None)
    for name, alone in merged.state_dict().items():
        assert joint[name].equal(alone), name
        assert joint[name].view(torch.uint8).equal(alone.view(torch.uint8)), name  # -0.0, too
        torch.testing.assert_close(joint[name], right[name], msg=name)


def test_tensors_in_shards_are_joined_alike(tmp_path: Path) -> None:
    paths = models(tmp_path)
    whole = merge(paths, "linear").save(tmp_path / "whole")
    shards = [
        open_checkpoint(path).save(tmp_path / path.stem, max_shard_size=4000) for path in paths
    ]
    assert len(list(shards[0].glob("*.safetensors"))) > 3
    merged = merge(shards, "linear").save(tmp_path / "of_shards")
    expected, got = (load_file(folder / "model.safetensors") for folder in (whole, merged))
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.view(torch.uint8).equal(expected[name].view(torch.uint8)), name


def test_neighbours_that_are_computed_alike_are_one_step(tmp_path: Path) -> None:
    form = merge(models(tmp_path), "linear").form
    steps = list(joined(plan(form), form.specs))
    assert [n for s in steps for n in s.run or [s.name]] == list(form.specs)
    assert len(steps) < len(form.specs)
    for step in steps:
        assert step.numel <= SEGMENT
        assert len({form.specs[name].dtype for name in step.run or [step.name]}) == 1
    large = merge([{"a": torch.ones(SEGMENT), "b": torch.ones(4)}] * 2, "linear").form
    assert len(list(joined(plan(large), large.specs))) == 2


def test_a_unit_holds_no_more_than_a_segment(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.zeros(50_000) for i in range(50)}
    form = open_checkpoint(tensors).form
    work = units(joined(plan(form), form.specs))
    assert sum(s.step.numel for unit in work for s in unit) == 2_500_000
    assert max(s.step.numel for unit in work for s in unit) <= SEGMENT


def test_shards_and_threads_give_the_same_bytes(tmp_path: Path) -> None:
    paths = models(tmp_path)
    one = merge(paths, "linear")
    one.save(tmp_path / "whole.safetensors")
    one.save(tmp_path / "shards", max_shard_size=4000)
    again = open_checkpoint(tmp_path / "shards")
    for name, tensor in load_file(tmp_path / "whole.safetensors").items():
        assert again[name].equal(tensor), name
    sharded = merge([tmp_path / "shards", *paths[1:]], "linear")
    sharded.save(tmp_path / "threads.safetensors")
    with one_torch_thread():
        sharded.save(tmp_path / "thread.safetensors")
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("thread", "threads")]
    assert files[0] == files[1]


def test_what_is_not_finite_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {f"w{i}": torch.ones(10) for i in range(20)} | {"n.running_var": -torch.ones(3)}
    tensors["w7"][3] = torch.inf
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({n: 2 * t for n, t in tensors.items()}, tmp_path / "b.safetensors")
    with caplog.at_level(logging.WARNING):
        merged = merge([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], "linear")
        merged.save(tmp_path / "out.safetensors")
    assert "NaN or Inf in 1 tensor: w7" in caplog.text
    assert "variances in 1 tensor: n.running_var" in caplog.text


def test_a_file_that_is_cut_short_is_one_error(tmp_path: Path) -> None:
    a, b, _ = models(tmp_path)
    merged = merge([a, b], "linear")
    b.write_bytes(b.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"m1\.safetensors changed while it was read"):
        merged.save(tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
