"""A session on a folder of random images: what it measures, and on which of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from weightops import TaskVector, evaluate
from weightops.search.goal import Goal
from weightops.search.session import EditSession, Measured, weighted_sum
from weightops.search.strategies import grid
from weightops.support.text import file_name
from weightops.tasks.table import find_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("noise") / "noise"
    rng = np.random.default_rng(0)
    for name in ("red", "green", "blue"):
        (root / name).mkdir(parents=True)
        for i in range(24):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture
def measured() -> list[Measured]:
    return []


@pytest.fixture
def session(folder: Path, measured: list[Measured]) -> EditSession:
    tasks = [find_task(str(folder))]
    return EditSession("embedded", tasks, device="cpu", on_measured=measured.append)


def random_vector(session: EditSession, seed: int) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    base = session.base.state_dict()
    deltas = {
        n: t.abs().mean() * torch.randn(t.shape, generator=generator) for n, t in base.items()
    }
    return session.in_memory(deltas, f"random {seed}")


def test_measure_is_evaluation_of_the_edited_model(session: EditSession, folder: Path) -> None:
    vector = random_vector(session, 0) * 0.5
    result = session.measure(vector, "validation", coefficients=(0.5,))
    expected = evaluate(session.edited(vector), str(folder), split="validation", device="cpu")
    assert result.scores["noise"] == expected["noise"]
    assert result.alpha == 0.5
    assert result.hits["noise"].double().mean().item() == expected["noise"]["acc1"]
    assert session.samples_measured == expected["noise"]["n"]


def test_a_trial_counts_every_image_once(session: EditSession, measured: list[Measured]) -> None:
    vector = random_vector(session, 0)
    trial = session.trial({"random": vector}, Goal({"noise": 1.0}))
    trial.measurements.measure((0.5,), 0.5)
    assert not measured
    size = trial.measurements.sizes["noise"]
    assert session.samples_measured == round(size / 2)
    grid(trial.measurements, [(0.5,), (1.0,)])
    assert session.samples_measured == 3 * size
    assert [m.alpha for m in measured] == [0.5, 1.0, 0.0]
    assert [m.alpha for m in trial.sweep] == [0.0, 0.5, 1.0]
    for m in trial.sweep:
        whole = session.measure(vector * m.alpha, "validation")
        assert m.scores == whole.scores
        assert m.fingerprint == whole.fingerprint
        assert m.hits["noise"].sum() == whole.hits["noise"].sum()


def test_vectors_are_given_in_any_form(session: EditSession, tmp_path: Path) -> None:
    vector = random_vector(session, 1)
    assert session.vector(vector) is vector
    weights = vector.apply(session.base).save(tmp_path / "finetuned.safetensors")
    for path in (weights, vector.save(tmp_path / "vector.safetensors")):
        assert session.vector(path).cosine(vector) == pytest.approx(1, abs=1e-5)


def test_a_weighted_sum(session: EditSession) -> None:
    a, b = random_vector(session, 1), random_vector(session, 2)
    total = weighted_sum({"a": a, "b": b}, (0.5, -2.0))
    name = next(iter(a))
    assert torch.allclose(total[name], 0.5 * a[name] - 2 * b[name], atol=1e-6)


def test_a_file_name_has_no_colon() -> None:
    assert file_name("mnist:typographic") == "mnist-typographic"


def test_a_search_leaves_out_an_edit_that_overflows(
    session: EditSession, caplog: pytest.LogCaptureFixture
) -> None:
    state = session.base.state_dict()
    delta = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    delta["visual.proj"] = torch.full_like(state["visual.proj"], 1e38)
    vectors = {"far": session.in_memory(delta, "far")}
    trial = session.trial(vectors, Goal({session.tasks[0].name: 1.0}))
    assert grid(trial.measurements, [(0.0,), (1e-40,), (10.0,)]).alpha != 10.0
    assert "alpha 10 is left out of the search" in caplog.text
    assert {m.alpha for m in trial.sweep} == {0.0, 1e-40}
