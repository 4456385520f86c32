"""``weightops verify``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightops.cli.from_signature import Borrowed, command
from weightops.cli.printing import echo, echo_json
from weightops.errors import printable

if TYPE_CHECKING:
    from weightops.engine.compare import Difference
    from weightops.merging.verification import Verification

_SHOWN = 20
"""Tensors that are listed; --json lists all."""


@command(
    Borrowed(
        "weightops.merging.verification:verify",
        only=("recipe", "base", "adapters", "inputs", "device"),
    )
)
def verify(output: Path, *, json_: bool = False, **given: Any) -> None:
    """Compute a merged OUTPUT again from its inputs, and compare it tensor by tensor.

        weightops verify merged
        weightops verify merged --inputs /where/the/models/are
        weightops verify merged --base pre --adapter adapter

    The recipe is the one that the output records. The last form is for an adapter that was merged
    by any tool: it says whether it is in, and with which scale. Exit codes: 0 as it should be, 1
    other, 3 can't be checked, as an input is gone or another.

    Args:
        output: the merged folder or file.
    """
    from weightops.merging import verification

    found = verification.verify(output, **given)
    echo_json(_record(found)) if json_ else _print(found)
    click.get_current_context().exit(0 if found.holds else 1)


def _record(found: Verification) -> dict[str, Any]:
    return {
        "output": found.output,
        "made_by": found.made_by,
        "holds": found.holds,
        "exact": found.exact,
        "scale": found.scale,
        "tensors": len(found.differences),
        "same_bits": sum(not difference.other for difference in found.differences.values()),
        "missing": list(found.missing),
        "extra": list(found.extra),
        "reshaped": dict(found.reshaped),
        "differences": {
            name: {
                "elements": difference.count,
                "other": difference.other,
                "most": difference.most,
                "relative": difference.relative,
                "scale": difference.scale,
                "rounding": difference.is_rounding,
            }
            for name, difference in found.differences.items()
            if difference.other
        },
    }


def _print(found: Verification) -> None:
    """Print which tensors aren't what they should be, and a verdict."""
    differing = found.differing
    if differing:
        _print_differing(differing)
    for what, names in (("it lacks", found.missing), ("it has besides", found.extra)):
        for name in names[:_SHOWN]:
            echo(f"{what} {printable(name)}")
    for name, shapes in found.reshaped.items():
        echo(f"{printable(name)} is {shapes}")
    echo(f"{found.output}: {_verdict(found)}")


def _print_differing(differing: Mapping[str, Difference]) -> None:
    from weightops.reports.table import table

    worst = sorted(differing, key=lambda name: -differing[name].relative)
    rows = [
        [
            name,
            f"{one.other:,} of {one.count:,}",
            f"{one.most:.3g}",
            f"{one.relative:.3g}",
            "-" if one.scale is None else f"{one.scale:.4f}",
        ]
        for name in worst[:_SHOWN]
        for one in [differing[name]]
    ]
    header = ["tensor", "other elements", "most", "relative", "scale of its change"]
    echo(table(header, rows))
    if len(worst) > _SHOWN:
        echo(f"and {len(worst) - _SHOWN} more (--json lists all)")


def _verdict(found: Verification) -> str:
    count, differing = len(found.differences), len(found.differing)
    scale = "" if found.scale is None else f"; the change is in with a scale of {found.scale:.4f}"
    if found.holds:
        rounded = sum(bool(difference.other) for difference in found.differences.values())
        how = f", {rounded} of them up to rounding" if rounded else ", to the bit"
        return f"{count} tensors are what {found.made_by} gives{how}{'' if found.exact else scale}"
    absent = [name for name, own in found.scales.items() if abs(own) < 0.1]
    without = f", and not in {len(absent)} of {len(found.scales)} tensors" if absent else ""
    others = len(found.missing) + len(found.extra) + len(found.reshaped)
    more = f" and {others} are missing, left over or of another shape" if others else ""
    text = f"{differing} of {count} tensors aren't what {found.made_by} gives{more}{scale}{without}"
    if found.exact and not others and all(d.is_rounding for d in found.differing.values()):
        text += "; rounding alone can make such differences, as on another kind of device"
    return text
