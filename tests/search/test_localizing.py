"""Masks that are learned for a task: against autograd's own gradients, and what they are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.drawn_folders import SHORT, draw
from helpers.transformers_folders import save_letters, saved, small_gpt2
from torch.func import functional_call

from weightops import Checkpoint, ImageModel, TaskVector, config_for, localize, open_checkpoint
from weightops.checkpoints.matching import convert_to
from weightops.cli.main import run
from weightops.errors import (
    CheckpointError,
    NonfiniteError,
    OptionError,
    SpaceError,
    UnknownNameError,
)
from weightops.search.session import EditSession
from weightops.tasks.table import find_task

QUICK: dict[str, Any] = {"images": 16, "search_steps": 3, "search_lr": 1.5, "device": "cpu"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task whose names are swapped, the base, and weights that have learnt it."""
    root = tmp_path_factory.mktemp("own")
    draw(root / "swapped", {"moon": "arrow", "arrow": "moon"}, 40, 0)
    base = open_checkpoint("embedded")
    base.save(root / "pre")
    task = find_task(str(root / "swapped"))
    vector = EditSession(base, [task], config=config_for(base, **SHORT)).learn(task)
    vector.apply(base).save(root / "ft")
    return root


@pytest.fixture
def vector(own: Path) -> TaskVector:
    return TaskVector(own / "pre", own / "ft")


def masks_by_autograd(
    base: Checkpoint, vector: TaskVector, folder: str, penalty: float, density: float
) -> dict[str, torch.Tensor]:
    """Return where ``sigmoid(S)`` rounds to 1, with S moved by gradients through the whole sum."""
    model, task = ImageModel.open(base, "cpu", precision="float32"), find_task(folder)
    pixels = model.pixels(task, "train")
    chosen = np.random.default_rng(0).permutation(len(pixels))[:16]
    images, labels = pixels.batch(chosen), pixels.labels[torch.from_numpy(chosen)]
    head = model.zero_shot_head(task)
    own = dict(model.module.named_parameters())
    taus = {name: tau for name, tau in vector.items() if name in own and tau.any()}
    sizes = torch.cat([tau[tau != 0].abs() for tau in taus.values()]).sort().values
    least = sizes[len(sizes) - round(density * len(sizes))]
    scores = {
        name: torch.where(tau.abs() >= least, 3.0, -3.0).requires_grad_()
        for name, tau in taus.items()
    }
    optimizer = torch.optim.Adam(scores.values(), lr=QUICK["search_lr"])

    def logits(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        encoder = {
            n.removeprefix("visual."): t for n, t in changed.items() if n.startswith("visual.")
        }
        features = functional_call(model.module.visual, encoder, (images,))
        return torch.nn.functional.normalize(features, dim=-1) @ head.T

    for _ in range(QUICK["search_steps"]):
        shares = {name: torch.sigmoid(score) for name, score in scores.items()}
        changed = {name: own[name].detach() + shares[name] * tau for name, tau in taus.items()}
        loss = torch.nn.functional.cross_entropy(logits(changed), labels)
        kept = torch.cat([shares[name][tau != 0] for name, tau in taus.items()])
        optimizer.zero_grad()
        ((loss + penalty * kept.mean()) * len(kept)).backward()
        optimizer.step()
    return {name: torch.sigmoid(score).round() == 1 for name, score in scores.items()}


@pytest.mark.parametrize(("penalty", "density"), [(0.5, 0.1), (20.0, 0.4)])
def test_scores_follow_the_gradient(
    own: Path, vector: TaskVector, penalty: float, density: float
) -> None:
    base, folder = open_checkpoint(own / "pre"), str(own / "swapped")
    found = localize(vector, folder, penalty=penalty, density=density, **QUICK)
    masks = masks_by_autograd(base, vector, folder, penalty, density)
    wrong = total = 0
    for name, tau in vector.items():
        expected = tau * masks[name] if name in masks else tau
        wrong += int((found[name] != expected).sum())
        total += int((tau != 0).sum())
    assert wrong < 1e-3 * total  # where Adam divides a gradient of almost 0 by its own size
    kept = sum(int(tau.count_nonzero()) for tau in found.values())
    assert 0.01 * total < kept < 0.95 * total


def test_few_elements_are_enough(own: Path, vector: TaskVector) -> None:
    folder = str(own / "swapped")
    task = find_task(folder)
    learned = localize(vector, folder, penalty=4, density=0.01, search_steps=40, device="cpu")
    sizes = torch.cat([tau.abs().flatten() for tau in vector.values()])
    kept = sum(int(tau.count_nonzero()) for tau in learned.values())
    least = sizes.topk(kept).values[-1]
    session = EditSession(own / "pre", [task], device="cpu")
    largest = session.in_memory({n: t * (t.abs() >= least) for n, t in vector.items()}, "largest")
    base, by_size, by_mask = (
        session.measure(edit, "validation").hits["swapped"].float().mean()
        for edit in (vector * 0, largest, learned)
    )
    assert kept < 0.06 * int(sizes.count_nonzero())
    assert by_mask >= by_size
    assert by_mask > base


def test_the_same_seed_gives_the_same_bits(own: Path, vector: TaskVector) -> None:
    folder = str(own / "swapped")
    first, again, other = (localize(vector, folder, seed=seed, **QUICK) for seed in (0, 0, 1))
    assert all(torch.equal(tau, again[name]) for name, tau in first.items())
    few = {**QUICK, "images": 40}
    first, other = (localize(vector, folder, seed=seed, **few) for seed in (0, 1))
    assert any(not torch.equal(tau, other[name]) for name, tau in first.items())


def test_names_of_transformers(own: Path, vector: TaskVector, tmp_path: Path) -> None:
    """A model in transformers' names, whose q, k and v are apart, gets the same mask."""
    for name in ("pre", "ft"):
        convert_to(open_checkpoint(own / name), "transformers").save(tmp_path / name)
    theirs = TaskVector(tmp_path / "pre", tmp_path / "ft")
    found = localize(theirs, str(own / "swapped"), **QUICK)
    assert set(found) == set(theirs)
    mine = localize(vector, str(own / "swapped"), **QUICK)
    assert (mine - found).norm() == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_half_precision_rounds_no_difference(own: Path, tmp_path: Path, dtype: str) -> None:
    """What stays of a vector on weights in another dtype gives the fine-tuned weights there."""
    for name in ("pre", "ft"):
        open_checkpoint(own / name).to(dtype).save(tmp_path / name)
    vector = TaskVector(tmp_path / "pre", tmp_path / "ft")
    found = localize(vector, str(own / "swapped"), **QUICK)
    wide = torch.float64 if dtype == "float64" else torch.float32
    assert {tensor.dtype for tensor in found.values()} == {wide}
    edited, finetuned = found.apply(tmp_path / "pre"), open_checkpoint(tmp_path / "ft")
    for name, delta in found.items():
        kept = delta != 0
        assert torch.equal(edited[name][kept], finetuned[name][kept])


def test_on_the_command_line(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pre, ft = str(own / "pre"), str(own / "ft")
    options = ["--localize", str(own / "swapped"), "--images", "16", "--device", "cpu", "-q"]
    options += ["--search-steps", "3", "--search-lr", "1.5"]
    for name, penalty in (("a", "0.5"), ("b", "20")):
        more = ["--penalty", penalty, "--compress", "sparse:lossless", "-o", f"{name}.safetensors"]
        assert run(["vector", pre, ft, *options, *more]) == 0
    a, b = (TaskVector.load(f"{name}.safetensors") for name in "ab")
    assert run(["inspect", "a.safetensors"]) == 0
    assert "of what changed, by 16 train images of swapped" in capsys.readouterr().out
    merge = ["merge", "a.safetensors", "b.safetensors", "--base", pre, "-o", "stitched"]
    assert run([*merge, "--method", "localize_and_stitch", "--density", "1", "-q"]) == 0
    stitched, start = open_checkpoint("stitched"), open_checkpoint(pre)
    for name, theta in start.items():
        both = torch.stack([a[name], b[name]]) if name in a else torch.zeros(2, *theta.shape)
        count = (both != 0).sum(0).clamp(min=1)
        assert torch.allclose(stitched[name], theta + both.sum(0) / count, atol=1e-6)
    assert run(["vector", pre, ft, "--penalty", "2"]) == 2
    assert "--localize names the task" in capsys.readouterr().err
    file = own / "ft" / "open_clip_model.safetensors"
    before = file.read_bytes()
    assert run(["vector", pre, ft, *options, "-o", str(file), "--overwrite"]) == 1
    assert "is an input" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_the_record_says_how(own: Path, vector: TaskVector, tmp_path: Path) -> None:
    localize(vector, str(own / "swapped"), **QUICK).save(tmp_path / "v.safetensors")
    [term] = TaskVector.load(tmp_path / "v.safetensors").form.sources[0].made_from["terms"]
    record = term["localized"]
    assert (record["task"], record["split"], record["images"]) == ("swapped", "train", 16)
    assert (record["steps"], record["lr"], record["seed"]) == (3, 1.5, 0)
    kept = sum(int(t.count_nonzero()) for t in TaskVector.load(tmp_path / "v.safetensors").values())
    changed = sum(int(t.count_nonzero()) for t in vector.values())
    assert record["kept"] == pytest.approx(kept / changed, rel=1e-6)


def test_texts_are_refused(tmp_path: Path) -> None:
    folder = saved(small_gpt2(), tmp_path / "llm")
    save_letters(folder, "?abcdefghijklmno")
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 9)
    state = {n: t + 0.1 for n, t in open_checkpoint(folder).items()}
    with pytest.raises(OptionError, match="localize takes tasks of images, and a model of images"):
        localize(TaskVector(folder, state), str(text), **QUICK)


def test_refusals(own: Path, vector: TaskVector, tmp_path: Path) -> None:
    folder = str(own / "swapped")
    vector.save(tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match="doesn't hold its base"):
        localize(TaskVector.load(tmp_path / "v.safetensors"), folder, **QUICK)
    with pytest.raises(OptionError, match=r"no element of .* stays"):
        localize(vector, folder, penalty=1e6, **{**QUICK, "search_steps": 5})
    with pytest.raises(OptionError, match="density is 2, and must be a number"):
        localize(vector, folder, density=2)
    with pytest.raises(OptionError, match="pass through nothing that the task vectors change"):
        localize(vector * 0, folder, **QUICK)
    with pytest.raises(NonfiniteError, match="is nan at step 0") as refused:
        localize(vector * 1e38 * 10, folder, **QUICK)
    assert "inspect" in refused.value.hint
    base = open_checkpoint("embedded")
    text = {n: t + 1e-3 if n.startswith("transformer.") else t for n, t in base.items()}
    with pytest.raises(OptionError, match="images pass through nothing that"):
        localize(TaskVector(base, text), folder, **QUICK)
    with pytest.raises(SpaceError, match=r"one path, .* was given where a task vector is needed"):
        localize(str(own / "ft"), folder, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="no task 'no-such-task'"):
        localize(vector, "no-such-task", **QUICK)
