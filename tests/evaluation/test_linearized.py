"""Linearised models, against finite differences and a linear map written down here."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from weightops import (
    SearchOptions,
    TaskVector,
    add,
    collect,
    config_for,
    evaluate,
    finetune,
    localize,
    merge,
    open_checkpoint,
    soup,
)
from weightops.checkpoints.linearized import linearized_at
from weightops.checkpoints.matching import convert_to
from weightops.cli.main import run
from weightops.errors import CheckpointError, MismatchError, OptionError, WeightopsError
from weightops.evaluation.image_model import ImageModel
from weightops.evaluation.linearized import LinearizedModel
from weightops.search.session import EditSession
from weightops.tasks.table import as_task
from weightops.tasks.task import ImageSubset, LazySizes, Task
from weightops.training.finetune import fit
from weightops.training.learners import ImageLearner


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two linearised runs and an ordinary one, of few steps."""
    folder = tmp_path_factory.mktemp("linearized")
    config = {"steps": 2, "batch_size": 4, "lr": 1e-3}
    for name, task, linearized in (
        ("a", "mnist", True),
        ("b", "digits", True),
        ("c", "mnist", False),
    ):
        finetune(
            "embedded",
            task,
            config_for("embedded", linearized=linearized, **config),
            out=folder / name,
            device="cpu",
        )
    return {name: folder / name for name in "abc"}


def moved(model: ImageModel, scale: float) -> None:
    """Move all weights of the image encoder."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.module.visual.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def test_features_are_the_tangent() -> None:
    plain = ImageModel.open("embedded", "cpu", precision="float32")
    model = LinearizedModel.of(ImageModel.open("embedded", "cpu"))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(model.encode_image(images), plain.encode_image(images), atol=1e-6)
        encoder = plain.module.double().visual
        start = encoder(images.double())
        moved(plain, 1e-5)
        slope = (encoder(images.double()) - start) / 1e-5
        moved(model, 0.01)
        expected = F.normalize(start + 0.01 * slope, dim=-1)
        assert torch.allclose(model.encode_image(images).double(), expected, atol=1e-3)
        assert not torch.allclose(start, expected, atol=0.1)


def test_gradients_are_of_the_tangent() -> None:
    """They are those of the model itself at its start."""
    task = as_task("mnist")
    gradients = []
    for linearized in (False, True):
        model = ImageModel.open("embedded", "cpu", precision="float32")
        model = LinearizedModel.of(model) if linearized else model
        learner = ImageLearner(model, task)
        learner.prepare()
        learner(*learner.batch(torch.arange(4))).backward()
        gradients.append({n: p.grad for n, p in model.module.visual.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-5), name


def test_the_checkpoint_says_what_it_is(runs: dict[str, Path], tmp_path: Path) -> None:
    """A run, its vector, and what is made of both are run linearised, and nothing else."""
    at = open_checkpoint("embedded").fingerprint
    merged = merge([runs["a"], runs["b"]], "ties", base="embedded").save(tmp_path / "merged")
    vector = TaskVector("embedded", runs["a"]).save(tmp_path / "vector.safetensors")
    edited = TaskVector.load(vector).apply("embedded", 0.5)
    models = [runs["a"], merged, edited, edited.save(tmp_path / "edited")]
    for model in models:
        opened = ImageModel.open(model, "cpu")
        assert isinstance(opened, LinearizedModel)
        assert opened.at.fingerprint == at
        with pytest.raises(CheckpointError, match="linearised at embedded: its module computes"):
            open_checkpoint(model).model()
    assert not isinstance(ImageModel.open(runs["c"], "cpu"), LinearizedModel)
    with pytest.raises(WeightopsError, match="linearised at embedded"):
        TaskVector.load(vector).apply(open_checkpoint("embedded").model())
    with pytest.raises(CheckpointError, match="no statistic is of it"):
        collect(runs["a"], "mnist", images=2)
    with pytest.raises(CheckpointError, match="transformers would run it as it isn't"):
        convert_to(open_checkpoint(runs["a"]), "transformers")
    with pytest.raises(CheckpointError, match="is linearised, and its units"):
        merge([runs["a"], runs["b"]], align=True)


def test_torch_warns_of_nothing(runs: dict[str, Path]) -> None:
    line = f"import weightops; weightops.ImageModel.open({str(runs['a'])!r}, 'cpu')"
    command = [sys.executable, "-W", "error::FutureWarning", "-c", line]
    subprocess.run(command, check=True)


def test_a_soup_runs_in_float32_by_itself(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTOPS_PRECISION", "bfloat16")
    models = [runs["a"], runs["b"]]
    soup(models, tmp_path / "soup", tasks=[first_images("digits")], device="cpu")
    assert linearized_at(open_checkpoint(tmp_path / "soup").form) is not None


def test_mixtures_are_refused(runs: dict[str, Path]) -> None:
    mixed = TaskVector("embedded", runs["a"]) + TaskVector("embedded", runs["c"])
    with pytest.raises(MismatchError, match=r"linearised at embedded, and .*c.* isn't"):
        ImageModel.open(mixed.apply("embedded"), "cpu")
    config = config_for("embedded", steps=1, batch_size=2)
    with pytest.raises(OptionError, match="is linearised at embedded, and the recipe isn't"):
        finetune(runs["a"], "mnist", config, device="cpu")
    learner = ImageLearner(ImageModel.open("embedded", "cpu"), as_task("mnist"))
    with pytest.raises(OptionError, match="the recipe is for a linearised model"):
        fit(learner, config_for("embedded", steps=1, linearized=True))


def test_mixtures_are_not_written(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a file holds is taken for linearised as a whole, so a mixture must not get there."""
    out, refused = str(tmp_path / "out"), r"linearised at embedded, and .*c.* isn't"
    both = [str(runs["a"]), str(runs["c"])]
    for method in ("linear", "ties"):
        options = ["--base", "embedded"] if method == "ties" else []
        assert run(["merge", *both, "--method", method, *options, "-o", out]) == 1
        assert re.search(refused, capsys.readouterr().err)
    with pytest.raises(MismatchError, match=refused):
        TaskVector(runs["c"], runs["a"]).save(tmp_path / "vector.safetensors")
    assert list(tmp_path.iterdir()) == []
    merge([runs["a"], runs["b"]]).save(tmp_path / "linearised")
    assert ImageModel.open(tmp_path / "linearised", "cpu").precision == "float32"


def test_another_base_of_the_name_is_refused(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = open_checkpoint("embedded")
    base.save("base")
    config = config_for("base", steps=1, batch_size=2, linearized=True)
    finetune("base", "mnist", config, out="run", device="cpu")
    assert evaluate("run", "digits", split="validation", device="cpu")["digits"]["n"]
    TaskVector("embedded", runs["c"]).apply(base).save("base", overwrite=True)
    with pytest.raises(CheckpointError, match=r"linearised at base \(.*now is another"):
        ImageModel.open("run", "cpu")
    Path("base").rename("moved")
    with pytest.raises(CheckpointError, match="linearised at base, which can't be opened"):
        ImageModel.open("run", "cpu")


def test_a_session_measures_the_linearised_model(runs: dict[str, Path]) -> None:
    task = as_task("mnist")
    session = EditSession("embedded", [task], device="cpu")
    vector = session.vector(str(runs["a"]))
    measured = session.measure(vector, "validation")
    expected = evaluate(runs["a"], task, split="validation", device="cpu")["mnist"]
    assert measured.scores["mnist"]["acc1"] == expected["acc1"]
    config = config_for("embedded", steps=2, batch_size=4, lr=1e-3, linearized=True)
    by_session = session.learn(task, config=config)
    assert all(torch.equal(by_session[name], vector[name]) for name in vector)


def test_what_a_workflow_computes_of_linearised_vectors_says_so(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """A method's result, and a vector that a mask was learned for, are deltas in memory."""
    tasks = [first_images(name) for name in ("mnist", "digits")]
    given = [str(runs["a"]), str(runs["b"])]
    alphas = SearchOptions((0.5,))
    add(tasks, tmp_path / "sum", method="ties", finetuned=given, search=alphas, device="cpu")
    vector = TaskVector("embedded", runs["a"])
    sparse = localize(vector, tasks[0], images=16, search_steps=1, device="cpu")
    for form in (open_checkpoint(tmp_path / "sum").form, sparse.apply("embedded").form):
        at = linearized_at(form)
        assert at is not None
        assert at.fingerprint == open_checkpoint("embedded").fingerprint


def first_images(name: str) -> Task:
    """Return a task with few images in each split."""
    task = as_task(name)

    def load(split: str) -> ImageSubset:
        images = task.load(split)
        return ImageSubset(images, np.arange(24), images.labels[:24])

    return replace(task, load=load, sizes=LazySizes(load))
