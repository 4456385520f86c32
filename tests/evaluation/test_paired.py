"""Two models on the same images: difference, interval, test, and the images that changed."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers.drawn_folders import draw

from weightops import TaskVector, compare_accuracy, mean_change, open_checkpoint
from weightops.cli.main import run
from weightops.evaluation.paired import Change, mcnemar, score_interval

Z = 1.959964


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (3, 8), (20, 20), (7, 60), (400, 460)])
def test_the_exact_test_is_a_sum_of_fractions(pair: tuple[int, int]) -> None:
    total, least = sum(pair), min(pair)
    tail = sum(Fraction(math.comb(total, i), 2**total) for i in range(least + 1))
    assert mcnemar(*pair) == pytest.approx(float(min(1, 2 * tail)), rel=1e-9)
    assert mcnemar(*pair) == mcnemar(*pair[::-1])


@pytest.mark.parametrize("pair", [(0, 0), (4, 1), (12, 2), (0, 9), (30, 45)])
def test_the_ends_of_an_interval_are_just_not_rejected(pair: tuple[int, int]) -> None:
    """At each end, the score statistic with the shares that are likeliest there is 1.96."""
    n, (fixed, broken) = 50 + sum(pair), pair
    for end, sign in zip(score_interval(*pair, n), (1, -1), strict=True):
        shares = np.linspace(max(0.0, -end), (1 - end) / 2, 2_000_001)
        likelihood = np.zeros(len(shares))
        for count, p in (
            (fixed, shares + end),
            (broken, shares),
            (n - fixed - broken, 1 - 2 * shares - end),
        ):
            likelihood += count * np.log(np.maximum(p, 1e-300)) if count else 0
        share = shares[likelihood.argmax()]
        variance = n * (2 * share + end - end**2)
        statistic = (fixed - broken - n * end) / math.sqrt(variance)
        assert statistic == pytest.approx(sign * Z, abs=2e-3)


@pytest.mark.parametrize(
    ("fixed", "broken", "n"),
    [(0.1, 0.05, 200), (0.02, 0.02, 500), (0.3, 0.1, 60), (0.01, 0.004, 1000), (0.45, 0.45, 100)],
)
def test_intervals_have_their_nominal_coverage(fixed: float, broken: float, n: int) -> None:
    generator = np.random.default_rng(0)
    draws = generator.multinomial(n, [fixed, broken, 1 - fixed - broken], size=2000)
    ends = {pair: score_interval(*pair, n) for pair in {(int(a), int(b)) for a, b, _ in draws}}
    truth = fixed - broken
    held = [ends[int(a), int(b)][0] <= truth <= ends[int(a), int(b)][1] for a, b, _ in draws]
    assert np.mean(held) == pytest.approx(0.95, abs=0.017)


def test_the_interval_of_a_mean_has_its_nominal_coverage() -> None:
    generator = np.random.default_rng(1)
    tasks = [(0.1, 0.02, 100), (0.01, 0.01, 300), (0.2, 0.25, 50)]
    truth = sum(fixed - broken for fixed, broken, _ in tasks) / len(tasks)
    held = []
    for _ in range(1000):
        changes = []
        for fixed, broken, n in tasks:
            a, b, _ = map(int, generator.multinomial(n, [fixed, broken, 1 - fixed - broken]))
            changes.append(Change((a - b) / n, score_interval(a, b, n), mcnemar(a, b), a, b, n))
        low, high = mean_change(changes).interval
        held.append(low <= truth <= high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_two_equal_models_give_exactly_0(tmp_path: Path) -> None:
    copy = open_checkpoint("embedded").save(tmp_path / "copy")
    for other in ("embedded", copy):
        changes = compare_accuracy(
            "embedded", other, ["digits", "shapes"], split="validation", device="cpu"
        )
        for change in (*changes.values(), mean_change(changes.values())):
            assert (change.difference, change.interval, change.p_value) == (0.0, (0.0, 0.0), 1.0)
            assert (change.fixed, change.broken, list(change.images)) == (0, 0, [])


def test_what_changed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report agrees with each model's own predictions, image by image."""
    names = ["circle", "square", "triangle"]
    folder = tmp_path / "photos"
    draw(folder, dict(zip(names, names, strict=True)), 10, seed=0)
    tensors = open_checkpoint("embedded").state_dict()
    scaled = {**tensors, "visual.proj": tensors["visual.proj"] * 2}  # changes no prediction
    mixed = {**tensors, "visual.proj": tensors["visual.proj"].roll(1, 1)}
    worse, same = (
        TaskVector("embedded", weights).apply("embedded").save(tmp_path / name)
        for name, weights in (("worse", mixed), ("same", scaled))
    )
    line = ["evaluate", "embedded", str(worse), str(same), "--tasks", f"{folder},digits"]
    assert run([*line, "--json", "--device", "cpu", "-o", str(tmp_path / "out")]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [r["dataset"] for r in records] == [
        *("photos", "digits"),
        *("photos", "digits", "mean", "photos", "digits", "mean"),
    ]
    assert len(list((tmp_path / "out").iterdir())) == len(records)
    first, photos, mean = records[0], records[2], records[4]
    change = photos["change"]
    assert change["from"] == "embedded"
    gain = photos["metrics"]["acc1"] - first["metrics"]["acc1"]
    assert change["difference"] == pytest.approx(gain)
    assert change["difference"] == pytest.approx((change["fixed"] - change["broken"]) / 6)
    files = {f"{name}/{i:03}.png" for name in names for i in range(10)}
    assert change["images"]
    assert {image["image"] for image in change["images"]} <= files
    fixed = [i for i in change["images"] if i["after"] == i["label"]]
    broken = [i for i in change["images"] if i["before"] == i["label"]]
    assert (len(fixed), len(broken)) == (change["fixed"], change["broken"])
    assert all(i["image"].startswith(i["label"]) for i in change["images"])
    assert mean["metrics"]["acc1"] == pytest.approx(
        (records[2]["metrics"]["acc1"] + records[3]["metrics"]["acc1"]) / 2
    )
    digits = records[6]["change"]  # other weights, so the interval isn't 0
    assert (digits["difference"], digits["images"]) == (0.0, [])
    assert digits["interval"][0] < 0 < digits["interval"][1]
    assert run([*line, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "p (McNemar)" in text
    assert f"broken of photos: {broken[0]['image']}" in text
