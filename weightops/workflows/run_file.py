"""Write what a run was asked to do, as the options of its command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightops.support.text import portable
from weightops.support.yaml_files import run_yaml
from weightops.tasks.table import TASKS
from weightops.tasks.task import Task

if TYPE_CHECKING:
    from weightops.workflows.base import Workflow

_TRAINING = ("steps", "batch_size", "lr")
"""Options of a fine-tuning, which a run of given weights has none of."""


def run_file(workflow: Workflow) -> str:
    """Return the YAML of ``run.yaml``, from which ``--config`` repeats a run.

    What only Python can say, such as a `Task` of one's own, is a comment.
    """
    options: dict[str, Any] = {}
    remarks = []
    for name, value in _options(workflow).items():
        named = _named(value)
        if named is None:
            remarks.append(f"{name} was given in Python: {value!r}")
        else:
            options[name] = portable(named)
    return run_yaml(workflow.verb, options, remarks)


def _options(workflow: Workflow) -> dict[str, Any]:
    """Return the arguments of a workflow as options, without those that aren't set."""
    options = dict(workflow.arguments)
    options.pop("device", None)  # which is the machine's
    search, training = options.pop("search", None), options.pop("training", workflow)
    if search is not None:
        options |= {"alphas": list(search.alphas), "search": search.strategy}
    if training is not workflow:
        own = asdict(workflow.config)
        options |= {name: own[name] for name in _TRAINING if workflow.trains}
        options["seed"] = own["seed"]
    return {name: value for name, value in options.items() if value not in (None, {}, (), [])}


def _named(value: Any) -> Any:
    """Return a value as a file can say it; None if none can."""
    if isinstance(value, Task):
        registered = value.name in TASKS and TASKS[value.name] is value
        return value.name if registered else None
    if isinstance(value, (list, tuple)):
        named = [_named(item) for item in value]
        return None if None in named else named
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        plain = all(isinstance(item, (str, int, float)) for item in value.values())
        return dict(value) if plain else None
    return value if isinstance(value, (str, int, float)) else None
