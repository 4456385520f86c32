"""Options from a file: ``weightops patch --config run.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from weightops.cli.types import NodeOf, Numbers, TaskNames
from weightops.errors import RecipeError, WeightopsError
from weightops.support.registry import unknown
from weightops.support.yaml_files import read_documents, run_yaml

_VERB = "verb"
_OF_ONE_RUN = (
    "config",
    "resume",
    "overwrite",
    "dry_run",
    "push",
    "license",
    "json_",
    "quiet",
    "print_recipe",
)
"""Options that say how a run is run, and not what."""


def _read(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is not None:
        try:
            ctx.default_map = _values(ctx.command, path)
        except WeightopsError as error:
            raise error if str(path) in error.fact else error.prefixed(str(path)) from error


def _values(command: click.Command, path: Path) -> dict[str, Any]:
    """Return parameter -> value, as a file says."""
    documents = read_documents(path)
    if len(documents) != 1 or not isinstance(documents[0], Mapping):
        raise RecipeError("it must be one mapping of options to values", hint="steps: 100")
    entries = {str(key).replace("-", "_"): value for key, value in documents[0].items()}
    verb = entries.pop(_VERB, command.name)
    if verb != command.name:
        raise RecipeError(
            f"it is a run of {verb}, not of {command.name}",
            hint=f"weightops {verb} --config {path}",
        )
    known = [p for p in command.params if p.name not in _OF_ONE_RUN]
    parameters = {_key(p): p for p in known} | {str(p.name): p for p in known}
    values: dict[str, Any] = {}
    for key, value in entries.items():
        if key not in parameters:
            raise unknown(f"option of {command.name}", key, parameters)
        parameter = parameters[key]
        values[str(parameter.name)] = _value(parameter, key, value)
    return values


def _key(parameter: click.Parameter) -> str:
    """Return what a parameter is called in files: as on the command line, with underscores."""
    is_option = isinstance(parameter, click.Option)
    name = max(parameter.opts, key=len) if is_option else str(parameter.name)
    return name.removeprefix("--").replace("-", "_")


def _value(parameter: click.Parameter, key: str, value: Any) -> Any:
    """Return a value as click takes it: several as a list, a mapping as ``NAME=VALUE``."""
    if isinstance(value, Mapping):
        value = [f"{name}={inner}" for name, inner in value.items()]
    takes_several = parameter.multiple or parameter.nargs != 1
    if takes_several:
        return value if isinstance(value, list) else [value]
    if isinstance(value, list) and not isinstance(parameter.type, (TaskNames, Numbers)):
        raise RecipeError(f"{key} is one value, not {value}")
    return value


def write_run_file(folder: Path) -> None:
    """Write the options of the running command to ``run.yaml`` in a folder, for ``--config``."""
    from weightops.support.text import portable

    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    given = {
        _key(p): _plain(context.params[str(p.name)], p.type)
        for p in context.command.params
        if p.name in context.params and p.name not in (*_OF_ONE_RUN, "out", "device")
        if context.get_parameter_source(str(p.name)) is not default
    }
    text = run_yaml(str(context.command.name), portable(given))
    (folder / "run.yaml").write_text(text, encoding="utf-8")


def _plain(value: Any, kind: object) -> Any:
    """Return a value as a file has it."""
    if isinstance(kind, NodeOf):
        return "/".join(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item, kind) for item in value]
    return str(value) if isinstance(value, Path) else value


CONFIG = click.Option(
    ["--config"],
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read,
    help="A YAML file of these options, such as run.yaml in the folder of a run; those of the "
    "command line precede it.",
)
