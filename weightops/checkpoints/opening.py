"""Open weights from files, folders, refs, state dicts and modules; the table of file formats."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ForwardRef, NamedTuple, TypeAlias, Union

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.source import Source
from weightops.checkpoints import refs
from weightops.checkpoints.adapters import bare
from weightops.checkpoints.adapters import folder as adapters
from weightops.checkpoints.adapters.adapter import Adapter
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.folders import (
    PIPELINE,
    USUAL_NAMES,
    Formats,
    find_weights,
    has_usual_name,
    inner_weights,
)
from weightops.checkpoints.formats import (
    distributed,
    numbered,
    parts,
    safetensors,
    shards,
    torch_stream,
    torch_tar,
    torch_zip,
)
from weightops.checkpoints.formats.memory import MemorySource
from weightops.checkpoints.kinds import not_weights, unrecognised
from weightops.checkpoints.libraries.base import Architecture
from weightops.checkpoints.libraries.other_folder import OtherFolder, PipelineFolder, written_name
from weightops.checkpoints.libraries.table import architecture_of
from weightops.checkpoints.quantised import DEQUANTIZED, dequantise, is_quantised
from weightops.checkpoints.renamed import with_prefix
from weightops.errors import CheckpointError, SpaceError
from weightops.support.collector import uncollected
from weightops.support.lazy import nn, torch
from weightops.support.registry import Registry
from weightops.support.text import first_few

log = logging.getLogger("weightops")

EMBEDDED = "embedded"
"""The ref of the small CLIP model that comes with weightops."""

if TYPE_CHECKING:
    CheckpointLike: TypeAlias = str | Path | Checkpoint | Mapping[str, torch.Tensor] | nn.Module
else:
    _tensor = ForwardRef("torch.Tensor", module=__name__)
    _module = ForwardRef("nn.Module", module=__name__)  # looked up by who asks for the type
    CheckpointLike = Union[str, Path, Checkpoint, Mapping[str, _tensor], _module]  # noqa: UP007
"""Everything that `open_checkpoint` opens."""


class Format(NamedTuple):
    """A kind of weights file.

    Attributes:
        recognises: returns whether a file is of this format, from its content.
        open: returns the tensors of such a file. Nothing in the file may be executed.
        order: formats are asked for a file from the lowest order to the highest.
    """

    recognises: Callable[[Path], bool]
    open: Callable[[Path], Source]
    order: float = 100


FORMATS: Registry[Format] = Registry(
    "checkpoint format",
    "formats",
    {
        "safetensors": Format(safetensors.recognises, parts.open_whole, 10),
        "index": Format(shards.recognises, lambda path: shards.open_index(path, _open_file), 20),
        "adapter": Format(
            adapters.recognises, lambda path: adapters.open_adapter(path, _open_file), 30
        ),
        "distributed checkpoint": Format(distributed.recognises, distributed.open_folder, 40),
        "torch zip": Format(torch_zip.recognises, torch_zip.open_file, 50),
        "torch stream": Format(torch_stream.recognises, torch_stream.open_file, 60),
        "torch tar": Format(torch_tar.recognises, torch_tar.open_file, 70),
    },
)
"""Name -> format. An index may be JSON that an adapter's reader takes too, so the order counts."""


def register_format(
    name: str,
    *,
    recognises: Callable[[Path], bool],
    open: Callable[[Path], Source],
    order: float = 100,
) -> None:
    r"""Register a kind of weights file for this session.

    A package registers its formats with entry points in the group ``weightops.formats``.

    >>> import numpy, tempfile
    >>> from weightops.checkpoints.formats.memory import MemorySource
    >>> def is_npy(path):
    ...     with open(path, "rb") as stream:
    ...         return stream.read(6) == b"\x93NUMPY"
    >>> def open_npy(path):
    ...     return MemorySource({"weight": torch.from_numpy(numpy.load(path))}, str(path))
    >>> register_format("npy", recognises=is_npy, open=open_npy)
    >>> file = Path(tempfile.mkdtemp(), "weights.npy")
    >>> numpy.save(file, numpy.ones(3, dtype=numpy.float32))
    >>> open_checkpoint(file)["weight"]
    tensor([1., 1., 1.])

    Args:
        name: the name of the format in messages.
        recognises: returns whether a file is of this format, from its content, never its suffix.
        open: returns the tensors of such a file. Nothing in the file may be executed.
        order: the place of the format among the others. The built-in formats are asked for a file
            first, from 10 (safetensors) to 70; a lower order precedes them.

    Raises:
        OptionError: if there is a format of this name.
    """
    FORMATS.register(name, Format(recognises, open, order))


def open_checkpoint(source: CheckpointLike) -> Checkpoint:
    """Open weights. The content of a file shows its format; nothing in the file is executed.

    Args:
        source: ``"embedded"``; a file; a dictionary within a torch file, by its key
            (``last.ckpt:state_dict_ema``); a folder (one file, shards with an index, a distributed
            checkpoint, a directory of open_clip, transformers or timm); a ref (``org/name``,
            ``open_clip:model/tag``, ``timm:name``); a ``dict[str, Tensor]``; an ``nn.Module``; or
            a `Checkpoint`. Tensors in memory are referred to, not copied. ``dequantized:`` before a
            path or ref gives its quantised weights in bfloat16 (MXFP4, float8, bitsandbytes, GPTQ,
            AWQ, compressed-tensors).

    Raises:
        CheckpointError: naming the file and what is wrong with it.
        SpaceError: if ``source`` holds a task vector.
    """
    opened = open_any(source)
    if opened.form.space == "delta":
        raise SpaceError(
            f"{opened.ref} holds {_kind_of_delta(opened)}, not weights",
            hint="`weightops apply`, or TaskVector.apply, puts it on a base; where there is base=, "
            "name the base there",
        )
    return opened


def as_dequantised(ref: str) -> str:
    """Return a ref with ``dequantized:`` before it if it holds quantised weights; else as it is.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    is_one = not ref.startswith(DEQUANTIZED) and is_quantised(open_any(ref))
    return f"{DEQUANTIZED}{ref}" if is_one else ref


def _kind_of_delta(opened: Checkpoint) -> str:
    is_adapter = any(isinstance(source, Adapter) for source in opened.form.sources)
    return "an adapter" if is_adapter else "a task vector"


def open_any(source: CheckpointLike) -> Checkpoint:
    """Open weights or a stored delta (a saved task vector or an adapter); see `open_checkpoint`.

    Raises:
        CheckpointError: as `open_checkpoint`.
        SpaceError: if ``source`` is a `TaskVector`.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, (str, Path)):
        opened = open_ref(source)
        # Half precision is only how the embedded model is stored.
        return opened.to("float32") if source == EMBEDDED else opened
    if isinstance(source, nn.Module):
        tensors, name = source.state_dict(), type(source).__name__
        bare.check_no_halves(tensors, name)
        return Checkpoint(LinearForm.of(MemorySource(tensors, name)), module=source)
    if isinstance(getattr(source, "form", None), LinearForm):
        raise SpaceError(
            "a task vector was given where weights are needed", hint="apply it to a base first"
        )
    if not isinstance(source, Mapping):
        raise not_weights(source)
    in_memory = MemorySource(source, "a state dict")
    return Checkpoint(LinearForm.of(bare.opened(in_memory, in_memory.ref)))


@uncollected()
def open_ref(ref: str | Path) -> Checkpoint:
    """Open the file or folder that a path or ref names, in its own dtypes, weights or a delta.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    opened, place = _open_place(ref)
    opened.form.sources[0].opener = partial(_source_of, place)
    return opened


def _source_of(place: str) -> Source:
    return open_ref(place).form.sources[0]


def _open_place(ref: str | Path) -> tuple[Checkpoint, str]:
    """Open what a path or ref names; return with it what names it from any working folder."""
    if str(ref).startswith(DEQUANTIZED):
        stored, place = _open_place(str(ref).removeprefix(DEQUANTIZED))
        return dequantise(stored), DEQUANTIZED + place
    if ref == EMBEDDED:
        opened, _ = _open_place(Path(__file__).parent.parent / "clip")
        opened.source.ref = EMBEDDED
        return opened, EMBEDDED
    path, fetched = Path(ref), None
    place, _, key = str(ref).rpartition(":")
    if not path.exists() and place and Path(place).is_file():
        at_key = Checkpoint(LinearForm.of(_open_at_key(Path(place), key)))
        return at_key, str(path.absolute())
    if not path.exists():
        fetched = refs.fetch_ref(str(ref), USUAL_NAMES)
        if fetched is None:
            raise refs.nothing_at(
                str(ref),
                f"{EMBEDDED!r} is the model that comes with weightops, "
                f"{ref}@main would be one of the Hugging Face Hub",
            )
        path = fetched.path
    try:
        if path.is_dir():
            source, architecture = _open_folder(path)
        else:
            source, architecture = _open_file(bare.folder_of(path) or path), None
            if shard := numbered.shard_of(path):
                log.warning(
                    "%s is %d of %d shards of a model", path, shard.number, len(shard.names)
                )
        source = bare.opened(source, str(path))
        architecture = fetched.architecture if fetched and fetched.architecture else architecture
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    _check_gathered(source)
    if fetched or path.is_dir():
        source.ref = fetched.ref if fetched else str(path)
    opened = Checkpoint(LinearForm.of(source), architecture)
    return opened, fetched.ref if fetched else str(path.absolute())


def _open_folder(folder: Path) -> tuple[Source, Architecture | None]:
    """Open the weights in a folder, and in those within it that the model is made of."""
    formats = Formats(lambda file: _format_of(file) is not None, _open_file)
    inner = inner_weights(folder, formats)
    is_pipeline = (folder / PIPELINE).is_file() and bool(inner)
    own = None if is_pipeline else find_weights(folder, formats)
    if own is None and not inner:
        below = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and has_usual_name(p)]
        raise CheckpointError(
            f"{folder} holds no file of weights ({', '.join(FORMATS)})",
            hint=f"its folders hold some: {first_few(below)}" if below else "",
        )
    if is_pipeline and (beside := [path.name for path in folder.glob("*.safetensors")]):
        log.warning("%s: the pipeline is opened, not %s", folder, first_few(beside))
    architecture = PipelineFolder(folder) if is_pipeline else architecture_of(folder)
    architecture = architecture or OtherFolder.recognise(folder)
    if own and isinstance(architecture, OtherFolder):
        architecture.weights_file = written_name(own.file)
    if architecture is not None:
        architecture.parts = {
            prefix: (found.folder.relative_to(folder) / written_name(found.file)).as_posix()
            for prefix, found in inner.items()
        }
    sources = [with_prefix(found.source, prefix) for prefix, found in inner.items()]
    sources = [own.source, *sources] if own else sources
    whole = sources[0] if own and not inner else shards.ShardedSource(sources, str(folder), {})
    return whole, architecture


def _open_file(file: Path) -> Source:
    return _known_format(file).open(file)


def _check_gathered(source: Source) -> None:
    """Refuse weights whose tensors are empty, as each process of DeepSpeed's ZeRO-3 has them."""
    weights = [(name, spec) for name, spec in source.specs.items() if spec.is_editable]
    empty = [name for name, spec in weights if spec.shape == (0,)]
    if 2 * len(empty) > len(weights):
        raise CheckpointError(
            f"{source.ref} holds {len(empty)} empty tensors: {first_few(empty)}; "
            "it was saved under DeepSpeed's ZeRO-3 without gathering the weights",
            hint="`python zero_to_fp32.py CHECKPOINT_FOLDER OUT`, which DeepSpeed puts beside its "
            "checkpoints, gathers them; or save with stage3_gather_16bit_weights_on_model_save",
        )


def _open_at_key(file: Path, key: str) -> Source:
    """Open the dictionary of weights at a key of a torch file."""
    format_ = _known_format(file)
    if "key" not in inspect.signature(format_.open).parameters:
        raise CheckpointError(
            f"{file} holds one set of tensors, and so no key {key!r}", hint=f"name {file} alone"
        )
    open_at: Any = format_.open
    source: Source = open_at(file, key)
    return source


def _known_format(file: Path) -> Format:
    """Return the format of a file that holds whole tensors."""
    format_ = _format_of(file)
    if format_ is None:
        raise unrecognised(file, FORMATS)
    numbered.check_no_slice(file)
    return format_


def _format_of(file: Path) -> Format | None:
    by_order = sorted(FORMATS.values(), key=lambda format_: format_.order)
    return next((format_ for format_ in by_order if format_.recognises(file)), None)
