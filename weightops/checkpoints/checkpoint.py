"""`Checkpoint`: weights from anywhere, as a lazy mapping of names to tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from typing_extensions import Unpack

from weightops.algebra.devices import pick_device
from weightops.algebra.linear_form import LinearForm, describe, fingerprint, provenance
from weightops.algebra.names import mismatch
from weightops.algebra.source import Source
from weightops.checkpoints.formats import memory
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.renaming import rename_to_match
from weightops.engine.evaluate import OnNonfinite, allocate, materialize
from weightops.engine.layout import Estimate, FileLayout, estimate, layout
from weightops.engine.ranks import ONE_RANK, Ranks
from weightops.engine.tensors import Tensors
from weightops.engine.write import write
from weightops.errors import CheckpointError, OptionError
from weightops.support.atomic import resumable_output, stage_of
from weightops.support.text import first_few

log = logging.getLogger("weightops")


_OTHER_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


class _Write(TypedDict, total=False):
    """Options of `Checkpoint.save`."""

    dtype: torch.dtype | None
    max_shard_size: int | None
    on_nonfinite: OnNonfinite
    ranks: Ranks
    device: str


class Checkpoint(Tensors):
    """Named tensors, read when asked for. Opening one reads headers only.

    Attributes:
        form: the lazy expression that it stands for.
        architecture: what is known of its model, or None.
        recipe: how it is made, if a recipe says so; it goes into what is saved.
        card: the model card of a folder it is saved to.

    >>> checkpoint = open_checkpoint({"weight": torch.ones(2, 3)})
    >>> checkpoint.specs["weight"].shape
    (2, 3)
    >>> checkpoint["weight"].sum()
    tensor(6.)
    """

    def __init__(self, form: LinearForm, architecture: Architecture | None = None) -> None:
        self.form = form
        self.architecture = architecture
        self.recipe: dict[str, Any] | None = None
        self.card: str | None = None

    @property
    def source(self) -> Source:
        """The one place that the weights are in.

        Raises:
            CheckpointError: if they are an expression that isn't computed yet.
        """
        if self.form.base is None or self.form.sources != [self.form.base]:
            raise CheckpointError(
                f"{self.ref} is an expression over {len(self.form.sources)} checkpoints; save it first"
            )
        return self.form.base

    @property
    def ref(self) -> str:
        """What it is called in messages."""
        return " + ".join(source.ref for source in self.form.sources)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the weights, or the expression that gives them; see `Source.fingerprint`."""
        return fingerprint(self.form)

    def __repr__(self) -> str:
        size = sum(spec.nbytes for spec in self.specs.values())
        return f"Checkpoint({self.ref!r}, {len(self)} tensors, {size / 1e6:.1f} MB)"

    def to(self, dtype: torch.dtype) -> Checkpoint:
        """The same weights with floating-point tensors in another dtype, cast when they are read."""
        return self.as_of(
            self.form.to(dtype), self.architecture.in_dtype(dtype) if self.architecture else None
        )

    def as_of(self, form: LinearForm, architecture: Architecture | None) -> Checkpoint:
        """What this is made of and says, with another form or of another architecture."""
        other = Checkpoint(form, architecture)
        other.recipe, other.card = self.recipe, self.card
        return other

    def state_dict(
        self,
        *,
        like: Mapping[str, torch.Tensor] | None = None,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> dict[str, torch.Tensor]:
        """All tensors in memory, on the devices of ``like`` or on CPU; tied names share one tensor.

        Raises:
            NonfiniteError: if a tensor holds NaN or Inf and ``on_nonfinite="error"``.
        """
        tensors = allocate(self.form, like)
        materialize(self.form, tensors, on_nonfinite=on_nonfinite)
        return tensors

    def load_into(self, module: nn.Module, *, strict: bool = True) -> nn.Module:
        """Fill a module's parameters and buffers, in its own dtypes and on its device.

        Raises:
            MismatchError: if names or shapes differ (names: unless ``strict=False``).
        """
        load_into(self.form, module, strict=strict)
        return module

    def model(self) -> nn.Module:
        """The model itself, in evaluation mode, on CPU.

        Raises:
            CheckpointError: if nothing says what its architecture is.
        """
        module = self.known_architecture().build()
        names = LinearForm.of(memory.MemorySource(module.state_dict(), self.ref))
        load_into(rename_to_match(self.form, names), module, on_nonfinite="warn")
        return module

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        """What turns a PIL image into the model's input."""
        return self.known_architecture().preprocess()

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        """What turns texts into the model's input."""
        return self.known_architecture().tokenizer()

    def known_architecture(self) -> Architecture:
        """Return the architecture.

        Raises:
            CheckpointError: if nothing says which model the weights are of.
        """
        if self.architecture is None:
            raise CheckpointError(
                f"{self.ref} holds weights but doesn't say of what model",
                hint="name a folder with a configuration beside the weights, or base=; load_into(module) fills a module",
            )
        return self.architecture

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        dtype: torch.dtype | None = None,
        max_shard_size: int | None = None,
        on_nonfinite: OnNonfinite = "warn",
        resume: bool = False,
        ranks: Ranks = ONE_RANK,
        device: str = "cpu",
    ) -> Path:
        """Write it out: one safetensors file if ``path`` ends so, else a folder that loads where the base did.

        The metadata say what it was computed from. The output appears whole or not at all.

        Args:
            path: where to.
            overwrite: replace what is there; it stays until the new one is complete.
            dtype: of the tensors that can be edited; their own by default.
            max_shard_size: bytes of tensors a file; in a folder only.
            on_nonfinite: what to do about NaN and Inf in the result: "ignore", "warn" or "error".
            resume: go on from where a killed process of the same job stopped; the result is the same to the byte.
            ranks: the processes that share the work and a file system; each must call this.
            device: where to compute: "cpu", "cuda", ... The tensors go there chunk by chunk.

        Raises:
            OutputError: if ``path`` exists, or can't be written.
            OptionError: if there is no such device, or ``path`` isn't what weightops writes.
            NonfiniteError: naming the tensors, if asked for.
        """
        path = Path(path)
        single = path.suffix == ".safetensors"
        if single and max_shard_size is not None:
            raise OptionError(f"{path} is one file; give a folder to write shards to")
        if path.suffix in _OTHER_SUFFIXES:
            raise OptionError(
                f"{path} has the suffix of another format: weightops writes .safetensors files, and folders"
            )
        stage = resumable_output(path, single=single, overwrite=overwrite, resume=resume)
        with stage if ranks.first else nullcontext(stage_of(path)) as folder:
            if single:
                self._write(
                    folder,
                    path.name,
                    dtype=dtype,
                    on_nonfinite=on_nonfinite,
                    ranks=ranks,
                    device=device,
                )
            else:
                self.save_into(
                    folder,
                    final=path,
                    dtype=dtype,
                    max_shard_size=max_shard_size,
                    on_nonfinite=on_nonfinite,
                    ranks=ranks,
                    device=device,
                )
        return path

    def save_into(self, folder: Path, *, final: Path, **options: Unpack[_Write]) -> None:
        """Write into a folder that is being made and will be known as ``final``; see `save`."""
        dtype = options.pop("dtype", None)
        if dtype:
            self.to(dtype).save_into(folder, final=final, **options)
            return
        if options.get("ranks", ONE_RANK).first:
            if self.architecture:
                self.architecture.write(folder, final)
            if self.card:
                (folder / "README.md").write_text(self.card, encoding="utf-8")
        self._write(folder, self.weights_file, **options)

    @property
    def weights_file(self) -> str:
        """What the file of weights in a folder is called."""
        return self.architecture.weights_file if self.architecture else "model.safetensors"

    def estimate(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | None = None,
    ) -> Estimate:
        """What `save` would take: bytes, memory and disk, from headers alone."""
        cast = self.to(dtype) if dtype else self
        return estimate(cast.form, cast._layout(self.weights_file, max_shard_size), Path(path))

    def _layout(self, filename: str, max_shard_size: int | None) -> list[FileLayout]:
        made_from = {**({"recipe": self.recipe} if self.recipe else {}), **provenance(self.form)}
        metadata = {"format": "pt", "weightops": json.dumps(made_from)}
        return layout(self.form, filename, metadata, max_shard_size=max_shard_size)

    def _write(
        self,
        folder: Path,
        filename: str,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | None = None,
        on_nonfinite: OnNonfinite = "warn",
        ranks: Ranks = ONE_RANK,
        device: str = "cpu",
    ) -> None:
        cast = self.to(dtype) if dtype else self
        files = cast._layout(filename, max_shard_size)
        write(
            cast.form,
            folder,
            files,
            on_nonfinite=on_nonfinite,
            ranks=ranks,
            device=pick_device(device),
        )


def load_into(
    form: LinearForm,
    module: nn.Module,
    *,
    strict: bool | None = True,
    on_nonfinite: OnNonfinite = "ignore",
) -> None:
    """Evaluate a form into a module's own tensors.

    Names that only one of them has are an error; with ``strict=False`` they are left, and named in a warning; with None
    they are left.

    Raises:
        MismatchError: if shapes differ, or names do and ``strict`` is True.
        CheckpointError: if the module's own tensors take part in the form: they change while it is computed.
    """
    targets = module.state_dict(keep_vars=True)
    shapes = [
        f"{n} {form.specs[n].shape} / {tuple(t.shape)}"
        for n, t in targets.items()
        if n in form.specs and form.specs[n].shape != tuple(t.shape)
    ]
    filled = {id(t) for n, t in targets.items() if n in form.specs}  # of tied names, one is enough
    missing = [n for n, t in targets.items() if id(t) not in filled]
    extra = [n for n in form.specs if n not in targets]
    if shapes or (strict and (missing or extra)):
        remedy = "load into the architecture that the weights are of" + (
            "" if shapes else ", or with strict=False"
        )
        differences = {
            "only in the checkpoint": extra,
            "only in the module": missing,
            "of other shape": shapes,
        }
        raise mismatch(f"{describe(form)} and {type(module).__name__}", differences, remedy)
    if any(
        isinstance(source, memory.MemorySource) and source.shares_memory_with(targets)
        for source in form.sources
    ):
        raise CheckpointError(
            f"{type(module).__name__}'s own tensors take part in what it is to be filled with, and would change under "
            "the computation; copy the module first (copy.deepcopy)"
        )
    if strict is False and (missing or extra):
        log.warning(
            "left as they are, as only one of module and checkpoint has them: %s",
            first_few(missing + extra),
        )
    materialize(
        form, {n: t for n, t in targets.items() if n in form.specs}, on_nonfinite=on_nonfinite
    )
