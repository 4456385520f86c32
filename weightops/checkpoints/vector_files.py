"""Write task vectors to files, and open these files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightops.algebra.dtypes import accumulator_name
from weightops.algebra.linear_form import LinearForm
from weightops.algebra.provenance import provenance
from weightops.algebra.source import Source, Spec
from weightops.checkpoints.adapters.adapter import CONFIG, Adapter
from weightops.checkpoints.adapters.writing import facts_of_adapter, write_adapter
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.compressed import coding, write_compressed
from weightops.checkpoints.linearized import linearized_at
from weightops.checkpoints.opening import open_ref
from weightops.checkpoints.output_layout import folders_of
from weightops.checkpoints.statistic_record import refuse_statistic
from weightops.engine.layout import layout
from weightops.engine.write import write
from weightops.errors import OptionError, SpaceError
from weightops.hub.cards import adapter_card
from weightops.support.atomic import (
    Overwrite,
    atomic_output,
    behind_links,
    check_free,
    resumable_output,
)
from weightops.support.json_files import read_json
from weightops.support.lazy import torch
from weightops.support.result_files import CARD


def write_vector(
    form: LinearForm,
    path: Path,
    *,
    base: Mapping[str, Any] | None,
    overwrite: Overwrite,
    dtype: torch.dtype | None,
    compress: str | None,
) -> Path:
    """Write a delta, with the provenance of its base, to a file; see `TaskVector.save`."""
    if compress is not None:
        coding(compress)
        if dtype is not None:
            raise OptionError(
                "a compressed task vector has the dtypes of its compression",
                hint="leave out dtype=",
            )
    linearized_at(form)  # a mixture of linearised and ordinary weights is refused
    check_free(path, overwrite=overwrite, inputs=[file.path for file in form.files])
    specs = {
        name: Spec(spec.shape, dtype or accumulator_name(spec.dtype_name))
        for name, spec in form.specs.items()
    }
    form = replace(form, specs=specs)
    record = {"kind": "task vector", **provenance(form), "base": base}
    if compress is not None:
        with atomic_output(path, overwrite=overwrite) as file:
            write_compressed(form, file, compress, record)
        return path
    metadata = {"format": "pt", "weightops": json.dumps(record)}
    with resumable_output(path, single=True, overwrite=overwrite) as folder:
        name = behind_links(path).name
        write(form, folder, layout(form, name, metadata))
    return path


def write_lora(
    form: LinearForm,
    folder: Path,
    rank: int,
    *,
    base: Checkpoint | None,
    ref: str | None,
    overwrite: Overwrite,
) -> dict[str, float]:
    """Write the LoRA nearest to a delta, with a model card; see `TaskVector.save_lora`."""
    check_free(folder, overwrite=overwrite, inputs=[file.path for file in form.files])
    with atomic_output(folder, overwrite=overwrite) as stage:
        stage.mkdir()
        lost = write_adapter(form, stage, rank, base=base, ref=ref)
        card = adapter_card(ref, rank, lost["relative_error"])
        facts = facts_of_adapter(read_json(stage / CONFIG)["task_type"])
        inputs = {} if base is None else folders_of(base.form)
        text = card.text(facts, "cpu", name=folder.name, inputs=inputs)
        (stage / CARD).write_text(text, encoding="utf-8")
        return lost


def is_adapter(path: str | Path) -> bool:
    """Return whether a path holds an adapter, which may need its base to be a task vector."""
    return isinstance(open_ref(path).form.sources[0], Adapter)


def open_vector(path: str | Path) -> Source:
    """Open a file of a task vector.

    Raises:
        SpaceError: if the file holds weights or a statistic, or needs the base to be a task vector.
    """
    opened = open_ref(path)
    source = opened.form.sources[0]
    call = f"TaskVector(base, {str(path)!r})"
    if source.space != "delta":
        refuse_statistic(opened, "a task vector")
        raise SpaceError(
            f"{path} holds weights, not a task vector",
            hint=f"`weightops vector BASE {path} -o VECTOR`, or {call}, makes one of weights",
        )
    if isinstance(source, Adapter) and source.needs_base:
        raise SpaceError(
            f"{path} {source.needs_base}, and so needs its base",
            hint=f"`weightops apply {path} --base BASE`, or {call}",
        )
    return source
