"""The tensors of a checkpoint as its module has them in memory."""

from __future__ import annotations

from collections.abc import Mapping

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.source import Source, Spec
from weightops.checkpoints.conversion import TensorMapping
from weightops.checkpoints.libraries.memory_names import MemoryNames
from weightops.checkpoints.renamed import Renamed, renamed


class InMemory:
    """The tensors of a checkpoint under the names of its module, and the way back.

    Args:
        form: the checkpoint's form.
        names: the module's names, or None if they are those of the checkpoint.

    Attributes:
        form: the form in the module's names.
    """

    def __init__(self, form: LinearForm, names: MemoryNames | None) -> None:
        self._files = form.specs
        same = {name: TensorMapping("copy", (name,)) for name in form.specs}
        self._loading = names.loading(form.specs) if names else same
        self._saving = names.saving(form.specs) if names else same
        self.form = renamed(form, self._loading) if names else form

    @property
    def specs(self) -> Mapping[str, Spec]:
        """The shapes and dtypes in memory."""
        return self.form.specs

    def name_of(self, file: str) -> str | None:
        """Return the name in memory of the checkpoint's tensor; None if it is part of another."""
        mapping = self._saving.get(file)
        return mapping.names[0] if mapping and mapping.kind == "copy" else None

    def files_of(self, name: str) -> tuple[str, ...]:
        """Return the names in the checkpoint of what a tensor is made of; empty for none."""
        return self._loading[name].names if name in self._loading else ()

    def beside(self, names: Mapping[str, object]) -> set[str]:
        """Return all tensors that share tensors of the checkpoint with some."""
        return {name for mapping in self._of(names).values() for name in mapping.names}

    def in_files(self, source: Source) -> Source:
        """Return a source of tensors in memory, or of a part of them, in the checkpoint's names."""
        mapped = self._of(source.specs)
        if all(mapping.names == (file,) for file, mapping in mapped.items()):
            return source
        return Renamed(source, mapped, self._files)

    def _of(self, names: Mapping[str, object]) -> dict[str, TensorMapping]:
        """Return the mappings of the tensors of files that some tensors in memory give."""
        return {
            file: mapping
            for file, mapping in self._saving.items()
            if any(name in names for name in mapping.names)
        }
