"""Tasks by name: default tasks, registered ones, names that are wrong or taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.data_sets import archive_data_set, write_files

from weightops import TASKS, Task
from weightops.errors import OptionError, TaskError, UnknownNameError
from weightops.tasks import embedded, rendered
from weightops.tasks.table import EVALUATED, SUPPORTED, as_task, as_tasks, find_task, register_task


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the tasks after a test."""
    monkeypatch.setattr(TASKS, "_table", dict(TASKS._table))


def test_default_tasks() -> None:
    assert set(SUPPORTED) <= {task.name for task in rendered.TASKS}
    assert set(EVALUATED) == {task.name for task in (*embedded.TASKS, *rendered.TASKS)}
    assert [task.name for task in as_tasks(EVALUATED)] == list(EVALUATED)


@pytest.mark.usefixtures("registry")
def test_a_registered_task_is_no_default() -> None:
    few = replace(TASKS["shapes"], name="a few")
    assert register_task(few) is few
    assert as_task("a few") is as_task(few) is few
    assert find_task("first-half:a few").name == "first-half:a few"
    assert "a few" in TASKS
    assert "a few" not in EVALUATED
    assert "a few" not in SUPPORTED
    with pytest.raises(OptionError, match="task 'a few' already"):
        register_task(few)


@pytest.mark.usefixtures("registry")
def test_a_function_is_registered_under_the_name_of_its_task() -> None:
    def make() -> Task:
        return replace(TASKS["shapes"], name="org/made: here")

    made = register_task(make)
    assert as_tasks(["org/made: here", made, "shapes"]) == [made, TASKS["shapes"]]


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="did you mean mnist"):
        TASKS["mnits"]
    with pytest.raises(UnknownNameError, match="did you mean mnist"):
        find_task("typographic:mnits")
    with pytest.raises(TaskError, match="there is no folder no/such/folder"):
        find_task("./no/such/folder")


@pytest.mark.parametrize("name", ["", "typographic:", "order=natural:", "readable:"])
def test_an_empty_name_is_not_the_working_folder(name: str) -> None:
    with pytest.raises(TaskError, match="a task's name is empty"):
        find_task(name)


def test_two_tasks_of_one_name(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        write_files(tmp_path / parent / "wds_things", archive_data_set())
    with pytest.raises(TaskError, match="two different tasks are called things"):
        as_tasks([str(tmp_path / parent / "wds_things") for parent in ("a", "b")])
