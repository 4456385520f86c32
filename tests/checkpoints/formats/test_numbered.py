"""A file that is one of several is never taken as the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightops import CheckpointError, merge, open_checkpoint

STATE = {"norm.weight": torch.arange(4.0), "wq.weight": torch.arange(16.0).reshape(4, 4)}


def halves(folder: Path, name: str) -> Path:
    """Save each half of the rows in a file of its own; return the first."""
    for i, rows in enumerate((slice(0, 2), slice(2, 4))):
        place = folder / name.format(i)
        place.parent.mkdir(parents=True, exist_ok=True)
        half = {"norm.weight": STATE["norm.weight"], "wq.weight": STATE["wq.weight"][rows]}
        torch.save({"module": half, "mp_world_size": 2} if "mp_rank" in name else half, place)
    return folder / name.format(0)


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.0{}.pth",
        "mp_rank_0{}_model_states.pt",
        "iter_0000100/mp_rank_0{}/model_optim_rng.pt",
    ],
    ids=["Meta", "DeepSpeed", "Megatron"],
)
@pytest.mark.parametrize("ref", ["{}", "{}:wq", "the folder"])
def test_slices_of_model_parallelism(name: str, ref: str, tmp_path: Path) -> None:
    first = halves(tmp_path, name)
    place = first.parent if ref == "the folder" else ref.format(first)
    with pytest.raises(CheckpointError, match=r"slice of a model .* beside it: .*0.*, .*1"):
        open_checkpoint(place)
    with pytest.raises(CheckpointError, match="slice of a model"):
        merge([place, place])


def test_the_only_slice_is_the_model(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text('{"dim": 4}')
    assert open_checkpoint(tmp_path).keys() == STATE.keys()
    (tmp_path / "consolidated.00.pth").rename(tmp_path / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match="slice of a model"):
        open_checkpoint(tmp_path)


def of_torch(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path.with_suffix(".bin"))


@pytest.mark.parametrize("write", [save_file, of_torch])
def test_shards_without_their_index(
    write: Callable[[dict[str, torch.Tensor], Path], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for i, (name, tensor) in enumerate(STATE.items(), 1):
        write({name: tensor}, tmp_path / f"model-{i:05}-of-00002.safetensors")
    opened = open_checkpoint(tmp_path)
    assert opened.keys() == STATE.keys()
    assert all(torch.equal(opened[name], tensor) for name, tensor in STATE.items())
    [first, second] = sorted(tmp_path.iterdir())
    assert [*open_checkpoint(first)] == ["norm.weight"]
    assert f"{first} is 1 of 2 shards of a model" in caplog.text
    second.unlink()
    with pytest.raises(CheckpointError, match="holds 1 of 2 shards and no index: model-00002"):
        open_checkpoint(tmp_path)


def test_weights_in_a_folder_below(tmp_path: Path) -> None:
    """A trainer's folder has the model's parts in a folder of their own."""
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "pytorch_model_fsdp_0" / ".metadata").touch()
    with pytest.raises(CheckpointError, match="hint: its folders hold some: pytorch_model_fsdp_0"):
        open_checkpoint(tmp_path)
