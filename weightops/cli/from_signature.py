"""Make commands from signatures: one option for each parameter, with its type, default and text.

A value that isn't given on the command line isn't passed, so the function's default holds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import click

from weightops.cli import types
from weightops.cli.config_files import CONFIG
from weightops.cli.signatures import REQUIRED, Expression, Parameter, plugin_names, read
from weightops.errors import WeightopsError
from weightops.support.docstrings import plain

_FLAGS = {
    "out": ("-o", "--out"),
    "finetuned": ("--finetuned", "--vector"),
    "adapters": ("--adapter",),
}
"""Options that aren't spelt as their parameter."""

_PLUGINS = {"method": "methods"}
"""Parameters that name an entry of a registry -> the group of its plug-ins, which help lists."""


def _quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from weightops.cli.printing import quieten

        quieten()


def _overwrite(ctx: click.Context, param: click.Parameter, count: int) -> bool | str:
    """Return "all" for an option that is given twice, which ``--overwrite=all`` is short for."""
    return "all" if count > 1 else count == 1


_JSON = click.Option(["json_", "--json"], is_flag=True, help="Print JSON.")
_QUIET = click.Option(
    ["-q", "--quiet"],
    is_flag=True,
    expose_value=False,
    callback=_quiet,
    help="Print no progress and no warnings.",
)


@dataclass(frozen=True)
class Borrowed:
    """Parameters of a function or dataclass of the library that a verb has as options, too.

    Attributes:
        reference: ``module:name``, see `read`.
        only: the parameters to take; all of them by default.
        leave_out: parameters not to take.
        names: parameter -> its name on the command line, where that is another.
        shown_defaults: parameter -> default to show, where the default isn't a literal.
    """

    reference: str
    only: Sequence[str] = ()
    leave_out: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    shown_defaults: Mapping[str, str] = field(default_factory=dict)

    def parameters(self) -> list[Parameter]:
        """Return the parameters that the command line can express."""
        return [
            replace(parameter, name=self.names.get(parameter.name, parameter.name))
            for parameter in read(self.reference).parameters
            if parameter.name not in self.leave_out
            and (not self.only or parameter.name in self.only)
            and types.of(parameter.kind) is not None
        ]

    def options(self, *, optional: Sequence[str] = ()) -> list[click.Parameter]:
        """Return an option for each parameter."""
        return [
            option(
                parameter,
                shown_default=self.shown_defaults.get(parameter.name),
                optional=parameter.name in optional,
            )
            for parameter in self.parameters()
        ]


def option(
    parameter: Parameter, *, shown_default: str | None = None, optional: bool = False
) -> click.Option:
    """Return the option of a parameter."""
    name, kind, default = parameter.name, parameter.kind, parameter.default
    spelt = list(_FLAGS.get(name) or (f"--{name.rstrip('_').replace('_', '-')}",))
    text = plain(parameter.text)
    plugins = plugin_names(_PLUGINS[name]) if name in _PLUGINS else []
    text += f" From plug-ins: {', '.join(plugins)}." if plugins else ""
    starts_with_choice = text.partition(" ")[0].rstrip(":") in kind.choices
    settings: dict[str, Any] = {"help": text if starts_with_choice else text[:1].upper() + text[1:]}
    if name == "overwrite":
        return click.Option([name, *spelt], count=True, callback=_overwrite, **settings)
    if kind.name == "bool":
        if default is True:
            spelt[-1] += f"/--no-{spelt[-1].removeprefix('--')}"
        return click.Option([name, *spelt], is_flag=True, default=bool(default), **settings)
    if name == "score":
        settings["is_eager"] = True  # names of tasks are read as it says
    if default is REQUIRED and not optional:
        settings["required"] = True
    shown = shown_default or _literal(default)
    if shown is not None:
        settings |= {"default": shown, "show_default": True}
    many = types.is_multiple(kind)
    return click.Option([name, *spelt], type=types.of(kind), multiple=many, **settings)


def _literal(default: Any) -> Any:
    """Return a default that help can show; the function's own holds, so it is never passed."""
    hidden = default in (None, REQUIRED, "") or isinstance(default, (Expression, tuple, list))
    return None if hidden else default


def argument(parameter: Parameter, *, metavar: str | None = None) -> click.Argument:
    """Return the argument of a parameter that is taken by position."""
    many = parameter.kind.many
    required = parameter.default is REQUIRED
    name = parameter.name.upper().removesuffix("S" if many else "")
    return click.Argument(
        [parameter.name],
        nargs=-1 if many else 1,
        required=required,
        type=types.of(parameter.kind),
        metavar=metavar or (f"{name}..." if many and required else None),
    )


def command(
    *borrowed: Borrowed,
    about: str | None = None,
    arguments: Sequence[click.Parameter] = (),
    optional: Sequence[str] = (),
    metavar: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a command of a function: its own parameters are arguments and options, too.

    Args:
        borrowed: parameters of the library that are options.
        about: the help; by default the function's docstring.
        arguments: further click parameters.
        optional: borrowed parameters that need not be given although they have no default.
        metavar: how help shows the function's argument.
        settings: of the click context.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        own = read(f"{function.__module__}:{function.__name__}")
        parameters = [
            argument(p, metavar=metavar) if p.positional else option(p)
            for p in own.parameters
            if p.name != _JSON.name and types.of(p.kind) is not None
        ]
        return build(
            function.__name__.rstrip("_"),
            function,
            [*parameters, *arguments, *_options(borrowed, optional)],
            about or own.docstring.text,
            settings,
        )

    return decorate


def _options(borrowed: Sequence[Borrowed], optional: Sequence[str]) -> list[click.Parameter]:
    return [option for library in borrowed for option in library.options(optional=optional)]


def build(
    name: str,
    function: Callable[..., Any],
    parameters: Sequence[click.Parameter],
    about: str,
    settings: Mapping[str, Any] | None = None,
) -> click.Command:
    """Return a command that calls a function with those values that were given."""
    parameters = [*parameters, *_reading_options(parameters)]
    if any(parameter.name == "out" for parameter in parameters):
        parameters.append(CONFIG)
    flags = _flags(parameters)
    for parameter in parameters:
        if isinstance(parameter, click.Option):
            parameter.help = _name_flags(parameter.help or "", flags)
    return _Verb(
        name,
        params=[*parameters, _JSON, _QUIET],
        callback=translated(function),
        help=help_text(about),
        context_settings=dict(settings or {}),
    )


class _Verb(click.Command):
    """A command that says which option a name by itself was meant for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = next(iter(args), "-")
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            takes_names = any(isinstance(p, click.Argument) for p in self.params)
            if isinstance(error.param, click.Option) and not (takes_names or first[:1] == "-"):
                meant = f"Did you mean {max(error.param.opts, key=len)} {first}?"
                raise click.MissingParameter(meant, error.ctx, error.param) from error
            raise


def _reading_options(parameters: Sequence[click.Parameter]) -> list[click.Parameter]:
    """Return the options that say how the data of tasks are read, if a verb takes tasks."""
    names = [p.name for p in parameters if isinstance(p.type, types.TaskNames)]
    scored = [name for name in names if name != "batchnorm"]  # statistics have no classes
    only = (*(["class_order"] if scored else []), *(["skip_unreadable"] if names else []))
    if not names:
        return []
    return [*Borrowed("weightops.tasks.table:as_read", only=only).options(), _cache_limit()]


def _cache_limit() -> click.Option:
    """Return the option with the most bytes of prepared pictures, which sets the environment."""
    variable = "WEIGHTOPS_CACHE_LIMIT"

    def keep(ctx: click.Context, param: click.Parameter, value: int | None) -> None:
        if value is not None:
            before = os.environ.get(variable)
            os.environ[variable] = str(value)
            restore = partial(os.environ.__setitem__, variable, before or "")
            ctx.call_on_close(restore)

    return click.Option(
        ["--cache-limit"],
        type=types.Size(may_be_zero=True),
        expose_value=False,
        callback=keep,
        help="Keep at most so many prepared pictures for later runs, such as 50GB; 0 for none.",
    )


def _read_as_asked(given: dict[str, Any], context: click.Context) -> dict[str, Any]:
    """Return the given values with tasks that are read as the options say, which are removed."""
    tasks = {p.name for p in context.command.params if isinstance(p.type, types.TaskNames)}
    asked = {"score", "class_order", "skip_unreadable"} & given.keys()
    if not tasks or not asked:
        return given
    from weightops.tasks.table import as_read

    how = {name: given.pop(name) for name in sorted(asked)}
    unread = ("batchnorm",) if "score" in how else ()  # its images are no program's
    named = {n for n in tasks & given.keys() if given[n] != "base" and n not in unread}
    if not named:
        raise click.UsageError(f"--{next(iter(how)).replace('_', '-')} is for tasks that are named")
    for key in named:
        value = given[key]
        is_one = isinstance(value, str)
        given[key] = as_read(value, **how) if is_one else [as_read(name, **how) for name in value]
    return given


def _flags(parameters: Sequence[click.Parameter]) -> dict[str, str]:
    """Return option -> how it is spelt in full."""
    return {str(p.name): max(p.opts, key=len) for p in parameters if isinstance(p, click.Option)}


def _name_flags(text: str, flags: Mapping[str, str]) -> str:
    """Return a text in which parameters of several words are named as options."""
    return re.sub(r"\b[a-z]+(?:_[a-z]+)+\b", lambda match: flags.get(match[0], match[0]), text)


def help_text(text: str) -> str:
    """Return a docstring's text as help: without the marks of code, indented blocks as they are."""
    return re.sub(r"\n\n(    .+(?:\n    .+)*)", r"\n\n\b\n\1", plain(text.replace("::\n", ":\n")))


def translated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a callback that passes what was given, and translates the arguments in errors."""

    def callback(**values: Any) -> Any:
        context = click.get_current_context()
        unset = click.core.ParameterSource.DEFAULT
        given = {n: v for n, v in values.items() if context.get_parameter_source(n) != unset}
        try:
            return function(**_read_as_asked(given, context))
        except WeightopsError as error:
            flags = _flags(context.command.params)
            hint = translate(error.hint, flags)
            raise type(error)(translate(error.fact, flags), hint=hint) from error

    return callback


def translate(text: str, flags: Mapping[str, str]) -> str:
    """Return a text with Python's arguments as the options of a command.

    >>> translate("overwrite=True replaces it; give base=", {"overwrite": "--overwrite"})
    '--overwrite replaces it; give base='
    >>> translate("overwrite='all' replaces it", {"overwrite": "--overwrite"})
    '--overwrite=all replaces it'
    >>> translate('split="test" is scored', {"split": "--split"})
    '--split=test is scored'
    """

    def replaced(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        if name not in flags:
            return match[0]
        if value.startswith(("'", '"')):
            return f"{flags[name]}={value[1:-1]}"
        return flags[name] if value in ("", "...", "True") else f"{flags[name]} {value}"

    return re.sub(r"(?<![\w-])([a-z_]+)=(True|\.\.\.|'\w+'|\"\w+\"|[\w.]*)", replaced, text)
