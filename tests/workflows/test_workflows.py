"""The workflows on a person's own folders of images, own model directory and own checkpoints: small, and without the embedded tasks."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from weightops import TaskVector, average, evaluate, open_checkpoint
from weightops.cli.main import run
from weightops.errors import NothingSatisfiesError, OptionError, TaskError, UnknownNameError
from weightops.search.session import EditSession
from weightops.support.json_files import jsonable
from weightops.tasks import drawing, masks
from weightops.tasks.table import find_task
from weightops.training.config import config_for
from weightops.workflows.add import Addition, add
from weightops.workflows.analogy import Analogy, analogy
from weightops.workflows.experiments import ANALOGY, EXPERIMENTS, run_experiment
from weightops.workflows.negate import negate, random_like
from weightops.workflows.patch import patch
from weightops.workflows.rank import select, spearman
from weightops.workflows.soup import soup

TRAINING = {"steps": 8, "batch_size": 8, "lr": 2e-3, "warmup": 1, "device": "cpu"}


def draw(folder: Path, names: dict[str, str], count: int, seed: int) -> None:
    """Folders by class, each with pictures of the shape that it is mapped to."""
    rng = np.random.default_rng(seed)
    for name, shape in names.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = drawing.picture(
                rng, masks.shape_mask(rng, shape), *drawing.contrasting_colors(rng)
            )
            Image.fromarray(picture).save(folder / name / f"{i:03}.png")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks in folders (two of them named wrongly, so that there is something to learn), a model directory, two vectors."""
    root = tmp_path_factory.mktemp("own")
    draw(root / "swapped", {"moon": "arrow", "arrow": "moon"}, 40, 0)
    draw(root / "turned", {"heart": "ring", "ring": "heart"}, 40, 1)
    draw(root / "plain", {"star": "star", "cross": "cross", "square": "square"}, 30, 2)
    model = open_checkpoint("embedded").save(root / "model")
    for name in ("swapped", "turned"):
        task = find_task(str(root / name))
        bench = EditSession(
            model,
            [task],
            config=config_for(
                open_checkpoint(model), **{k: v for k, v in TRAINING.items() if k != "device"}
            ),
        )
        bench.learn(task).save(root / f"{name}.safetensors")
    return root


def options(own: Path) -> dict[str, object]:
    return {"model": own / "model", "device": "cpu", "alphas": [0.5, 1.0]}


def summary_of(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def test_negate_keeps_the_control_and_writes_everything(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = negate(
        str(own / "plain"),
        out,
        control=[str(own / "swapped")],
        control_threshold=0.0,
        baselines=True,
        finetuned=own / "turned.safetensors",
        steps=2,
        **options(own),
    )
    assert json.loads(json.dumps(jsonable(result))) == summary_of(out)
    assert result["alpha"] < 0
    tasks = result["tasks"]
    assert {name: task["role"] for name, task in tasks.items()} == {
        "plain": "target",
        "swapped": "control",
    }
    assert {"base", "finetuned", "edited", "random", "ascent"} <= tasks["plain"].keys()
    assert tasks["plain"]["edited"]["acc1"] < tasks["plain"]["base"]["acc1"]
    vector = TaskVector.load(own / "turned.safetensors")
    expected = vector.apply(own / "model", result["alpha"]).to(torch.float32).state_dict()
    assert all(
        torch.allclose(t, expected[n], atol=1e-6)
        for n, t in open_checkpoint(out).to(torch.float32).state_dict().items()
    )
    assert (
        evaluate(out, str(own / "plain"), device="cpu")["plain"]["acc1"]
        == tasks["plain"]["edited"]["acc1"]
    )
    files = {path.name for path in out.iterdir()}
    assert {
        "frontier.png",
        "frontier.svg",
        "report.html",
        "results.jsonl",
        "README.md",
        "task_vector.safetensors",
    } <= files


def test_the_rule_of_negation() -> None:
    from weightops.search.goal import Goal, Point

    goal = Goal({"t": -1.0}, {"c": 1.0}, ratio=0.95, drop=0.0, errors=0.0, what="lowest t accuracy")
    points = [
        Point(0.0, -0.7, 0.8),
        Point(-0.1, -0.5, 0.79),
        Point(-0.2, -0.3, 0.77),
        Point(-0.3, -0.3, 0.765),
        Point(-0.4, -0.1, 0.7),
    ]
    assert (
        goal.choose(points).alpha == -0.2
    )  # least target above 0.76, and of two the one nearer to 0
    with pytest.raises(NothingSatisfiesError, match=r"nearest is alpha -0\.4"):
        goal.choose(points[-1:], base=points[0])


def test_a_random_vector_has_the_norms(own: Path) -> None:
    bench = EditSession(own / "model", [])
    vector = bench.vector(own / "turned.safetensors")
    noise = random_like(bench, vector, seed=1)
    expected = vector.norm(per_tensor=True)
    assert noise.norm(per_tensor=True) == pytest.approx(expected, rel=1e-4)
    assert abs(noise.cosine(vector)) < 0.02
    assert noise.cosine(random_like(bench, vector, seed=1)) == pytest.approx(1)
    assert abs(noise.cosine(random_like(bench, vector, seed=2))) < 0.02


def test_gradient_ascent_goes_up(own: Path) -> None:
    task = find_task(str(own / "plain"))
    bench = EditSession(
        own / "model",
        [task],
        config=config_for(
            open_checkpoint(own / "model"), steps=3, batch_size=16, lr=1e-3, ascend=True
        ),
    )
    before = bench.measure(bench.vector(own / "turned.safetensors") * 0.0, "validation").scores[
        "plain"
    ]["acc1"]
    assert bench.measure(bench.learn(task), "validation").scores["plain"]["acc1"] < before


@pytest.mark.parametrize(
    ("method", "each"), [("sum", False), ("sum", True), ("ties", False), ("linear", False)]
)
def test_add(own: Path, tmp_path: Path, method: str, each: bool) -> None:
    out = tmp_path / "out"
    paths = [own / "swapped.safetensors", own / "turned.safetensors"]
    tasks = [str(own / "swapped"), str(own / "turned")]
    result = add(tasks, out, method=method, each=each, finetuned=paths, **options(own))
    for name, task in result["tasks"].items():
        assert task["role"] == "added"
        assert result["normalized"][name] == task["edited"]["acc1"] / task["finetuned"]["acc1"]
    assert result["mean"]["normalized"] == pytest.approx(
        np.mean(list(result["normalized"].values()))
    )
    assert result["mean"]["accuracy"] > np.mean(
        [task["base"]["acc1"] for task in result["tasks"].values()]
    )
    if method == "sum":
        alphas = list(result["alpha"].values()) if each else [result["alpha"]] * 2
        a, b = (TaskVector.load(path) * alpha for path, alpha in zip(paths, alphas, strict=True))
        expected = (a + b).apply(own / "model").state_dict()
        assert all(
            torch.allclose(t, expected[n], atol=1e-5)
            for n, t in open_checkpoint(out).state_dict().items()
        )


def test_analogy(own: Path, tmp_path: Path) -> None:
    draw(tmp_path / "target", {"diamond": "diamond", "circle": "circle"}, 12, 3)
    tasks = [str(own / name) for name in ("plain", "swapped", "turned")]
    given = [own / "swapped.safetensors", own / "turned.safetensors", own / "turned.safetensors"]
    run_ = Analogy(*tasks, str(tmp_path / "target"), each=False, finetuned=given, **options(own))
    bench = EditSession(run_.checkpoint, run_.tasks, device="cpu")
    vectors = run_.vectors(bench)
    assert [task.name for task in run_.learned] == ["plain", "swapped", "turned"]
    try:
        found = run_.find(bench)
    except (
        NothingSatisfiesError
    ):  # unrelated vectors need not help; what is combined is looked at all the same
        return
    a, b, c = vectors
    assert found.edit.cosine(c + b - a) == pytest.approx(1)


def test_soup_is_greedy(own: Path, tmp_path: Path) -> None:
    base = open_checkpoint(own / "model")
    good = TaskVector.load(own / "swapped.safetensors").apply(base).save(tmp_path / "good")
    bad = TaskVector.load(own / "turned.safetensors").apply(base, -2.0).save(tmp_path / "bad")
    result = soup(
        [own / "model", good, bad], tmp_path / "soup", tasks=[str(own / "swapped")], device="cpu"
    )
    assert result["steps"][0]["model"] == "good"
    accepted = [step["model"] for step in result["steps"] if step["accepted"]]
    assert "bad" not in accepted
    assert all(step["why"] for step in result["steps"])
    alone = [step["accuracy"] for step in result["steps"]]
    assert alone == sorted(alone, reverse=True)
    uniform = soup(
        [own / "model", good],
        tmp_path / "uniform",
        tasks=[str(own / "swapped")],
        recipe="uniform",
        device="cpu",
    )
    assert uniform["alpha"] == {"model": 0.5, "good": 0.5}
    expected = average([own / "model", good]).state_dict()
    assert all(
        torch.allclose(t, expected[n], atol=1e-6)
        for n, t in open_checkpoint(tmp_path / "uniform").state_dict().items()
    )


@pytest.mark.parametrize("strategy", ["joint", "sequential", "parallel"])
def test_patch_several(own: Path, tmp_path: Path, strategy: str) -> None:
    tasks = [str(own / "swapped"), str(own / "turned")]
    result = patch(
        tasks,
        tmp_path / "out",
        strategy=strategy,
        supported=[str(own / "plain")],
        max_supported_drop=1.0,
        model=own / "model",
        alphas=[0.5, 1.0],
        **TRAINING,
    )
    assert result["strategy"] == strategy
    assert [task["role"] for task in result["tasks"].values()] == [
        "patching",
        "patching",
        "supported",
    ]
    gains = [
        t["patched"]["acc1"] - t["base"]["acc1"]
        for t in result["tasks"].values()
        if t["role"] == "patching"
    ]
    assert sum(gains) > 0.3
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    ]
    assert {row["weights"] for row in rows} == {"sweep", "base", "finetuned", "patched"}


def test_page_needs_nothing_from_elsewhere(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    patch(
        str(own / "swapped"),
        out,
        supported=[str(own / "plain")],
        max_supported_drop=1.0,
        finetuned=own / "swapped.safetensors",
        **options(own),
    )
    page = (out / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert not re.findall(
        r"https?://(?!www\.w3\.org/2000/svg)", page.split("<h2>Provenance</h2>")[0]
    )
    data = json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    )
    assert [point["label"] for point in data["points"]] == ["0", "0.5", "1"]
    summary = summary_of(out)
    assert data["points"][data["chosen"]]["alpha"] == [summary["alpha"]]
    assert page.count('src="data:image/png;base64,') >= 1
    low, high = summary["intervals"]["swapped"]["patched"]
    assert low <= summary["tasks"]["swapped"]["patched"]["acc1"] <= high


def test_nothing_satisfies_and_nothing_is_written(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "negate",
        "--target",
        str(own / "plain"),
        "--control",
        str(own / "swapped"),
        "--vector",
        str(own / "model"),
        "--model",
        str(own / "model"),
        "--alphas",
        "0.5,1",
        "-o",
        str(tmp_path / "out"),
        "-q",
    ]
    assert run(arguments) == 1
    assert "no alpha improves plain" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_verbs_on_ones_own(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(own / "model"), "--alphas", "0.5,1", "--device", "cpu", "-q"]
    tasks = f"{own / 'swapped'},{own / 'turned'}"
    vectors = [
        "--vector",
        str(own / "swapped.safetensors"),
        "--vector",
        str(own / "turned.safetensors"),
    ]
    assert (
        run(
            [
                "add",
                "--tasks",
                tasks,
                *vectors,
                *common,
                "--dry-run",
                "--json",
                "-o",
                str(tmp_path / "a"),
            ]
        )
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["tasks"] == {"swapped": "added", "turned": "added"}
    assert plan["training_images"] == 0
    assert run(["add", "--tasks", tasks, *vectors, *common, "-o", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "normalized accuracy" in out
    assert (tmp_path / "a" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (
        run(
            [
                "select",
                *vectors[1::2],
                "--target",
                str(own / "swapped"),
                "--model",
                str(own / "model"),
                "--steps",
                "2",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["order"][0] == "swapped"
    assert run(["experiment", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(EXPERIMENTS)
    for arguments, code, message in (
        (["add", "--tasks", tasks, "--method", "tise", *vectors], 2, "did you mean ties"),
        (
            ["add", "--tasks", tasks, "--method", "ties", "--option", "densty=1"],
            2,
            "did you mean density",
        ),
        (["add", "--tasks", tasks, *vectors[:2], *common], 2, "learns 2 tasks"),
        (["analogy", "--a", "mnist", "-q"], 2, "name all of --a"),
        (["negate", "--target", "mnist", "--control", "mnist"], 1, "at least one control"),
        (["soup", str(own / "model")], 2, "two models at least"),
        (["experiment", "intermediat"], 2, "did you mean intermediate"),
    ):
        assert (
            run([*arguments, *(["-o", str(tmp_path / "x")] if "-o" not in arguments else [])])
            == code
        ), arguments
        assert message in capsys.readouterr().err


def test_select_and_its_agreement(own: Path, tmp_path: Path) -> None:
    vectors = {name: own / f"{name}.safetensors" for name in ("swapped", "turned")}
    outcome = select(
        vectors,
        str(own / "turned"),
        tmp_path / "out",
        model=own / "model",
        steps=3,
        labels=8,
        truth=True,
        device="cpu",
    )
    assert outcome.more["order"][0] == "turned"
    assert outcome.more["agreement"].keys() == {"cosine", "gain"}
    assert (
        (tmp_path / "out" / "table.txt")
        .read_text()
        .startswith("What should help turned most: turned")
    )
    unlabelled = select(
        vectors, str(own / "turned"), model=own / "model", steps=2, labels=0, device="cpu"
    )
    assert unlabelled.header == ["vector", "cosine %"]
    assert spearman([3, 1, 2], [30, 10, 20]) == 1
    assert spearman([3, 1, 2], [1, 3, 2]) == -1
    assert math.isnan(spearman([1], [2]))
    with pytest.raises(OptionError, match="no vectors"):
        select({}, "mnist")


def test_an_experiment(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(
            [
                "experiment",
                "intermediate",
                "--model",
                str(own / "model"),
                "--steps",
                "8",
                "--dry-run",
                "--json",
            ]
        )
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 8
    assert plan["about"].startswith("Intermediate task vectors")
    outcome = run_experiment(
        "intermediate", tmp_path / "out", model=own / "model", task=str(own / "swapped"), **TRAINING
    )
    assert outcome.rows[-1][:3] == [8, pytest.approx(1), pytest.approx(1)]
    cosines = [row[1] for row in outcome.rows]
    assert cosines == sorted(cosines)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "table.txt",
        "results.json",
        "figure.png",
        "figure.svg",
    }
    with pytest.raises(UnknownNameError, match="no experiment 'x'"):
        run_experiment("x", tmp_path / "y")


def test_the_built_in_analogy() -> None:
    assert [task.name for task in ANALOGY] == [
        "letters a-m",
        "striped letters a-m",
        "letters n-z",
        "striped letters n-z",
    ]
    assert [len(task.classes) for task in ANALOGY] == [13] * 4


def test_refusals(own: Path) -> None:
    with pytest.raises(TaskError, match="two tasks at least"):
        Addition(["mnist"])
    with pytest.raises(OptionError, match="one vector of all"):
        Addition(["mnist", "digits"], method="ties", each=True)
    with pytest.raises(UnknownNameError, match="no objective 'best'"):
        Addition(["mnist", "digits"], objective="best")
    with pytest.raises(TaskError, match="four different tasks"):
        analogy("mnist", "digits", "letters", "letters", own / "x")
    with pytest.raises(OptionError, match="fraction of the base's accuracy"):
        negate("mnist", own / "x", control_threshold=2)
    with pytest.raises(UnknownNameError, match="no strategy 'both'"):
        patch(["mnist", "digits"], own / "x", strategy="both")
    with pytest.raises(UnknownNameError, match="no search 'fast'"):
        patch("mnist", own / "x", search="fast")
    with pytest.raises(TaskError, match="two different tasks are called plain"):
        patch(str(own / "plain"), own / "x", supported=[f"{own}/./plain"])
    with pytest.raises(UnknownNameError, match="no recipe 'x'"):
        soup([own / "model", own / "model"], own / "x", recipe="x")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_page_in_a_browser(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = own / "swapped.safetensors"
    patch(
        str(own / "swapped"),
        out,
        supported=[str(own / "plain")],
        max_supported_drop=1.0,
        finetuned=given,
        **options(own),
    )
    for width in (1280, 400):
        command = [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={width},1600",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        shot = tmp_path / f"{width}.png"
        subprocess.run(
            [*command, f"--screenshot={shot}", f"file://{out}/report.html"],
            check=True,
            capture_output=True,
            timeout=120,
        )
        pixels = np.asarray(Image.open(shot).convert("L"))
        assert pixels.shape[1] == width
        assert pixels.std() > 5  # something is drawn
    moved = tmp_path / "moved.html"  # the slider, as a hand moves it
    move = "slider.value = 0; slider.dispatchEvent(new Event('input'));"
    moved.write_text(
        (out / "report.html").read_text().replace("</body>", f"<script>{move}</script></body>")
    )
    summary = json.loads((out / "summary.json").read_text())
    for page, alpha in ((out / "report.html", f"{summary['alpha']:g} (chosen)"), (moved, "0")):
        done = subprocess.run(
            [*command, "--dump-dom", f"file://{page}"],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.count('class="bar"') == 2
        assert done.stdout.count("<circle") > 2
        assert f'<b id="alpha">{alpha}</b>' in done.stdout
