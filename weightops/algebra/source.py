"""Sources: named tensors in one place, such as a file, whose data are read when they are needed."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, NamedTuple, TypeAlias

from typing_extensions import Self

from weightops.algebra.dtypes import ITEM_SIZES, dtype_of, is_editable, name_of
from weightops.algebra.scratch import Scratch, Slot
from weightops.errors import CheckpointError
from weightops.support.input_files import InputFile
from weightops.support.lazy import torch
from weightops.support.text import portable

Factors: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""Two matrices, of shapes ``(m, r)`` and ``(r, n)``, whose product is one of shape ``(m, n)``."""

LINEARIZED = "linearized_at"
"""The entry of a provenance record that says what base a model is linearised at."""

Space = Literal["weights", "delta"]
"""Weights are affine (their coefficients sum to 1); deltas are differences of weights (0)."""


class _Spec(NamedTuple):
    shape: tuple[int, ...]
    dtype_name: str


class Spec(_Spec):
    """The shape and dtype of a tensor that need not be in memory.

    Args:
        shape: the shape.
        dtype: the dtype, or its short name, which needs no torch.
    """

    __slots__ = ()

    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype | str) -> Self:
        return super().__new__(cls, shape, name_of(dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype."""
        return dtype_of(self.dtype_name)

    @property
    def itemsize(self) -> int:
        """The bytes of one element."""
        return ITEM_SIZES[self.dtype_name]

    @property
    def is_editable(self) -> bool:
        """Whether it is of the dtypes of weights; others are copied from the base."""
        return is_editable(self.dtype_name)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.numel * self.itemsize


def flattened(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without gradient and with one dimension; it shares contiguous memory."""
    return tensor.detach().reshape(-1) if tensor.requires_grad or tensor.dim() != 1 else tensor


def cut(flat: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return elements ``start`` to ``stop`` of a flat tensor; without a slice if these are all."""
    return flat if stop - start == flat.numel() else flat[start:stop]


def read_flat(file: InputFile, begin: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Return elements of a file, from a byte on, in memory of their own."""
    with torch.inference_mode(False):
        flat = torch.empty(numel, dtype=dtype)
    file.read_into(flat.view(torch.uint8).numpy().data, begin)
    return flat


class Source(ABC):
    """Named tensors in one place. Their specs are known at once, their data are read when needed.

    Attributes:
        ref: the name of the place in messages and provenance.
        specs: name -> shape and dtype, in the order of the place.
        ties: alias -> name of the tensor that it shares; aliases are in ``specs`` too.
        space: "weights" or "delta".
        made_from: the provenance record that weightops wrote into the file; empty if there is none.
        metadata: the texts that others wrote into the file beside its tensors.
        skipped: the names of entries that aren't tensors.
        keys: the keys of the dictionaries of weights in the file, the one that is opened first.
        computed: True if each tensor is computed when it is opened, so that it is opened once.
        identity: equal for two sources only if they are one place in one state; None if unknown.
        files: the files that are read, in the state in which they were opened.
        opener: opens the same place again; None if the source isn't one place that can be named.
            Such a source is copied and pickled as its opener and fingerprint, without tensors.
    """

    ref: str
    specs: Mapping[str, Spec]
    ties: Mapping[str, str]
    space: Space = "weights"
    made_from: Mapping[str, Any] = {}
    metadata: Mapping[str, str] = {}
    skipped: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    computed: bool = False
    identity: object = None
    files: Sequence[InputFile] = ()
    opener: Callable[[], Source] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.opener is None:
            return super().__reduce_ex__(protocol)
        return opened_again, (self.opener, self.ref, self.fingerprint, self.specs)

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, read from its file or shared with its owner: never write to it."""

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        """Return a function that returns elements ``start`` to ``stop`` of the flat tensor.

        It must be called in rising order. The elements may be in a buffer of ``scratch`` that the
        next call overwrites.
        """
        flat = flattened(self.read(name))
        return lambda start, stop: cut(flat, start, stop)

    def read_run(self, names: Sequence[str], scratch: Scratch) -> torch.Tensor:
        """Return tensors of one dtype, one after another in a flat buffer of ``scratch``."""
        specs = [self.specs[name] for name in names]
        numel = sum(spec.numel for spec in specs)
        run = scratch.get(Slot.ROWS, numel, specs[0].dtype, torch.device("cpu"))
        start = 0
        for name, spec in zip(names, specs, strict=True):
            run[start : start + spec.numel] = self.open(name, scratch)(0, spec.numel)
            start += spec.numel
        return run

    def elements(self, name: str) -> Callable[[int, int], torch.Tensor]:
        """Return a function that returns elements of a tensor, and reads no others from a file.

        What is computed is computed as a whole, whose bits may not be those of parts.
        """
        if self.computed:
            flat = flattened(self.read(name))
            return lambda start, stop: cut(flat, start, stop)
        return self.open(name, Scratch())

    def samples(self, names: Iterable[str]) -> Iterator[bytes]:
        """Yield for each tensor 16 evenly spaced blocks of at most 1 KiB of its bytes."""
        for name in names:
            spec, parts = self.specs[name], self.elements(name)
            whole = spec.nbytes <= SAMPLED_WHOLE
            blocks = [(0, spec.numel)] if whole else sample_blocks(spec.numel, spec.itemsize)
            yield b"".join(_bytes(parts(start, start + size)) for start, size in blocks)

    def combination(self, name: str, scratch: Scratch) -> Mapping[Source, float] | None:
        """Return source -> coefficient if a tensor is a linear combination of sources, else None.

        The engine then computes the combination in one pass with the terms around it.
        """
        return None

    def rank(self, name: str) -> int | None:
        """Return r if a matrix is kept as a product of two with r columns and rows, else None."""
        return None

    def factors(self, name: str) -> Factors:
        """Return the two matrices whose product a matrix is, for one that has a `rank`."""
        raise NotImplementedError

    @property
    def leaves(self) -> list[Source]:
        """The places that are read: the source itself, unless it is computed."""
        return [self]

    def working_bytes(self, name: str) -> int:
        """Return the most bytes of memory that opening a tensor takes: 0 if read in pieces."""
        return 0

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the weights, in their dtype; see `sample_fingerprint`."""
        return self.sample_fingerprint()

    def sample_fingerprint(self) -> str:
        """Return 16 hex digits from a sample of the weights.

        SHA-256 over every tensor's name, dtype, shape and 16 evenly spaced blocks of at most 1 KiB
        of its data. The same numbers in another dtype have another fingerprint. Of matrices with
        one content only one name counts, as tied weights are stored once or twice. It distinguishes
        checkpoints at the cost of reading a few megabytes. It doesn't prove that two are equal
        (`same_bits.same_weights` does), nor who made them.
        """
        known = self._known_copies()
        digest, copies = self._digest(self.specs.keys() - known)
        return self._digest(self.specs.keys() - known - copies)[0] if copies else digest

    def _known_copies(self) -> set[str]:
        """Return the tied names that don't count for the fingerprint."""
        tied = [n for n, owner in self.ties.items() if owner in self.specs]
        tied = [name for name in tied if len(self.specs[name].shape) > 1]
        pairs = zip(tied, self.samples(tied), strict=True)
        return {name for name, s in pairs if _varies(s, self.specs[name].itemsize)}

    def _digest(self, names: Iterable[str]) -> tuple[str, set[str]]:
        """Return the digest of the samples of some tensors, and the names of copies of others."""
        digest = sha256()
        alike: dict[tuple[Spec, bytes], list[str]] = defaultdict(list)
        ordered = sorted(names)
        for name, sample in zip(ordered, self.samples(ordered), strict=True):
            spec = self.specs[name]
            if len(spec.shape) > 1 and _varies(sample, spec.itemsize):
                alike[spec, sha256(sample).digest()].append(name)
            digest.update(f"{name}\0{spec.dtype_name}\0{spec.shape}\0".encode())
            digest.update(sample)
        copies: set[str] = set()
        for twins in alike.values():
            # Libraries name tied weights after the embeddings.
            owner = min(twins, key=lambda n: (n in self.ties, not _EMBEDDING.search(n), n))
            copies |= {*twins} - {owner}
        return digest.hexdigest()[:16], copies

    @cached_property
    def linearized_at(self) -> Mapping[str, str] | None:
        """The ref and fingerprint of the base that these are a linearised model's weights at."""
        return _recorded(self.made_from)

    def describe(self) -> dict[str, object]:
        """Return the description of this source in the metadata of its derivatives."""
        own = {"ref": portable(self.ref), "fingerprint": self.fingerprint}
        return {**own, LINEARIZED: dict(self.linearized_at)} if self.linearized_at else {**own}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.ref!r}, {len(self.specs)} tensors)"


def opened_again(
    opener: Callable[[], Source], ref: str, fingerprint: str, specs: Mapping[str, Spec]
) -> Source:
    """Open a source that was pickled.

    Raises:
        CheckpointError: if its place can't be opened, or holds other weights now.
    """
    source = opener()
    if source.fingerprint != fingerprint or dict(source.specs) != dict(specs):
        raise CheckpointError(
            f"{ref} has changed since it was pickled: its fingerprint is {source.fingerprint}, "
            f"and was {fingerprint}",
            hint="open it again to take it as it is now",
        )
    source.ref = ref
    return source


class ComputedSource(Source):
    """A source whose tensors are computed when they are opened."""

    computed = True

    @abstractmethod
    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]: ...

    def read(self, name: str) -> torch.Tensor:
        spec = self.specs[name]
        return self.open(name, Scratch())(0, spec.numel).reshape(spec.shape)


class ExpressionSource(ComputedSource):
    """A computed source whose fingerprint is that of its description, not of its results."""

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the expression, as its result isn't computed yet."""
        return record_fingerprint(self.describe())


def record_fingerprint(record: Mapping[str, object]) -> str:
    """Return 16 hex digits that identify the description of an expression."""
    return sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _recorded(record: object) -> Mapping[str, str] | None:
    """Return the first entry of a provenance record that says where weights are linearised at."""
    if isinstance(record, Mapping):
        own = record.get(LINEARIZED)
        keys = ("ref", "fingerprint")
        if isinstance(own, Mapping) and all(isinstance(own.get(key), str) for key in keys):
            return {key: own[key] for key in keys}
    parts = record.values() if isinstance(record, Mapping) else record
    if isinstance(parts, str) or not isinstance(parts, Iterable):
        return None
    return next((found for found in map(_recorded, parts) if found), None)


_EMBEDDING = re.compile(r"embed|wte|shared")


SAMPLED_WHOLE = 16 * 1024
"""Bytes up to which the blocks of a sample are the whole tensor."""


def sample_blocks(numel: int, width: int) -> list[tuple[int, int]]:
    """Return the start and length of 16 evenly spaced blocks of at most 1 KiB, in elements.

    >>> sample_blocks(3000, 2)
    [(0, 512), (512, 512), (1024, 512), (1536, 512), (2048, 512), (2560, 440)]
    """
    block = 1024 // width
    step = max(block, -(-numel // 16))
    return [(start, min(block, numel - start)) for start in range(0, numel, step)]


def _bytes(flat: torch.Tensor) -> bytes:
    return flat.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _varies(sample: bytes, width: int) -> bool:
    """Return whether the elements of a sample differ, unlike zeros."""
    return sample != sample[:width] * (len(sample) // width)
