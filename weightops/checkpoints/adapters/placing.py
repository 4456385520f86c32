"""Find the modules of a base that an adapter was made on, though they have other names there."""

from __future__ import annotations

from collections.abc import Mapping

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.source import Source, Spec
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.conversion import Kind, TensorMapping
from weightops.checkpoints.renamed import Renamed, renamed
from weightops.checkpoints.renaming import matched_names
from weightops.errors import MismatchError
from weightops.support.lazy import nn
from weightops.support.text import first_few


def place(source: Source, base: Checkpoint, made_on: str | None) -> Source:
    """Return tensors of an adapter in the names of a base, or as they are if they aren't of it.

    The names may lack what the base puts before them; where several parts of the base fit, the
    class that the adapter was made on decides. Or they are those of a wrapper, of another
    library's CLIP, or of transformers in memory.

    Args:
        source: the tensors.
        base: the base.
        made_on: the class of the module that the adapter was made on, or None.

    Raises:
        MismatchError: if several parts of the base fit.
    """
    prefixes = _prefixes(source.specs, base.specs)
    if len(prefixes) == 1:
        return prefixed(source, prefixes[0])
    if not prefixes:
        matched = matched_names(LinearForm.of(source), base.form)
        if set(matched.specs) <= set(base.specs):
            return matched.sources[0]
    prefixes = _prefixes(source.specs, base.memory.specs)
    if len(prefixes) > 1 and base.skeleton is not None:
        part = f"{tower(base.skeleton, made_on)}."
        prefixes = [part] if part in prefixes else prefixes
    if len(prefixes) > 1:
        raise MismatchError(
            f"{source.ref} fits several parts of {base.ref}: {first_few(prefixes)}",
            hint="it was made on one of them: apply it to that part alone",
        )
    if not prefixes:
        return source
    named = prefixed(source, prefixes[0])
    return base.memory.in_files(named)


def tower(module: nn.Module, made_on: str | None) -> str:
    """Return the name of the one part of a module that is of a class; "" if there is no one."""
    if made_on is None or type(module).__name__ == made_on:
        return ""
    parts = [name for name, part in module.named_modules() if type(part).__name__ == made_on]
    return parts[0] if len(parts) == 1 else ""


def prefixed(source: Source, prefix: str) -> Source:
    """Return a source with a prefix before all names."""
    if not prefix:
        return source
    mapped = {prefix + name: TensorMapping("copy", (name,)) for name in source.specs}
    specs = {prefix + name: spec for name, spec in source.specs.items()}
    return Renamed(source, mapped, specs)


def _prefixes(specs: Mapping[str, Spec], base: Mapping[str, Spec]) -> list[str]:
    """Return what may stand before all names so that they are a base's, with shapes that fit.

    >>> spec = Spec((2, 3), None)
    >>> _prefixes({"q": spec}, {"image.q": spec, "text.q": spec, "image.v": spec})
    ['image.', 'text.']
    """
    if not specs:
        return [""]
    first = next(iter(specs))
    found = [name.removesuffix(first) for name in base if f".{name}".endswith(f".{first}")]
    return [
        prefix
        for prefix in (found if "" not in found else [""])
        if all(_fits(spec.shape, base.get(prefix + name)) for name, spec in specs.items())
    ]


def _fits(shape: tuple[int, ...], other: Spec | None) -> bool:
    """Return whether a delta's shape is another one's, perhaps transposed."""
    return other is not None and (other.shape == shape or other.shape == shape[::-1])


def oriented(delta: LinearForm, base: Checkpoint, *, transposed: bool) -> LinearForm:
    """Return an adapter's deltas with their matrices turned as the base keeps them.

    GPT-2's modules keep their weights transposed, and what an adapter says of that holds for one
    of its modules only. Shapes show it, but for square weights.

    Args:
        delta: the deltas, in the base's names.
        base: the base.
        transposed: whether the deltas are for modules that keep their weights transposed.

    Raises:
        MismatchError: if it isn't known for a square weight.
    """
    kinds: dict[str, Kind] = {}
    for name, spec in delta.specs.items():
        wanted = base.specs[name].shape if name in base.specs else spec.shape
        if name in base.specs and len(wanted) == 2 and wanted[0] == wanted[1]:
            turned = _keeps_transposed(name, base, transposed) != transposed
        else:
            turned = wanted != spec.shape and wanted == spec.shape[::-1]
        kinds[name] = "transpose" if turned else "copy"
    if "transpose" not in kinds.values():
        return delta
    return renamed(delta, {name: TensorMapping(kind, (name,)) for name, kind in kinds.items()})


def _keeps_transposed(name: str, base: Checkpoint, stated: bool) -> bool:
    """Return whether a base's module keeps its square weight as ``(in, out)``.

    Args:
        name: the name of the weight.
        base: the base.
        stated: what the adapter says, which counts where nothing in the base shows that it has
            modules of both kinds.
    """
    shown = _transposed_beside_biases(base.specs)
    module = module_of(name, base) if True in shown or base.is_module else None
    if module is not None:
        return stated if isinstance(module, nn.Embedding) else keeps_transposed(module)
    if shown == {True, False}:
        raise MismatchError(
            f"{base.ref} has modules that keep their weights transposed and others, and doesn't "
            f"say of which kind {name} is",
            hint="give the base as a folder with a configuration, or as a module",
        )
    return looks_transposed(name, base.specs) if True in shown else stated


def looks_transposed(name: str, specs: Mapping[str, Spec]) -> bool:
    """Return whether a weight is ``(in, out)``, as its shape and the biases of others show."""
    bias = specs.get(f"{name.removesuffix('weight')}bias")
    shape = specs[name].shape
    if bias is None or shape[0] == shape[1]:
        return bias is not None and _transposed_beside_biases(specs) == {True}
    return bias.shape == shape[1:]


def _transposed_beside_biases(specs: Mapping[str, Spec]) -> set[bool]:
    """Return whether weights are transposed, as their biases show: both, if there are both."""
    return {
        bias.shape == shape[1:]
        for name, (shape, _) in specs.items()
        for bias in (specs.get(f"{name.removesuffix('weight')}bias"),)
        if bias and name.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1]
    }


def module_of(name: str, base: Checkpoint) -> nn.Module | None:
    """Return the module of a base's weight, without its values; None if it isn't known."""
    if base.skeleton is None:
        return None
    in_memory = base.memory.name_of(name)
    try:
        return base.skeleton.get_submodule(in_memory.rpartition(".")[0]) if in_memory else None
    except AttributeError:
        return None


def keeps_transposed(module: nn.Module) -> bool:
    """Return whether a module keeps its weight as ``(in, out)``, as GPT-2's do."""
    return type(module).__name__ == "Conv1D"
