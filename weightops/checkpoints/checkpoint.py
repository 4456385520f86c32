"""`Checkpoint`: weights from anywhere, as a lazy mapping of names to tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import nn
from typing_extensions import Unpack

from weightops.checkpoints import memory, safetensors_files, torch_files
from weightops.checkpoints.open_clip_folder import CONFIG, OpenClipArchitecture
from weightops.engine.run import OnNonfinite, allocate, materialize
from weightops.engine.write import layout, write
from weightops.errors import CheckpointError
from weightops.expression import LinearForm, Source, Spec, provenance
from weightops.files import whole
from weightops.keys import mismatch
from weightops.registry import Registry

log = logging.getLogger("weightops")

EMBEDDED = "embedded"
"""The ref of the small CLIP model that comes with weightops."""


class Architecture(Protocol):
    """What a folder says of the model whose weights it holds."""

    folder: Path
    weights_file: str

    def build(self) -> nn.Module:
        """The module, with weights yet to be filled in."""

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        """PIL image -> tensor."""

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        """Texts -> token ids."""

    def write(self, folder: Path, final: Path) -> None:
        """Put all but the weights into ``folder``, which will be known as ``final``."""


class Format(NamedTuple):
    """A kind of file: how it is recognised by its content, and how it is opened."""

    recognises: Callable[[Path], bool]
    open: Callable[[Path], Source]


FORMATS: Registry[Format] = Registry(
    "checkpoint format",
    "formats",
    {
        "safetensors": Format(safetensors_files.recognises_file, safetensors_files.open_file),
        "safetensors index": Format(safetensors_files.recognises_index, safetensors_files.open_index),
        "torch zip": Format(torch_files.recognises, torch_files.open_file),
    },
)


class _Write(TypedDict, total=False):
    """Options of `Checkpoint.save`."""

    dtype: torch.dtype | None
    max_shard_size: int | None
    on_nonfinite: OnNonfinite


class Checkpoint(Mapping[str, torch.Tensor]):
    """Named tensors, read when asked for. Opening one reads headers only.

    Attributes:
        form: the lazy expression that it stands for.
        architecture: what is known of its model, or None.

    >>> checkpoint = open_checkpoint({"weight": torch.ones(2, 3)})
    >>> checkpoint.specs["weight"].shape
    (2, 3)
    >>> checkpoint["weight"].sum()
    tensor(6.)
    """

    def __init__(self, form: LinearForm, architecture: Architecture | None = None) -> None:
        self.form = form
        self.architecture = architecture

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Name -> shape and dtype."""
        return self.form.specs

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

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.form.specs:
            raise KeyError(name)
        part = self.form.part([name])
        out = allocate(part)
        materialize(part, out)
        return out[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.form.specs)

    def __len__(self) -> int:
        return len(self.form.specs)

    def __repr__(self) -> str:
        size = sum(spec.nbytes for spec in self.specs.values())
        return f"Checkpoint({self.ref!r}, {len(self)} tensors, {size / 1e6:.1f} MB)"

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def to(self, dtype: torch.dtype) -> Checkpoint:
        """The same weights with floating-point tensors in another dtype, cast when they are read."""
        return Checkpoint(self.form.to(dtype), self.architecture)

    def state_dict(self, *, on_nonfinite: OnNonfinite = "ignore") -> dict[str, torch.Tensor]:
        """All tensors in memory; tied names share one tensor.

        Raises:
            NonfiniteError: if a tensor holds NaN or Inf and ``on_nonfinite="error"``.
        """
        tensors = allocate(self.form)
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
        return self.load_into(self._architecture().build())

    def preprocess(self) -> Callable[[Any], torch.Tensor]:
        """What turns a PIL image into the model's input."""
        return self._architecture().preprocess()

    def tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        """What turns texts into the model's input."""
        return self._architecture().tokenizer()

    def _architecture(self) -> Architecture:
        if self.architecture is None:
            raise CheckpointError(
                f"{self.ref} holds weights but doesn't say of what model; use load_into(module), or a folder with {CONFIG}"
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
    ) -> Path:
        """Write it out: one safetensors file if ``path`` ends so, else a folder that loads where the base did.

        The metadata say what it was computed from. The output appears whole or not at all.

        Raises:
            OutputError: if ``path`` exists, or can't be written.
        """
        path = Path(path)
        with whole(path, overwrite=overwrite) as part:
            if path.suffix == ".safetensors":
                self._write(part.parent, part.name, dtype=dtype, on_nonfinite=on_nonfinite)
            else:
                part.mkdir()
                self.save_into(part, final=path, dtype=dtype, max_shard_size=max_shard_size, on_nonfinite=on_nonfinite)
        return path

    def save_into(self, folder: Path, *, final: Path, **options: Unpack[_Write]) -> None:
        """Write into a folder that is being made and will be known as ``final``; see `save`."""
        if self.architecture:
            self.architecture.write(folder, final)
        self._write(folder, self.architecture.weights_file if self.architecture else "model.safetensors", **options)

    def _write(
        self,
        folder: Path,
        filename: str,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | None = None,
        on_nonfinite: OnNonfinite = "warn",
    ) -> None:
        metadata = {"format": "pt", "weightops": json.dumps(provenance(self.form))}
        files = layout(self.form, filename, metadata, dtype=dtype, max_shard_size=max_shard_size)
        write(self.form, folder, files, dtype=dtype, on_nonfinite=on_nonfinite)


def open_checkpoint(source: CheckpointLike) -> Checkpoint:
    """Open weights from wherever they are: a path or ref, a state dict, a module, or a `Checkpoint`.

    A file's format is told by its content, never by its suffix; nothing in it is executed.

    Args:
        source: ``"embedded"``, a file, a folder (one file, shards with an index, or an open_clip directory), a
            ``dict[str, Tensor]`` or an ``nn.Module``. What is in memory is referred to, not copied.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        return Checkpoint(LinearForm.of(memory.from_module(source)))
    if isinstance(source, Mapping):
        return Checkpoint(LinearForm.of(memory.from_dict(source)))
    if source == EMBEDDED:
        return replace_ref(_open_path(Path(__file__).parent.parent / "clip"), EMBEDDED)
    return _open_path(Path(source))


CheckpointLike = str | Path | Checkpoint | Mapping[str, torch.Tensor] | nn.Module


def replace_ref(checkpoint: Checkpoint, ref: str) -> Checkpoint:
    """Call a checkpoint by another name in messages and provenance."""
    checkpoint.source.ref = ref
    return checkpoint


def _open_path(path: Path) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(
            f"there is no file or folder {path} (and no ref of that name; {EMBEDDED!r} is the model that comes with weightops)"
        )
    architecture = OpenClipArchitecture(path) if path.is_dir() and (path / CONFIG).is_file() else None
    file = _weights_in(path, architecture) if path.is_dir() else path
    try:
        found = next((form for form in FORMATS.values() if form.recognises(file)), None)
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}") from error
    if found is None:
        with open(file, "rb") as stream:
            head = stream.read(16)
        raise CheckpointError(
            f"{file} is not a checkpoint: it is none of {', '.join(FORMATS)}, and begins with {head!r}"
        )
    source = found.open(file)
    if file != path:
        source.ref = str(path)
    return Checkpoint(LinearForm.of(source), architecture)


def _weights_in(folder: Path, architecture: Architecture | None) -> Path:
    """The file of weights in a folder: the one its architecture names, else the one index, else the one file of weights."""
    if architecture is not None and (folder / architecture.weights_file).is_file():
        return folder / architecture.weights_file
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for suffixes in ((".safetensors.index.json",), (".safetensors",), (".bin", ".pt", ".pth", ".ckpt")):
        found = [path for path in files if path.name.endswith(suffixes)]
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"{folder} holds {len(found)} files of weights and no index: {', '.join(p.name for p in found[:4])}; name one of them"
            )
    raise CheckpointError(f"{folder} holds no file of weights (safetensors, .bin, .pt, .pth or .ckpt)")


def load_into(form: LinearForm, module: nn.Module, *, strict: bool = True) -> list[str]:
    """Evaluate a form into a module's own tensors; the names that were left as they were.

    Raises:
        MismatchError: if shapes differ, or names do and ``strict`` is True.
    """
    targets = module.state_dict(keep_vars=True)
    shapes = [
        f"{n} {tuple(form.specs[n].shape)} / {tuple(t.shape)}"
        for n, t in targets.items()
        if n in form.specs and form.specs[n].shape != tuple(t.shape)
    ]
    missing = [n for n in targets if n not in form.specs]
    extra = [n for n in form.specs if n not in targets]
    if shapes or (strict and (missing or extra)):
        remedy = "load into the architecture that the weights are of" + ("" if shapes else ", or with strict=False")
        differences = {"only in the checkpoint": extra, "only in the module": missing, "of other shape": shapes}
        raise mismatch(f"{' + '.join(s.ref for s in form.sources)} and {type(module).__name__}", differences, remedy)
    # A tensor that the checkpoint has as int and the module as float, or the reverse, is copied by torch's own rules.
    materialize(form, {n: t for n, t in targets.items() if n in form.specs})
    return missing
