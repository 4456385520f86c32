"""``weightops cache``."""

from __future__ import annotations

import click

from weightops.cli.from_signature import command
from weightops.cli.printing import echo, echo_json


@command(metavar="[remove NAME...]")
def cache(remove: tuple[str, ...] = (), *, json_: bool = False) -> None:
    """List what the cache holds; or remove some of it, or all.

    The cache holds what can be made again: pictures as models take them, heads, configurations.
    `weightops cache remove NAME` removes one entry of the list, `weightops cache remove all` all of
    it. Pictures beyond --cache-limit, or $WEIGHTOPS_CACHE_LIMIT, in bytes (100 GB if it isn't set),
    are removed by themselves, those that were used longest ago first.

    Args:
        remove: the word remove, and the names of entries, or all.
    """
    from weightops.errors import UnknownNameError
    from weightops.reports.table import table
    from weightops.support.cache import cache_dir, cache_limit, entries

    found = {entry.name: entry for entry in entries()}
    if remove:
        word, *names = remove
        if word != "remove" or not names:
            raise click.UsageError("to remove is spelt `weightops cache remove NAME...`")
        unknown = [name for name in names if name not in found and name != "all"]
        if unknown:
            raise UnknownNameError(
                f"the cache has no {unknown[0]}", hint="`weightops cache` lists what it has"
            )
        chosen = list(found) if "all" in names else names
        for name in chosen:
            found[name].remove()
        freed = sum(found[name].size for name in chosen)
        echo_json({"removed": chosen, "bytes": freed}) if json_ else echo(
            f"{len(chosen)} removed, {freed / 1e6:,.1f} MB"
        )
        return
    if json_:
        rows = [
            {"name": e.name, "bytes": e.size, "used": e.used, **e.about} for e in found.values()
        ]
        echo_json({"folder": str(cache_dir()), "limit": cache_limit(), "entries": rows})
        return
    echo(
        table(
            ["name", "MB", "last used", "holds"],
            [[e.name, f"{e.size / 1e6:,.1f}", e.used_at, e.holds] for e in found.values()],
        )
    )
    total = sum(entry.size for entry in found.values())
    echo(f"{cache_dir()}: {total / 1e6:,.1f} MB; pictures up to {cache_limit() / 1e9:g} GB")
