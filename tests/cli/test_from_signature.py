"""Commands made from signatures: what help shows is what the functions declare."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
import pytest

from weightops.cli.from_signature import translate
from weightops.cli.main import VERBS, weightops
from weightops.cli.signatures import REQUIRED, Expression, read
from weightops.support.docstrings import parse

BORROWED = [
    "weightops.checkpoints.checkpoint:Checkpoint.save",
    "weightops.evaluation.table:evaluate",
    "weightops.hub.push:push",
    "weightops.merging.merge:merge",
    "weightops.search.strategies:SearchOptions",
    "weightops.task_vector:TaskVector.save",
    "weightops.task_vector:TaskVector.save_lora",
    "weightops.training.config:TrainingConfig",
    "weightops.training.config:config_for",
    "weightops.training.finetune:finetune",
    "weightops.training.lofi:run",
    "weightops.training.nodes:Node",
    "weightops.training.process_groups:connected",
    "weightops.vector_comparison:compare",
    "weightops.workflows.add:add",
    "weightops.workflows.analogy:analogy",
    "weightops.workflows.experiments:run_experiment",
    "weightops.workflows.negate:negate",
    "weightops.workflows.patch:patch",
    "weightops.workflows.rank:rank",
    "weightops.workflows.soup:soup",
]


def live(reference: str) -> Any:
    module, _, path = reference.partition(":")
    thing: Any = import_module(module)
    for name in path.split("."):
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("reference", BORROWED)
def test_what_is_read_is_what_the_function_has(reference: str) -> None:
    thing = live(reference)
    signature = inspect.signature(thing)
    hints = get_type_hints(thing, include_extras=True)
    read_parameters = {parameter.name: parameter for parameter in read(reference).parameters}
    assert list(read_parameters) == [
        name for name in signature.parameters if name in read_parameters
    ]
    for name, parameter in read_parameters.items():
        default = signature.parameters[name].default
        if parameter.default is REQUIRED:
            assert default is inspect.Parameter.empty
        elif not isinstance(parameter.default, Expression):
            assert parameter.default == default
        inner = [hints.get(name), *get_args(hints.get(name))]
        literals = [get_args(hint) for hint in inner if get_origin(hint) is Literal]
        if literals and parameter.kind.name != "Overwrite":
            assert parameter.kind.choices == literals[0]


@pytest.mark.parametrize("reference", BORROWED)
def test_every_option_has_a_text(reference: str) -> None:
    from weightops.cli import types

    for parameter in read(reference).parameters:
        if types.of(parameter.kind) is not None:
            assert parameter.text, f"{reference} doesn't describe {parameter.name}"
            assert parse(live(reference).__doc__).arguments[parameter.name] == parameter.text


def commands() -> list[click.Command]:
    context = click.Context(weightops)
    found = [weightops.get_command(context, verb) for verb in VERBS]
    groups = [command for command in found if isinstance(command, click.Group)]
    inner = [command for group in groups for command in group.commands.values()]
    return [command for command in (*found, *inner) if command is not None]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.name)
def test_help_is_whole(command: click.Command) -> None:
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert command.help
    for option in options:
        assert option.help, option.name
        assert not set("`\\") & set(option.help), option.help
        first = option.help.split()[0].rstrip(":")
        choices = getattr(option.type, "choices", ())
        assert not first[0].islower() or first in choices, option.help
    names = [name for option in options for name in option.opts]
    assert len(names) == len(set(names))


def test_arguments_in_errors_are_translated() -> None:
    flags = {"base": "--base", "on_nonfinite": "--on-nonfinite", "out": "--out"}
    assert translate("say base=", flags) == "say --base"
    assert translate("or on_nonfinite=warn", flags) == "or --on-nonfinite warn"
    assert translate("strict=False edits less", flags) == "strict=False edits less"
    assert translate("--base=x stays", flags) == "--base=x stays"


def test_a_misspelt_argument_is_a_type_error() -> None:
    import weightops as package

    for name in ("patch", "negate", "add", "analogy", "soup", "rank", "finetune", "evaluate"):
        with pytest.raises(TypeError, match="unexpected keyword argument 'alphsa'"):
            getattr(package, name)("mnist", "x", alphsa=[1.0])
