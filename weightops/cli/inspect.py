"""``weightops inspect``."""

from __future__ import annotations

import math
from textwrap import indent

import click

from weightops.cli import options


@click.command()
@click.argument("checkpoint")
@click.option("--tensors/--no-tensors", default=True, show_default=True, help="List every tensor.")
@options.printing
def command(checkpoint: str, tensors: bool, as_json: bool) -> None:
    """Tell what a checkpoint or task vector holds: tensors, sizes, dtypes, fingerprint, origin. Its data aren't loaded."""
    from weightops.algebra.dtypes import name_of
    from weightops.checkpoints.opening import open_ref

    source = open_ref(checkpoint).form.sources[0]
    stored = {name: spec for name, spec in source.specs.items() if name not in source.ties}
    dtypes: dict[str, int] = {}
    for spec in stored.values():
        dtypes[name_of(spec.dtype)] = dtypes.get(name_of(spec.dtype), 0) + spec.numel
    made_from = getattr(source, "made_from", {})
    result: dict[str, object] = {
        "checkpoint": checkpoint,
        "fingerprint": source.fingerprint,
        "parameters": sum(dtypes.values()),
        "bytes": sum(spec.nbytes for spec in stored.values()),
        "dtypes": dtypes,
        "ties": dict(source.ties),
        "passed_over": list(source.skipped),
        "made_from": made_from,
    }
    if tensors:
        result["tensors"] = {
            n: {"shape": list(s.shape), "dtype": name_of(s.dtype)} for n, s in source.specs.items()
        }
    if as_json:
        options.echo_json(result)
        return
    if tensors:
        width = max((len(name) for name in source.specs), default=0)
        for name, spec in source.specs.items():
            tied = f"  = {source.ties[name]}" if name in source.ties else ""
            click.echo(
                f"{name:{width}}  {name_of(spec.dtype):9} {'x'.join(map(str, spec.shape)) or 'scalar'}{tied}"
            )
    click.echo(
        f"{len(source.specs)} tensors, {result['parameters']:,} numbers, {_size(math.fsum(s.nbytes for s in stored.values()))}"
    )
    click.echo("dtypes       " + ", ".join(f"{name} {count:,}" for name, count in dtypes.items()))
    click.echo(f"fingerprint  {source.fingerprint}")
    if source.skipped:
        click.echo("passed over  " + ", ".join(source.skipped))
    compressed = made_from.get("compressed")
    if isinstance(compressed, dict):
        click.echo(
            f"compressed   {compressed.get('how')}, relative error {compressed.get('relative_error')}"
        )
    adapter = made_from.get("adapter")
    if isinstance(adapter, dict):
        ranks = ", ".join(map(str, adapter["ranks"]))
        whole = f", and {len(adapter['whole'])} whole tensors" if adapter["whole"] else ""
        click.echo(
            f"adapter      {adapter['kind']} of rank {ranks} on {adapter['modules']} modules of {adapter['base'] or 'a base it does not name'}{whole}"
        )
    recipe = made_from.get("recipe")
    if isinstance(recipe, dict):
        import yaml

        click.echo("recipe\n" + indent(yaml.safe_dump(recipe, sort_keys=False).strip(), "  "))
        return
    terms = made_from.get("terms")
    for term in terms if isinstance(terms, list) else []:
        what = term.get("method") or f"{term.get('ref')} ({term.get('fingerprint')})"
        click.echo(
            f"made from    {term.get('coefficient', 1):+g} x {what}"
            + (f" at {term['rules']}" if term.get("rules") else "")
        )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"
