"""``python -m weightops.evaluation.harness TASK[,TASK] FOLDER``: score by lm-evaluation-harness.

It prints a line of JSON for each document, with its task's first metric, the higher the better.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from weightops.errors import TaskError, WeightopsError, missing_extra
from weightops.support.lazy import torch


def lines(names: str, folder: str) -> Iterator[str]:
    """Yield the lines of JSON for tasks.

    Args:
        names: names of tasks or groups, or YAML files of tasks, separated by commas.
        folder: the folder of a model of transformers.

    Raises:
        MissingExtraError: without lm-evaluation-harness.
        TaskError: if the task has no metric with a number for each document.
    """
    try:
        harness, tasks = import_module("lm_eval"), import_module("lm_eval.tasks")
    except ImportError:
        raise missing_extra("lm_eval", "lm_eval", f"to score {names}") from None
    paths = [Path(name) for name in names.split(",")]
    folders = {str(path.parent) for path in paths if path.suffix in (".yaml", ".yml")}
    manager = tasks.TaskManager(include_path=sorted(folders) or None)
    results = harness.simple_evaluate(
        model="hf",
        model_args={"pretrained": folder},
        tasks=[path.stem if str(path.parent) in folders else str(path) for path in paths],
        task_manager=manager,
        device="cuda" if torch.cuda.is_available() else "cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    for name, samples in results["samples"].items():
        first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        metric = first[0]["metrics"][0]
        sign = 1 if results["higher_is_better"][name].get(metric, True) else -1
        for sample in first:
            value = _value(sample, metric, sign)
            yield json.dumps({"task": name, "item": sample["doc_id"], "value": value})


def _value(sample: Mapping[str, Any], metric: str, sign: int) -> float:
    value = sample[metric]
    if not isinstance(value, (bool, int, float)):
        raise TaskError(f"the metric {metric} is no number for each document: {value!r}")
    return sign * float(value)


def main() -> None:
    """Print the lines for the arguments of the command line."""
    try:
        with redirect_stdout(sys.stderr):
            printed = list(lines(*sys.argv[1:]))
    except WeightopsError as error:
        sys.exit(f"weightops: {error}")
    sys.stdout.write("\n".join(printed) + "\n")


if __name__ == "__main__":
    main()
