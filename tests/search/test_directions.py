"""AdaRank: directions and coefficients against gradients by autograd through the whole sum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.drawn_folders import draw
from torch.func import functional_call

from weightops import ImageModel, Recipe, SearchOptions, TaskVector, add, open_checkpoint
from weightops.algebra.names import layer_of
from weightops.errors import OptionError
from weightops.search.descent import Descent
from weightops.search.directions import search_by_gradient
from weightops.search.session import EditSession
from weightops.tasks.seeds import seed as seed_of
from weightops.tasks.table import find_task

STEPS, LR, IMAGES = 3, 0.04, 16
NAMES = ("moons", "hearts")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("drawn")
    draw(root / "moons", {"moon": "arrow", "arrow": "moon"}, 48, 0)
    draw(root / "hearts", {"heart": "ring", "ring": "heart"}, 48, 1)
    return {name: str(root / name) for name in NAMES}


def random_vector(seed: int) -> TaskVector:
    """Return a vector on the image encoder, and on one tensor beside it."""
    base = open_checkpoint("embedded")
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: t + 0.1 * t.std() * torch.randn(t.shape, generator=generator)
        if name.startswith("visual.") and t.numel() > 1
        else t
        for name, t in base.items()
    }
    return TaskVector(base, moved)


def by_autograd(
    vectors: dict[str, TaskVector], folders: dict[str, str], loss_of: str
) -> dict[str, torch.Tensor]:
    """Return the sum that is found when the scores' step has the gradient of the sigmoid."""
    model = ImageModel.open("embedded", "cpu", precision="float32")
    own = {n: p.detach() for n, p in model.module.named_parameters()}
    deltas = {
        name: [vector[name] for vector in vectors.values()]
        for name in own
        if any(vector[name].any() for vector in vectors.values())
    }
    lambdas = {name: torch.full((2,), 0.3, requires_grad=True) for name in deltas}
    parts = {
        name: [torch.linalg.svd(delta.double(), full_matrices=False) for delta in of_tasks]
        for name, of_tasks in deltas.items()
        if of_tasks[0].dim() == 2 and layer_of(name)
    }
    scores = {
        name: torch.full((2, len(svds[0][1])), 0.1, requires_grad=True)
        for name, svds in parts.items()
    }
    optimizer = torch.optim.Adam([*lambdas.values(), *scores.values()], lr=LR)
    batches, heads = {}, {}
    for name in NAMES:
        task = find_task(folders[name])
        pixels = model.pixels(task, "train")
        heads[name] = model.zero_shot_head(task)
        order = np.random.default_rng(seed_of("descent", 0, task.name)).permutation(len(pixels))
        batches[name] = [
            (pixels.batch(chosen), pixels.labels[torch.from_numpy(chosen)])
            for chosen in (order[start : start + IMAGES] for start in range(0, len(order), IMAGES))
            if len(chosen) == IMAGES
        ]

    def total() -> dict[str, torch.Tensor]:
        changed = {}
        for name, of_tasks in deltas.items():
            changes = []
            for i, delta in enumerate(of_tasks):
                if name in parts:
                    u, s, vh = (part.float() for part in parts[name][i])
                    soft = torch.sigmoid(scores[name][i])
                    taken = soft + ((soft > 0.5).float() - soft).detach()
                    delta = u @ torch.diag(s * taken) @ vh
                changes.append(lambdas[name][i] * delta)
            changed[name] = torch.stack(changes).sum(0)
        return changed

    for step in range(STEPS):
        optimizer.zero_grad()
        weights = {n.removeprefix("visual."): own[n] + change for n, change in total().items()}
        loss = torch.zeros(())
        for name in NAMES:
            images, labels = batches[name][step]
            features = functional_call(model.module.visual, weights, (images,))
            logits = torch.nn.functional.normalize(features, dim=-1) @ heads[name].T
            logs = logits.log_softmax(-1)
            entropy = -(logs.exp() * logs).sum(-1).mean()
            of_labels = torch.nn.functional.cross_entropy(logits, labels)
            loss = loss + (entropy if loss_of == "entropy" else of_labels) / 2
        loss.backward()
        optimizer.step()
    return {name: change.detach() for name, change in total().items()}


@pytest.mark.parametrize("loss", ["entropy", "loss"])
def test_against_autograd(folders: dict[str, str], loss: str) -> None:
    vectors = {name: random_vector(seed) for seed, name in enumerate(NAMES)}
    tasks = [find_task(folders[name]) for name in NAMES]
    session = EditSession("embedded", tasks, device="cpu", precision="float32")
    before = {n: t.clone() for n, t in session.model.module.state_dict().items()}
    options = Descent(loss, "direction", "train", STEPS, LR, 0)  # type: ignore[arg-type]
    found, record = search_by_gradient(session, vectors, tasks, options)
    expected = by_autograd(vectors, folders, loss)
    left = 0
    for name, change in expected.items():
        ours = sum(vector[name] for vector in found.values())
        assert float((ours - change).norm()) < 0.02 * float(change.norm()), name
    for of_task in record["directions"].values():
        left += sum(192 - count for count in of_task.values())
    assert left > 0
    after = session.model.module.state_dict()
    assert all(torch.equal(before[name], t) for name, t in after.items())


def test_add_by_directions(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        random_vector(seed).save(f"{name}.safetensors")
    given = {"finetuned": [f"{name}.safetensors" for name in NAMES], "device": "cpu"}
    how = {"search": SearchOptions(strategy="entropy"), "per": "direction", "search_steps": 12}
    tasks = list(folders.values())
    first, again = (add(tasks, out, **given, **how, search_lr=0.05) for out in ("one", "two"))
    assert first["directions"] == again["directions"]
    assert first["options"]["per"] == "direction"
    written = open_checkpoint("one").state_dict()
    assert all(torch.equal(t, written[n]) for n, t in open_checkpoint("two").state_dict().items())
    monkeypatch.chdir("one")
    repeated = Recipe.read("recipe.yaml").merge().state_dict()
    assert all(torch.allclose(t, written[name], atol=1e-6) for name, t in repeated.items())
    card = Path("README.md").read_text(encoding="utf-8")
    assert "direction" in card
    assert "without labels" in card


@pytest.mark.parametrize("per", ["tensor", "direction"])
def test_what_images_do_not_pass_through(
    folders: dict[str, str], per: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Tensors of a text encoder have the mean coefficient of their task, and the user is told."""
    tasks = [find_task(folders[name]) for name in NAMES]
    session = EditSession("embedded", tasks, device="cpu", precision="float32")
    text = {name: t for name, t in open_checkpoint("embedded").items() if "resblocks.0.mlp" in name}
    vectors = {}
    for seed, name in enumerate(NAMES):
        moved = {n: d + 0.01 * (n in text) for n, d in random_vector(seed).items()}
        vectors[name] = session.in_memory(moved, name)
    options = Descent("loss", per, "train", STEPS, LR, 0)  # type: ignore[arg-type]
    found, _ = search_by_gradient(session, vectors, tasks, options)
    assert "images don't pass through transformer.resblocks.0.mlp" in caplog.text
    without = {n: v.select("visual.*") for n, v in vectors.items()}
    expected, record = search_by_gradient(session, without, tasks, options)
    for task in NAMES:
        assert all(torch.equal(found[task][name], t) for name, t in expected[task].items())
        if per == "tensor":
            mean = np.mean(list(record["coefficients"][task].values()))
            changed = "transformer.resblocks.0.mlp.c_fc.weight"
            ratios = found[task][changed] / vectors[task][changed]
            assert torch.allclose(ratios, torch.full_like(ratios, mean), atol=1e-6)


def test_vectors_without_matrices(folders: dict[str, str]) -> None:
    vector = random_vector(0).select("*.ln_*")
    tasks = [find_task(folders[name]) for name in NAMES]
    session = EditSession("embedded", tasks, device="cpu")
    options = Descent("entropy", "direction", "train", 1, LR, 0)
    with pytest.raises(OptionError, match="change no matrix of a layer"):
        search_by_gradient(session, dict.fromkeys(NAMES, vector), tasks, options)
