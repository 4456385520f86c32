"""The tasks that can be named."""

from __future__ import annotations

from weightops.registry import Registry
from weightops.tasks import embedded, rendered
from weightops.tasks.task import Task

TASKS: Registry[Task] = Registry("task", "tasks", {task.name: task for task in (*embedded.TASKS, *rendered.TASKS)})

RENDERED = tuple(task.name for task in rendered.TASKS)
"""The tasks that are drawn on the fly: what a patch must not harm, by default."""
