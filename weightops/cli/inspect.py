"""``weightops inspect``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from textwrap import indent
from typing import TYPE_CHECKING, Any

from weightops.checkpoints.statistic_record import in_words
from weightops.cli.from_signature import command
from weightops.cli.printing import echo, echo_json
from weightops.errors import printable

if TYPE_CHECKING:
    from weightops.algebra.source import Source, Spec


@command()
def inspect(checkpoint: str, *, tensors: bool = True, json_: bool = False) -> None:
    """Show what a checkpoint or task vector holds: tensors, sizes, dtypes, fingerprint, origin.

    Its data aren't loaded.

    Args:
        checkpoint: a file, a folder or a ref.
        tensors: list every tensor.
    """
    from weightops.checkpoints.opening import open_ref

    source = open_ref(checkpoint).form.sources[0]
    stored = {name: spec for name, spec in source.specs.items() if name not in source.ties}
    dtypes = _count_dtypes(stored)
    if not json_:
        if tensors:
            _print_tensors(source)
        _print_totals(source, stored, dtypes)
        try:
            _print_origin(source.made_from)
        except (LookupError, TypeError, AttributeError, ValueError):  # anyone may have written it
            echo("made from    a record that isn't sound")
        return
    record: dict[str, object] = {
        "checkpoint": checkpoint,
        "fingerprint": source.fingerprint,
        "parameters": sum(dtypes.values()),
        "bytes": sum(spec.nbytes for spec in stored.values()),
        "dtypes": dtypes,
        "ties": dict(source.ties),
        "keys": list(source.keys),
        "passed_over": list(source.skipped),
        "made_from": source.made_from,
    }
    if tensors:
        record["tensors"] = {
            name: {"shape": list(spec.shape), "dtype": spec.dtype_name}
            for name, spec in source.specs.items()
        }
    echo_json(record)


def _count_dtypes(specs: Mapping[str, Spec]) -> dict[str, int]:
    """Return dtype -> how many numbers have it."""
    counts: dict[str, int] = {}
    for spec in specs.values():
        counts[spec.dtype_name] = counts.get(spec.dtype_name, 0) + spec.numel
    return counts


def _print_tensors(source: Source) -> None:

    shown = {name: printable(name) for name in source.specs}
    width = max(map(len, shown.values()), default=0)
    for name, spec in source.specs.items():
        tied = f"  = {shown[source.ties[name]]}" if name in source.ties else ""
        shape = "x".join(map(str, spec.shape)) or "scalar"
        echo(f"{shown[name]:{width}}  {spec.dtype_name:9} {shape}{tied}")


def _print_totals(source: Source, stored: Mapping[str, Spec], dtypes: dict[str, int]) -> None:
    numbers = sum(dtypes.values())
    size = _size(math.fsum(spec.nbytes for spec in stored.values()))
    echo(f"{len(source.specs)} tensors, {numbers:,} numbers, {size}")
    echo("dtypes       " + ", ".join(f"{name} {count:,}" for name, count in dtypes.items()))
    echo(f"fingerprint  {source.fingerprint}")
    if source.keys:
        opened, *others = map(printable, source.keys)
        echo(f"opened       {opened}" + "".join(f"; also {key}" for key in others))
    if source.skipped:
        echo("skipped      " + ", ".join(map(printable, source.skipped)))


def _print_origin(made_from: Mapping[str, Any]) -> None:
    """Print how the weights were compressed, adapted, merged or edited."""
    compressed = made_from.get("compressed")
    if isinstance(compressed, dict):
        error = compressed.get("relative_error")
        echo(printable(f"compressed   {compressed.get('how')}, relative error {error}"))
    adapter = made_from.get("adapter")
    if isinstance(adapter, dict):
        ranks = ", ".join(map(str, adapter["ranks"]))
        whole = f", and {len(adapter['whole'])} whole tensors" if adapter["whole"] else ""
        base = adapter["base"] or "a base it does not name"
        modules = f"{adapter['modules']} modules of {base}"
        echo(printable(f"adapter      {adapter['kind']} of rank {ranks} on {modules}{whole}"))
    recipe, terms = made_from.get("recipe"), made_from.get("terms")
    if isinstance(recipe, dict):
        from weightops.support.yaml_files import yaml_text

        echo("recipe\n" + indent(yaml_text(recipe).strip(), "  "))
        return
    for term in terms if isinstance(terms, list) else []:
        if isinstance(term.get("statistic"), dict):
            echo(printable(f"statistic    {in_words(term['statistic'])}"))
            continue
        what = term.get("method") or f"{term.get('ref')} ({term.get('fingerprint')})"
        rules = f" at {term['rules']}" if term.get("rules") else ""
        echo(printable(f"made from    {term.get('coefficient', 1):+g} x {what}{rules}"))
        mask = term.get("localized")
        if isinstance(mask, dict):
            images = f"{mask['images']} {mask['split']} images of {mask['task']}"
            echo(printable(f"localized    {mask['kept']:.2%} of what changed, by {images}"))


def _size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"
