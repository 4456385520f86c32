"""One bar for a whole job: what it plans is about what is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightops import config_for, evaluate, negate
from weightops.cli.main import run
from weightops.workflows.analogy import Analogy
from weightops.workflows.experiments import run_experiment
from weightops.workflows.run import run as run_workflow

Bars = list[tuple[float, float]]


def test_evaluation(bars: Bars, own: Path) -> None:
    tasks = [str(own / "plain"), str(own / "turned")]
    sizes = {name: evaluate(own / "model", name)[Path(name).name]["n"] for name in tasks}
    bars.clear()
    assert run(["evaluate", *[str(own / "model")] * 2, "--tasks", ",".join(tasks)]) == 0
    evaluate(own / "model", tasks, evaluator="shift")
    evaluate(own / "model", tasks, evaluator="linear_probe")
    (both, planned), (shifted, shift_plan), (probed, probe_plan) = bars
    assert both == planned == 2 * sum(sizes.values())
    assert shifted == shift_plan == 27 * sum(sizes.values())
    assert probed == probe_plan > sum(sizes.values())


def test_trainings_of_baselines_are_planned(
    bars: Bars, own: Path, options: dict[str, object], tmp_path: Path
) -> None:
    shared = {**options, "training": config_for(own / "model", steps=3, batch_size=8)}
    own_vector = {"finetuned": own / "turned.safetensors", "control": [str(own / "swapped")]}
    for baselines in (False, True):
        negate(
            str(own / "plain"),
            tmp_path / f"n{baselines}",
            control_threshold=0.0,
            baselines=baselines,
            **own_vector,
            **shared,
        )
    tasks = [str(own / name) for name in ("swapped", "turned", "plain")]
    for supervised in (False, True):
        workflow = Analogy.from_call(*tasks, "shapes", supervised=supervised, **shared)
        workflow.may_be_base = True  # unrelated vectors need not help
        run_workflow(workflow, tmp_path / f"c{supervised}")
    plain, compared, alone, supervised = bars
    step = 3 * 8 * 3
    assert compared[1] - plain[1] >= step
    assert supervised[1] - alone[1] == step
    for done, planned in bars:
        assert 0.3 * planned < done < 3 * planned


@pytest.mark.parametrize("name", ["intermediate", "learning-rate", "broad-transfer"])
def test_experiments(name: str, bars: Bars, own: Path, tmp_path: Path) -> None:
    task = ",".join(str(own / n) for n in ("swapped", "turned"))
    run_experiment(
        name,
        tmp_path / "out",
        model=own / "model",
        task=task if name == "learning-rate" else "shapes",
        supported=[str(own / "plain")],
        training=config_for(own / "model", steps=10, batch_size=8),
    )
    ((done, planned),) = bars
    assert 0.5 * planned < done < 2 * planned
