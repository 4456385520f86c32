"""``weightops apply``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightops.cli.from_signature import command
from weightops.cli.saving import OUTPUT, SAVE, may_exist, output_options, save
from weightops.cli.types import Numbers

if TYPE_CHECKING:
    from weightops.evaluation.batchnorm import BatchNorm

_ALPHA = click.Option(
    ["--alpha"],
    multiple=True,
    type=Numbers(),
    show_default="1.0",
    help="One coefficient for all vectors, or one for each, such as 0.3,0.5; negative to forget.",
)


@command(SAVE, arguments=(_ALPHA, *OUTPUT), metavar="VECTOR...")
def apply(
    vectors: tuple[str, ...],
    *,
    base: str,
    strict: bool = False,
    batchnorm: BatchNorm | None = None,
    dequantize: bool = False,
    json_: bool = False,
    **given: Any,
) -> None:
    """Write BASE + alpha * VECTOR (+ alpha * VECTOR ...), with vectors that were saved.

    Args:
        vectors: saved task vectors, or adapters.
        base: the weights to edit.
        strict: refuse a vector that was made from another base, instead of warning.
        batchnorm: recompute running statistics on the images of a task; base: keep the base's.
        dequantize: read a quantised base in bfloat16, as `dequantized:` before it does.
    """
    from weightops.checkpoints.opening import as_dequantised, open_checkpoint
    from weightops.checkpoints.vector_files import is_adapter
    from weightops.hub.cards import edit_card, edit_title
    from weightops.merging.recipe import Recipe
    from weightops.support.atomic import check_free
    from weightops.support.text import distinct_names, portable, renamed
    from weightops.task_vector import TaskVector
    from weightops.tasks.task import Task

    alphas = tuple(alpha for several in given.pop("alpha", ((1.0,),)) for alpha in several)
    _check(vectors, alphas, base)
    output = output_options(given)
    check_free(output["out"], overwrite=may_exist(output))
    alphas = alphas * len(vectors) if len(alphas) == 1 else alphas
    base = as_dequantised(base) if dequantize else base
    start = open_checkpoint(base)
    opened = [
        TaskVector(start, path) if is_adapter(path) else TaskVector.load(path) for path in vectors
    ]
    scaled = [vector * alpha for vector, alpha in zip(opened, alphas, strict=True)]
    edited = sum(scaled[1:], scaled[0]).apply(start, strict=strict)
    terms = list(zip(vectors, alphas, strict=True))
    if batchnorm and not output.get("dry_run"):
        from weightops.evaluation.batchnorm import with_batchnorm

        edited = with_batchnorm(edited, batchnorm, start, output.get("device", "cpu"))
    edited.card = edit_card(base, terms)
    told = batchnorm.name if isinstance(batchnorm, Task) else batchnorm
    recipe = Recipe(vectors, "task_arithmetic", base=base, weights=alphas, batchnorm=told)
    edited.recipe = portable(renamed(recipe.to_dict(), distinct_names((base, *vectors))))
    save(edited, edit_title(base, terms), json_, **output)


def _check(vectors: tuple[str, ...], alphas: tuple[float, ...], base: str) -> None:
    """Refuse numbers of vectors and alphas that don't go together, and one in place of another."""
    from weightops.support.text import counted

    numbers = [text for text in vectors if re.fullmatch(r"-?[\d.,]*\d", text)]
    numbers = [text for text in numbers if not Path(text).exists()]
    if numbers:
        told = ",".join([*(f"{alpha:g}" for alpha in alphas), *numbers])
        raise click.UsageError(
            f"{numbers[0]} is a number, and no vector; several alphas are one option: "
            f"--alpha {told}"
        )
    joined = next((text for text in vectors if "," in text and not Path(text).exists()), None)
    if joined:
        raise click.UsageError(
            f"there is no vector {joined}; several are separated by spaces: "
            + joined.replace(",", " ")
        )
    if len(alphas) not in (1, len(vectors)):
        remedy = "give one alpha, or one for each vector"
        if len(vectors) == 1:
            listed = ",".join(f"{alpha:g}" for alpha in alphas)
            remedy = (
                "a model for each alpha is a run for each; over the depth of the layers, "
                f"`weightops merge FINETUNED --base {base} --method task_arithmetic --alpha "
                f"{listed}` spreads them"
            )
        counts = f"{counted(len(vectors), 'vector')} and {counted(len(alphas), 'alpha')}"
        raise click.UsageError(f"{counts}: {remedy}")
