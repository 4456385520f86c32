"""`Checkpoint`: weights from any place, as a lazy mapping of names to tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from weightops.algebra.codes import REMEDY, is_packed
from weightops.algebra.devices import pick_device
from weightops.algebra.linear_form import LinearForm
from weightops.algebra.provenance import as_written, fingerprint
from weightops.algebra.source import Source
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.in_memory import InMemory
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.memory_names import MemoryNames
from weightops.checkpoints.linearized import linearized_at
from weightops.checkpoints.loading import load_into, untie
from weightops.checkpoints.output_layout import (
    file_metadata,
    folder_layout,
    is_single_file,
    write_records,
)
from weightops.checkpoints.renaming import match_ties, rename_to_match
from weightops.checkpoints.skeleton import blank_copy
from weightops.checkpoints.statistic_record import refuse_statistic
from weightops.engine.evaluate import OnNonfinite, allocate, materialize
from weightops.engine.layout import Estimate, FileLayout, estimate, has_header, layout
from weightops.engine.ranks import ONE_RANK, Ranks
from weightops.engine.tensors import Tensors
from weightops.engine.write import write
from weightops.errors import CheckpointError
from weightops.hub.cards import Card
from weightops.support.atomic import Overwrite, behind_links, check_free, resumable_output, stage_of
from weightops.support.lazy import nn, torch
from weightops.support.text import first_few

log = logging.getLogger("weightops")


class _Writing(NamedTuple):
    """The options of `Checkpoint.save` for the weights of one output."""

    max_shard_size: int | None
    on_nonfinite: OnNonfinite
    ranks: Ranks
    device: torch.device
    name: str


class Checkpoint(Tensors):
    """Named tensors that are read when they are used. Opening a checkpoint reads headers only.

    Args:
        form: the lazy expression that gives the tensors.
        architecture: the model that the weights are of; None if it isn't known.
        module: the module that the weights are in; None for weights in another place.

    Attributes:
        recipe: the merge recipe that made the weights, or None; a saved file states it.
        card: the model card for a saved folder, or None.
        records: file name -> JSON content that a saved folder has beside the weights.

    >>> from weightops import open_checkpoint
    >>> checkpoint = open_checkpoint({"weight": torch.ones(2, 3)})
    >>> checkpoint.specs["weight"].shape
    (2, 3)
    """

    def __init__(
        self,
        form: LinearForm,
        architecture: Architecture | None = None,
        *,
        module: nn.Module | None = None,
    ) -> None:
        self.form = form
        self.architecture = architecture
        self._module = module
        self.recipe: dict[str, Any] | None = None
        self.card: Card | None = None
        self.records: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        cached = ("names_in_memory", "skeleton", "memory")
        return {name: value for name, value in vars(self).items() if name not in cached}

    @property
    def source(self) -> Source:
        """The one source of all tensors.

        Raises:
            CheckpointError: if the weights are an expression that isn't computed yet.
        """
        if self.form.base is None or self.form.sources != [self.form.base]:
            raise CheckpointError(
                f"{self.ref} is an expression over {len(self.form.sources)} checkpoints",
                hint="save it first",
            )
        return self.form.base

    @property
    def ref(self) -> str:
        """The name of the weights in messages."""
        return " + ".join(source.ref for source in self.form.sources)

    @cached_property
    def names_in_memory(self) -> MemoryNames | None:
        """The names of the tensors in a module, if they may differ from those in files."""
        if self._module is not None:
            return MemoryNames.of(self._module)
        return self.architecture.names_in_memory if self.architecture else None

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the weights or their expression; see `Source.fingerprint`."""
        return fingerprint(self.form)

    @cached_property
    def skeleton(self) -> nn.Module | None:
        """The module that the weights are of, without weights; None if it isn't known."""
        if self._module is not None:
            return blank_copy(self._module)
        return self.architecture.skeleton if self.architecture else None

    @property
    def is_module(self) -> bool:
        """Whether the weights are those of a module in memory."""
        return self._module is not None

    @cached_property
    def memory(self) -> InMemory:
        """The weights as the module has them in memory."""
        return InMemory(self.form, self.names_in_memory)

    def __repr__(self) -> str:
        size = sum(spec.nbytes for spec in self.specs.values())
        return f"Checkpoint({as_written(self.form)!r}, {len(self)} tensors, {size / 1e6:.1f} MB)"

    def to(self, dtype: torch.dtype | str) -> Checkpoint:
        """Return the weights with editable tensors in another dtype; reading casts them."""
        architecture = self.architecture.in_dtype(dtype) if self.architecture else None
        return self.with_form(self.form.to(dtype), architecture)

    def with_form(self, form: LinearForm, architecture: Architecture | None) -> Checkpoint:
        """Return a checkpoint of another form and architecture with this one's records."""
        other = Checkpoint(form, architecture, module=self._module)
        other.recipe, other.card, other.records = self.recipe, self.card, self.records
        return other

    def state_dict(
        self,
        *,
        like: Mapping[str, torch.Tensor] | None = None,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> dict[str, torch.Tensor]:
        """Compute all tensors. Tied names share one tensor.

        Args:
            like: tensors whose devices the new tensors are put on; CPU by default.
            on_nonfinite: what to do about NaN and Inf: "ignore", "warn" or "error".

        Raises:
            NonfiniteError: if a tensor holds NaN or Inf and ``on_nonfinite="error"``.
        """
        tensors = allocate(self.form, like)
        materialize(self.form, tensors, on_nonfinite=on_nonfinite)
        return tensors

    def load_into(self, module: nn.Module, *, strict: bool = True) -> nn.Module:
        """Fill the parameters and buffers of a module, in its dtypes and on its device.

        Args:
            module: the module.
            strict: require equal names; otherwise names that only one of them has are skipped.

        Returns:
            The module.

        Raises:
            MismatchError: if shapes differ, or names differ and ``strict=True``.
        """
        load_into(self.form, module, strict=strict)
        return module

    def model(self) -> nn.Module:
        """Build the model in evaluation mode on CPU.

        Raises:
            CheckpointError: if the architecture isn't known, or the weights are quantised.
        """
        self._check_unquantised()
        module = self.known_architecture().build()
        names = self.known_architecture().names_in_memory
        wanted = LinearForm.of(MemorySource(module.state_dict(), self.ref))
        form = match_ties(rename_to_match(self._own_form(), wanted, names), wanted)
        if names is not None:
            form = form.part(
                [n for n in form.specs if n in wanted.specs or not names.is_ignored(n)]
            )
        untie(module, form)
        load_into(form, module, on_nonfinite="warn")
        return module

    def _own_form(self) -> LinearForm:
        """Return the form without the parts that the model's module doesn't have."""
        own = self.known_architecture().own_names(self.specs)
        if len(own) == len(self.specs):
            return self.form
        left = [name for name in self.specs if name not in set(own)]
        log.warning("%s: the module has nothing of %s", self.ref, first_few(left))
        return self.form.part(own)

    def _check_unquantised(self) -> None:
        """Refuse codes, which a module would take for weights."""
        config = self.known_architecture().config.get("quantization_config")
        kind = f" ({config.get('quant_method')})" if isinstance(config, dict) else ""
        codes = [name for name, spec in self.specs.items() if is_packed(spec)]
        if codes and (kind or any(name.endswith(".weight") for name in codes)):
            raise CheckpointError(
                f"{self.ref} holds quantised weights{kind}: {first_few(codes)}",
                hint=f"{REMEDY}; or load the model with its library",
            )

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        """Return the function that turns a PIL image into the model's input."""
        return self.known_architecture().preprocess()

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        """Return the function that turns texts into the model's input."""
        return self.known_architecture().tokenizer()

    def known_architecture(self) -> Architecture:
        """Return the architecture.

        Raises:
            CheckpointError: if nothing says which model the weights are of.
            SpaceError: if it holds a statistic.
        """
        if self.architecture is None:
            refuse_statistic(self)
            raise CheckpointError(
                f"{self.ref} holds weights but doesn't say of what model",
                hint="name a folder with a configuration beside the weights, or give base=; "
                "in Python, load_into(module) fills a module",
            )
        return self.architecture

    def save(
        self,
        path: str | Path,
        *,
        overwrite: Overwrite = False,
        dtype: torch.dtype | str | None = None,
        max_shard_size: int | None = None,
        on_nonfinite: OnNonfinite = "warn",
        resume: bool = False,
        ranks: Ranks = ONE_RANK,
        device: str = "cpu",
    ) -> Path:
        """Write the weights, whole or not at all, with metadata that state their origin.

        Args:
            path: a ``.safetensors`` file, or a folder that loads in the architecture's library.
            overwrite: replace an existing output; it stays until the new one is complete. With
                "all" it may be an input, or a folder that holds other things.
            dtype: the dtype of the editable tensors; unchanged by default.
            max_shard_size: the most bytes of tensors in one file; for folders only.
            on_nonfinite: what to do about NaN and Inf in the result: "ignore", "warn" or "error".
            resume: continue the output of a killed process; the result is the same to the byte. If
                it is finished, and ``overwrite`` is false, nothing is done.
            ranks: the processes that share the work and a file system; each must call this method.
            device: where to compute: "cpu", "cuda", ... Tensors are moved there chunk by chunk.

        Raises:
            OutputError: if ``path`` exists or can't be written.
            OptionError: if there is no such device, or ``path`` has the suffix of another format.
            NonfiniteError: naming the tensors, if ``on_nonfinite="error"``.
        """
        path = Path(path)
        single = is_single_file(path, max_shard_size)
        checkpoint = self.to(dtype) if dtype else self
        options = _Writing(max_shard_size, on_nonfinite, ranks, pick_device(device), path.name)
        if resume and not overwrite and checkpoint._is_in(path, single, max_shard_size):
            return path
        check_free(path, overwrite=overwrite, inputs=[file.path for file in self.form.files])
        stage = resumable_output(path, single=single, overwrite=overwrite, resume=resume)
        with stage if ranks.first else nullcontext(stage_of(path)) as folder:
            if single:
                checkpoint._write_weights(folder, options, behind_links(path).name)
            else:
                checkpoint._write_folder(folder, options)
        return path

    def _is_in(self, path: Path, single: bool, max_shard_size: int | None) -> bool:
        """Return whether a finished output is this one, as the headers of its files say."""
        folder = path.parent if single else path
        files = self._layout(max_shard_size, path.name if single else None)
        return all(has_header(folder / file.name, file) for file in files)

    def save_into(
        self, folder: Path, *, name: str = "", on_nonfinite: OnNonfinite = "warn"
    ) -> None:
        """Write into an existing folder, which the card calls ``name``; see `save`."""
        options = _Writing(None, on_nonfinite, ONE_RANK, pick_device("cpu"), name or folder.name)
        self._write_folder(folder, options)

    def estimate(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        max_shard_size: int | None = None,
    ) -> Estimate:
        """Estimate the bytes, memory and disk space that `save` would take, from headers alone."""
        cast = self.to(dtype) if dtype else self
        return estimate(cast.form, cast._layout(max_shard_size, None), Path(path))

    def _layout(self, max_shard_size: int | None, single: str | None) -> list[FileLayout]:
        """Return the layout of one file of a name, or of those of a folder."""
        linearized_at(self.form)  # a mixture of linearised and ordinary weights is refused
        metadata = file_metadata(self.form, self.recipe)
        if single is not None:
            return layout(self.form, single, metadata)
        return folder_layout(self.form, self.architecture, metadata, max_shard_size)

    def _write_folder(self, folder: Path, options: _Writing) -> None:
        if options.ranks.first:
            if self.architecture:
                self.architecture.warn_of_others(file.path for file in self.form.files)
                self.architecture.write(folder)
            write_records(folder, self, device=str(options.device), name=options.name)
        if options.max_shard_size and self.architecture and not self.architecture.reads_shards:
            log.warning("%s reads one file only: no shards are written", self.architecture.library)
        self._write_weights(folder, options)

    def _write_weights(self, folder: Path, options: _Writing, single: str | None = None) -> None:
        write(
            self.form,
            folder,
            self._layout(options.max_shard_size, single),
            on_nonfinite=options.on_nonfinite,
            ranks=options.ranks,
            device=options.device,
        )
