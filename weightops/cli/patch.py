"""``weightops patch``."""

from weightops.cli.workflows import workflow_command

command = workflow_command(
    "weightops.workflows.patch:patch",
    lambda workflow: ["patched", *(task.name for task in workflow.patching)],
)
