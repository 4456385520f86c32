"""The inputs that an output records: where they lie now, and whether they are still the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from weightops.algebra.linear_form import Factor, LinearForm
from weightops.algebra.names import NameRules
from weightops.checkpoints.adapters.adapter import Adapter
from weightops.checkpoints.adapters.binding import bind
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.matching import match_names
from weightops.checkpoints.opening import EMBEDDED, open_any
from weightops.checkpoints.quantised import DEQUANTIZED
from weightops.errors import OptionError, UnverifiedError
from weightops.support.text import first_few


class RecordedInputs:
    """The inputs of an output.

    Args:
        output: the output.
        files: the files of its weights, which are no inputs.
        recorded: the ref and fingerprint of each input.
        inputs: folders in which to look, too.
    """

    def __init__(
        self,
        output: Path,
        files: Iterable[Path],
        recorded: Set[tuple[str, str]],
        inputs: Sequence[str | Path],
    ) -> None:
        self._output, self._recorded = output, recorded
        self._own = {path.absolute() for path in (output, *files)}
        self._inputs = [Path(place) for place in inputs]
        for place in self._inputs:
            if not place.is_dir():
                raise OptionError(f"there is no folder {place} to look for inputs in")

    def open(self, ref: str) -> Checkpoint:
        """Open an input where it lies now.

        Raises:
            UnverifiedError: if it is nowhere, or another one is in its place.
        """
        kind = DEQUANTIZED if ref.startswith(DEQUANTIZED) else ""
        path = ref.removeprefix(kind)
        pinned = next((name for name, _ in self._recorded if name.startswith(f"{ref}@")), None)
        wanted = self._fingerprints(ref)
        places = list(dict.fromkeys(self._places(path)))
        if not places:
            if path == EMBEDDED or pinned or not _is_path(path):
                return open_any(pinned or ref)
            raise UnverifiedError(
                f"{self._output} can't be checked: its input {ref} isn't here",
                hint="inputs=... names a folder in which it lies",
            )
        others = []
        for place in places:
            opened = open_any(kind + place)
            if not wanted or opened.fingerprint in wanted:
                return opened
            others.append(opened)
        raise UnverifiedError(
            f"{self._output} can't be checked: it was made of {ref} ({first_few(wanted)}), and "
            f"{first_few(places)} is another one ({others[0].fingerprint})",
            hint="inputs=... names a folder in which the right one lies",
        )

    def _fingerprints(self, ref: str) -> set[str]:
        """Return the fingerprints that an input may have: its own, or those of its last name."""
        for name in (ref, Path(ref).name):
            found = {fingerprint for known, fingerprint in self._recorded if known == name}
            if found:
                return found
        return set()

    def _places(self, path: str) -> Iterator[str]:
        """Yield the existing paths that an input may have."""
        whole, name = Path(path), Path(path).name
        folder = self._output if self._output.is_dir() else self._output.parent
        beside = folder.absolute().parent if self._output.is_dir() else folder
        candidates = [folder / path, whole, beside / path, beside / name]
        for place in self._inputs:
            candidates += [place / path, place / name, *([place] if place.name == name else [])]
        for candidate in candidates:
            file = Path(str(candidate).rpartition(":")[0])
            is_there = candidate.exists() or (":" in name and file.is_file())
            if is_there and candidate.absolute() not in self._own:
                yield str(candidate)

    def check(self, now: Set[tuple[str, str]]) -> None:
        """Check that the fingerprints of what was opened are those that are recorded.

        Raises:
            UnverifiedError: naming an input that is another one now.
        """
        present = {fingerprint for _, fingerprint in now}
        for ref, fingerprint in sorted(self._recorded):
            if fingerprint not in present:
                opened = [f"{name} ({found})" for name, found in sorted(now)]
                raise UnverifiedError(
                    f"{self._output} can't be checked: it was made of {ref} ({fingerprint}), which "
                    f"is none of {first_few(opened, 6)}"
                )


def _is_path(ref: str) -> bool:
    """Return whether a ref that names nothing here can be a path only."""
    return ":" not in ref and ref.count("/") != 1


def fingerprints_in(record: Any) -> set[tuple[str, str]]:
    """Return the ref and fingerprint of all inputs in a provenance record."""
    if isinstance(record, (list, tuple)):
        return set().union(*map(fingerprints_in, record))
    if not isinstance(record, Mapping):
        return set()
    own = (record.get("ref"), record.get("fingerprint"))
    found = fingerprints_in(list(record.values()))
    return found | {own} if all(isinstance(part, str) for part in own) else found  # type: ignore[arg-type]


def form_of_terms(
    record: Mapping[str, Any], inputs: RecordedInputs
) -> tuple[LinearForm, Checkpoint]:
    """Return the linear form that a provenance record describes, and its base.

    Raises:
        UnverifiedError: if an input is gone or another, or the record isn't of a linear form.
    """
    base = _opened(record["base"], inputs)
    terms = {}
    for term in record["terms"]:
        own = base if term["ref"] == record["base"]["ref"] else _opened(term, inputs)
        rules = tuple(NameRules.of(rules) for rules in term["rules"])
        for factor in _factors(own, base):
            terms[Factor(factor.source, (*factor.rules, *rules))] = float(term["coefficient"])
    if record.get("space") == "delta":
        return LinearForm("delta", base.specs, terms), base
    return LinearForm("weights", base.specs, terms, base.source), base


def _opened(term: Any, inputs: RecordedInputs) -> Checkpoint:
    """Open the input that an entry of a record names."""
    if not isinstance(term, Mapping) or not isinstance(term.get("ref"), str):
        raise UnverifiedError("its record doesn't name the inputs")
    return inputs.open(term["ref"])


def _factors(own: Checkpoint, base: Checkpoint) -> list[Factor]:
    """Return the factors of an input in the names of a base."""
    (source,) = own.form.sources
    if isinstance(source, Adapter):
        return [factor for factor in bind(source, base).form.terms if factor.source != base.source]
    return list(match_names(own, base).terms)
