"""Rename the tensors of a form to match another form.

The names may differ in prefixes of wrappers, in the library of a CLIP model, and in ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from threading import Lock

import torch

from weightops.algebra.linear_form import Factor, LinearForm, tied_names
from weightops.algebra.names import NameRules, escape, layer_of
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import Factors, Source, Spec, copy_of
from weightops.checkpoints.clip_names import COUNTERS, mappings, unwrapped
from weightops.checkpoints.conversion import Conversion, TensorMapping
from weightops.checkpoints.libraries.memory_names import MemoryNames
from weightops.errors import MismatchError
from weightops.support.text import first_few

_SIZE_BUFFERS = (
    "position_ids",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
    "masked_bias",
    "inv_freq",
)
"""Buffers that only state a size of the model; some libraries, and some versions, lack them."""


class Renamed(Source):
    """A source under other names, with some of its tensors transposed, stacked or divided.

    Conversions of several tensors run once for all of them: the last two results are kept.

    Args:
        source: the source of the tensors.
        mapped: new name -> how its tensor is obtained from the source's tensors.
        specs: the shapes of the new tensors.
    """

    def __init__(
        self, source: Source, mapped: Mapping[str, TensorMapping], specs: Mapping[str, Spec]
    ) -> None:
        self.source = source
        self.ref, self.space, self.skipped = source.ref, source.space, source.skipped
        self.files, self.linearized_at = source.files, source.linearized_at
        self.mapped = {
            name: mapping
            for name, mapping in mapped.items()
            if any(old in source.specs for old in mapping.names)
        }
        self.specs = {
            name: Spec(specs[name].shape, _first_spec(mapping, source.specs).dtype)
            for name, mapping in self.mapped.items()
        }
        self._converted: dict[Conversion, list[torch.Tensor]] = {}
        self._lock = Lock()
        self.computed = source.computed or any(m.kind != "copy" for m in self.mapped.values())
        self.ties = self._find_ties()
        self.identity = (
            None
            if source.identity is None
            else ("renamed", source.identity, tuple(self.mapped.items()))
        )

    def _find_ties(self) -> dict[str, str]:
        """Return alias -> name for the new names that are copies of one tensor of the source."""
        ties: dict[str, str] = {}
        owners: dict[str, str] = {}
        for name, mapping in self.mapped.items():
            if mapping.kind == "copy":
                old = mapping.names[0]
                owner = owners.setdefault(self.source.ties.get(old, old), name)
                if owner != name:
                    ties[name] = owner
        return ties

    def read(self, name: str) -> torch.Tensor:
        kind, names, index, conversion = self.mapped[name]
        if conversion is not None:
            return self._convert(conversion)[index]
        if kind == "stack":
            height, *rest = self.specs[name].shape
            zero = torch.zeros(1, dtype=self.specs[name].dtype).expand(height // len(names), *rest)
            return torch.cat(
                [self.source.read(old) if old in self.source.specs else zero for old in names]
            )
        tensor = self.source.read(names[0])
        if kind == "part":
            return tensor.chunk(3)[index]
        return tensor.T if kind == "transpose" else tensor

    def open(self, name: str, scratch: Scratch) -> Callable[[int, int], torch.Tensor]:
        mapping = self.mapped[name]
        if mapping.kind == "copy":
            return self.source.open(mapping.names[0], scratch)
        return super().open(name, scratch)

    def rank(self, name: str) -> int | None:
        mapping = self.mapped[name]
        is_one = mapping.kind in ("copy", "transpose") and mapping.conversion is None
        return self.source.rank(mapping.names[0]) if is_one else None

    def factors(self, name: str) -> Factors:
        left, right = self.source.factors(self.mapped[name].names[0])
        return (right.T, left.T) if self.mapped[name].kind == "transpose" else (left, right)

    def _convert(self, conversion: Conversion) -> list[torch.Tensor]:
        with self._lock:
            if conversion not in self._converted:
                dtype = next(
                    self.source.specs[name].dtype
                    for name in conversion.inputs
                    if name in self.source.specs
                )
                inputs = [
                    self.source.read(name)
                    if name in self.source.specs
                    else torch.zeros(1, dtype=dtype).expand(shape)
                    for name, shape in zip(conversion.inputs, conversion.shapes, strict=True)
                ]
                for oldest in list(self._converted)[:-1]:
                    del self._converted[oldest]
                self._converted[conversion] = conversion.run(inputs)
            return self._converted[conversion]

    @property
    def leaves(self) -> list[Source]:
        return [self] if self.source.leaves == [self.source] else self.source.leaves

    def working_bytes(self, name: str) -> int:
        mapping = self.mapped[name]
        itemsize = self.specs[name].dtype.itemsize
        converted = mapping.conversion.specs if mapping.conversion else ()
        read = (self.source.working_bytes(n) for n in mapping.names if n in self.source.specs)
        return itemsize * sum(spec.numel for spec in converted) + max(read, default=0)

    def describe(self) -> dict[str, object]:
        """Return the description of the source: other names don't change what it was made from."""
        return self.source.describe()


def rename_to_match(
    form: LinearForm, base: LinearForm, names: MemoryNames | None = None
) -> LinearForm:
    """Return a form in the names of a base, or the form itself where it can't be renamed.

    A form is renamed if each of its names has a counterpart in the base, or belongs to a buffer
    that only states a size. Of names that are tied in the base, the result has all.

    Args:
        form: the form.
        base: the form with the wanted names.
        names: the names in memory of the model that both are of, if they are known.
    """
    return _with_aliases(matched_names(form, base, names), tied_names(base))


def match_ties(form: LinearForm, base: LinearForm) -> LinearForm:
    """Return a form with the tied names that a base has, where one of them stores a copy.

    A file may store a tied matrix once, or a second time under its other name, such as
    ``lm_head.weight`` beside the embeddings: both are the same model. Only matrices outside of the
    numbered layers are tied.
    """
    extra = [name for name in form.specs if name not in base.specs]
    missing = [name for name in base.specs if name not in form.specs and not layer_of(name)]
    common = [name for name in form.specs if name in base.specs and not layer_of(name)]
    if extra and all(not layer_of(name) and _copied(form, name, common) for name in extra):
        form = form.part([name for name in form.specs if name in base.specs])
    tied, ties = tied_names(form), tied_names(base)
    copies = {
        alias: name
        for alias, name in ties.items()
        if alias in form.specs
        and name in form.specs
        and tied.get(alias, alias) != tied.get(name, name)
        and _copied(form, alias, [name])
    }
    if copies:
        form = renamed(form, {n: TensorMapping("copy", (copies.get(n, n),)) for n in form.specs})
    return _with_aliases(form, {n: other for n in missing if (other := _copied(base, n, common))})


def _copied(form: LinearForm, name: str, names: Iterable[str]) -> str | None:
    """Return the name of the matrix that a form holds another time under a name, or None."""
    sources = [source for source in form.sources if name in source.specs]
    if len(form.specs[name].shape) < 2 or not sources:
        return None
    found = {copy_of(source, name, names) for source in sources}
    other = found.pop() if len(found) == 1 else None
    if other is None or form.coefficients(name) != form.coefficients(other):
        return None  # what is added to one of the two makes them two
    return other


def _with_aliases(form: LinearForm, ties: Mapping[str, str]) -> LinearForm:
    """Return a form with further names of its tensors, of which some pairs have one."""
    aliases = {
        name: other
        for pair in ties.items()
        for name, other in (pair, pair[::-1])
        if other in form.specs and not any(name in source.specs for source in form.sources)
    }
    if not aliases:
        return form
    every = (*form.specs, *aliases)
    return renamed(
        form, {name: TensorMapping("copy", (aliases.get(name, name),)) for name in every}
    )


def matched_names(
    form: LinearForm, base: LinearForm, names: MemoryNames | None = None
) -> LinearForm:
    """Return a form in the names of a base, as `rename_to_match`, but without regard to ties."""
    if set(form.specs) <= set(base.specs):
        return form
    through = _through_memory(form, base, names) if names else None
    if through is not None:
        return through
    mapped = mappings(form.specs, base.specs, partly=form.space == "delta")
    return renamed(form, mapped) if mapped and not _unmapped(form, mapped) else form


def _through_memory(form: LinearForm, base: LinearForm, names: MemoryNames) -> LinearForm | None:
    """Return a form in the names of a base, by way of their model's names in memory, or None."""
    mine, theirs = _plain_names(form, names), _plain_names(base, names)
    if mine is None or theirs is None:
        return None
    loading = _loading(form, mine, names)
    in_memory = renamed(form, {**loading, **_same(form, base, loading)})
    enough = any if form.space == "delta" else all
    saving = {
        theirs[name]: mapping
        for name, mapping in names.saving({n: base.specs[old] for n, old in theirs.items()}).items()
        if enough(old in in_memory.specs for old in mapping.names)
    }
    saving |= _same(in_memory, base, saving)
    return None if _unmapped(in_memory, saving) else renamed(in_memory, saving)


def _plain_names(form: LinearForm, names: MemoryNames) -> dict[str, str] | None:
    """Return name -> a form's name, with or without wrappers' prefixes; None if some are lost."""
    for originals in ({name: name for name in form.specs}, unwrapped(form.specs)):
        mapped = _loading(form, originals, names)
        if not [name for name in _unmapped(form, mapped) if not names.is_ignored(name)]:
            return originals
    return None


def _loading(
    form: LinearForm, originals: Mapping[str, str], names: MemoryNames
) -> dict[str, TensorMapping]:
    """Return name in memory -> how its tensor is obtained from a form's tensors."""
    specs = {name: form.specs[old] for name, old in originals.items()}
    mapped = {}
    for name, mapping in names.loading(specs).items():
        olds = tuple(originals[old] for old in mapping.names)
        conversion = mapping.conversion and replace(mapping.conversion, inputs=olds)
        mapped[name] = mapping._replace(names=olds, conversion=conversion)
    return mapped


def _same(
    form: LinearForm, base: LinearForm, mapped: Mapping[str, TensorMapping]
) -> dict[str, TensorMapping]:
    """Return mappings of tensors that aren't mapped and have the same name in the base."""
    return {
        name: TensorMapping("copy", (name,))
        for name in _unmapped(form, mapped)
        if name in base.specs and name not in mapped
    }


def states_a_size(name: str, spec: Spec) -> bool:
    """Return whether a tensor is a buffer that only states a size of the model."""
    leaf = name.rpartition(".")[2]
    is_gpt2_mask = leaf == "bias" and len(spec.shape) == 4 and spec.shape[:2] == (1, 1)
    return leaf in _SIZE_BUFFERS or name in COUNTERS or is_gpt2_mask


def _unmapped(form: LinearForm, mapped: Mapping[str, TensorMapping]) -> list[str]:
    """Return the names of tensors that would be lost if only mapped tensors were kept."""
    tied = tied_names(form)
    used = {tied.get(old, old) for mapping in mapped.values() for old in mapping.names}
    return [
        name
        for name, spec in form.specs.items()
        if tied.get(name, name) not in used and not states_a_size(name, spec)
    ]


def _first_spec(mapping: TensorMapping, specs: Mapping[str, Spec]) -> Spec:
    return next(specs[old] for old in mapping.names if old in specs)


def _spec(mapping: TensorMapping, specs: Mapping[str, Spec]) -> Spec:
    """Return the spec of a new tensor."""
    shape, dtype = _first_spec(mapping, specs)
    if mapping.conversion is not None:
        return Spec(mapping.conversion.specs[mapping.part].shape, dtype)
    if mapping.kind == "transpose":
        shape = shape[::-1]
    elif mapping.kind == "stack" and shape:
        shape = (shape[0] * len(mapping.names), *shape[1:])
    elif mapping.kind == "part" and shape:
        shape = (shape[0] // 3, *shape[1:])
    return Spec(shape, dtype)


def renamed(form: LinearForm, mapped: Mapping[str, TensorMapping]) -> LinearForm:
    """Return the form of new tensors: new name -> how it is obtained from the form's tensors."""
    specs = {name: _spec(mapping, form.specs) for name, mapping in mapped.items()}
    sources = {source: Renamed(source, mapped, specs) for source in form.sources}
    terms: dict[Factor, float] = {}
    for factor, coefficient in form.terms.items():
        rules = tuple(_renamed_rules(rule, mapped, factor.source) for rule in factor.rules)
        terms[Factor(sources[factor.source], rules)] = coefficient
    return replace(form, specs=specs, terms=terms, base=sources[form.base] if form.base else None)


def _renamed_rules(
    rules: NameRules, mapped: Mapping[str, TensorMapping], source: Source
) -> NameRules:
    """Return rules on old names as rules on new names.

    Raises:
        MismatchError: if the rules differ within one new tensor.
    """
    items = []
    for name, mapping in mapped.items():
        values = {rules(old) for old in mapping.names if old in source.specs}
        if len(values) > 1:
            raise MismatchError(
                f"{first_few(mapping.names)} have different coefficients, "
                f"and are one tensor {name} in the other"
            )
        items += [(escape(name), value) for value in values]
    return NameRules(tuple(items))
