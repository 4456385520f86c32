"""``weightops negate``."""

from weightops.cli.workflows import workflow_command

command = workflow_command(
    "weightops.workflows.negate:negate", lambda workflow: ["negated", workflow.target.name]
)
