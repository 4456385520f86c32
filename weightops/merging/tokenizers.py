"""Merge by token: one vocabulary for several models, whose rows follow their tokens."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.names import layer_of
from weightops.algebra.source import Spec
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.libraries.base import Architecture
from weightops.errors import RecipeError
from weightops.merging.output_files import with_rows, with_vocabulary
from weightops.merging.token_rows import TokenRows
from weightops.merging.tokenizer_choice import TokenizerChoice
from weightops.merging.vocabulary import (
    Vocabulary,
    new_entry,
    tokenizer_files,
    tokenizer_json,
    without_tokens,
)
from weightops.merging.yaml_lines import located
from weightops.support.lazy import torch
from weightops.support.text import first_few

log = logging.getLogger("weightops")

_BY_TOKEN = re.compile(
    r"(.*\.)?(embed_tokens\w*|wte|(word_|tok_)?embeddings|embed_in|shared|lm_head|embed_out"
    r"|lm_head\.decoder|predictions|predictions\.decoder|vocab_projector|final_logits_bias)"
    r"(\.weight|\.bias)?|(model\.)?output\.weight"
)
_OTHER_TOWERS = re.compile(r"vis(ion|ual)|audio|image")


def vocabulary_tensors(specs: Mapping[str, Spec]) -> list[str]:
    """Return the names of the tensors that have a row for each token: embeddings and heads.

    >>> specs = {"model.embed_tokens.weight": (9, 4), "model.norm.weight": (9,)}
    >>> vocabulary_tensors({n: Spec(s, "float32") for n, s in specs.items()})
    ['model.embed_tokens.weight']

    Raises:
        RecipeError: if there is none, or they have different numbers of rows.
    """
    names = [
        name
        for name, spec in specs.items()
        if _BY_TOKEN.fullmatch(name)
        and layer_of(name) is None
        and spec.shape
        and not _OTHER_TOWERS.search(name)
        and (len(spec.shape) > 1 or not name.endswith("weight"))
    ]
    heights = {specs[name].shape[0] for name in names}
    if len(heights) != 1:
        found = ", ".join(f"{name} {tuple(specs[name].shape)}" for name in names) or "none"
        raise RecipeError(f"which tensors have a row for each token isn't known: found {found}")
    return names


class TokenMap:
    """The vocabulary of a merge, and the way from each model's rows to it.

    Args:
        choice: the choice of the vocabulary.
        models: ref -> the model, of all that are merged.
        base: the ref of the model whose tokens come first, or None.
        lines: token -> its line in the recipe.
        source: the model that ``choice.source`` names, or None.
    """

    def __init__(
        self,
        choice: TokenizerChoice,
        models: Mapping[str, Checkpoint],
        base: str | None,
        lines: Mapping[str, str],
        source: Checkpoint | None = None,
    ) -> None:
        self._choice, self._models, self._base, self._lines = choice, models, base, lines
        start = models[base or next(iter(models))]
        self.rows = {ref: _height(model) for ref, model in models.items()}
        self.donor = source or start
        limit = self.rows[base or next(iter(models))] if source is None else _height(source)
        content = tokenizer_json(_folder(self.donor))
        if content is None:
            raise RecipeError(f"{self.donor.ref} has no tokenizer")
        whole = Vocabulary.of(content, _folder(self.donor))
        stripped = any(i >= limit for i in whole.ids.values())
        if stripped:
            content = without_tokens(content, limit, whole.folder)
            whole.ids = {token: i for token, i in whole.ids.items() if i < limit}
        self.vocabularies = self._read_vocabularies(start, whole if source is None else None)
        new = self._new_tokens(whole.ids)
        self.ids = whole.ids | {token: entry["id"] for token, entry in new.items()}
        self.known = max(self.ids.values()) + 1
        multiple = choice.pad_to_multiple_of or 1
        self.size = -(-self.known // multiple) * multiple
        self.files = tokenizer_files(content, new, whole.folder, limit) if new or stripped else {}

    @property
    def base(self) -> str | None:
        """The ref of the model whose rows stand in for missing ones."""
        return self._base

    def architecture(self, architecture: Architecture) -> Architecture:
        """Return the architecture of merged weights, with the tokenizer."""
        old = architecture.config
        ref = next(
            (r for r, m in self._models.items() if m.architecture and m.architecture.config == old),
            next(iter(self._models)),
        )
        ids, tokenizer = None, None
        if self.donor.architecture and self.donor.architecture.folder != architecture.folder:
            tokens = self.vocabularies[ref].ids
            ids = {tokens[token]: number for token, number in self.ids.items() if token in tokens}
            tokenizer = self.donor.architecture
        return with_vocabulary(
            architecture,
            rows=(self.rows[ref], self.size),
            files=self.files,
            ids=ids,
            tokenizer=tokenizer,
        )

    def _read_vocabularies(
        self, start: Checkpoint, first: Vocabulary | None
    ) -> dict[str, Vocabulary]:
        """Read the vocabulary of each model; one without a tokenizer has the first one's."""
        by_bytes: dict[bytes, Vocabulary] = {}
        read: dict[str, Vocabulary | None] = {}
        for ref, model in self._models.items():
            folder = _folder(model)
            file = folder / "tokenizer.json"
            content = file.read_bytes() if file.is_file() else str(folder).encode()
            key = sha256(content).digest()
            found = by_bytes.get(key) or (
                first if first and folder == first.folder else Vocabulary.read(folder)
            )
            if found is not None:
                by_bytes[key] = found
            read[ref] = found
        fallback = next((found for found in read.values() if found is not None), None)
        if fallback is None:
            raise RecipeError(f"none of {first_few(read)} has a tokenizer")
        for ref, found in read.items():
            if found is None:
                log.warning("%s has no tokenizer: its tokens are taken to be %s's", ref, start.ref)
        return {ref: found or fallback for ref, found in read.items()}

    def _new_tokens(self, ids: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Return the entries of the tokens that the vocabulary doesn't have yet."""
        order: dict[str, Mapping[str, Any] | None] = {}
        if self._choice.source == "union":
            by_id = {ref: [*v.by_id(self.rows[ref])] for ref, v in self.vocabularies.items()}
            for added in (False, True):
                for ref, tokens in by_id.items():
                    entries = self.vocabularies[ref].added
                    for token in tokens:
                        if (token in entries) == added:
                            order.setdefault(token, entries.get(token))
        for token in self._choice.tokens:
            order.setdefault(token, None)
        missing = [token for token in order if token not in ids]
        start = max(ids.values()) + 1
        return {token: new_entry(token, order[token], start + i) for i, token in enumerate(missing)}

    def with_equal_rows(self, models: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
        """Return models whose configurations all have the number of rows of the first one's."""
        number = self.rows[next(iter(models))]
        alike = dict(models)
        for ref, model in models.items():
            rows = self.rows.get(ref, number)
            if model.architecture is not None and rows != number:
                changes = with_rows(model.architecture.config, rows, number)
                alike[ref] = Checkpoint(model.form, model.architecture.changed(changes))
        return alike

    def mapped(self, models: Mapping[str, Checkpoint], base: str | None) -> dict[str, Checkpoint]:
        """Return models that are merged with each other, with rows by token.

        Args:
            models: ref -> the model, with the names of the first.
            base: the ref of the model whose rows stand in for missing ones, or None.
        """
        own = {ref: self._own_rows(ref) for ref in models}
        donors = {ref: rows.clone() for ref, rows in own.items()}
        if base in own:  # the others stand in only where the base lacks a token
            lacking = own[base] < 0
            donors = {ref: rows.where(lacking, -1) for ref, rows in own.items()}
            donors[base] = own[base].clone()
        self._choose_rows(own, donors)
        self._warn_of_zeros(own, donors)
        first = next(iter(models.values()))
        names = vocabulary_tensors(first.specs)
        pairs = [(models[ref].form, rows) for ref, rows in donors.items()]
        mapped = {}
        for ref, model in models.items():
            if self._is_same(own[ref], model.specs[names[0]].shape[0]):
                mapped[ref] = model
                continue
            needed = (own[ref] < 0).nonzero().squeeze(1)
            used = [(form, rows) for form, rows in pairs if bool((rows[needed] >= 0).any())]
            source = TokenRows(model.form, own[ref], used, self.known, names)
            mapped[ref] = Checkpoint(LinearForm.of(source), model.architecture)
        return mapped

    def _is_same(self, own: torch.Tensor, height: int) -> bool:
        return len(own) == height and bool((own == self._numbers).all())

    @cached_property
    def _numbers(self) -> torch.Tensor:
        return torch.arange(self.size)

    def _own_rows(self, ref: str) -> torch.Tensor:
        """Return a model's row of each token, or -1."""
        ids, rows = self.vocabularies[ref].ids, torch.full((self.size,), -1)
        limit = self.rows[ref]
        new, old = [], []
        for token, number in self.ids.items():
            row = ids.get(token, limit)
            if row < limit:
                new.append(number)
                old.append(row)
        rows[torch.tensor(new, dtype=torch.long)] = torch.tensor(old, dtype=torch.long)
        return rows

    def _choose_rows(self, own: dict[str, torch.Tensor], donors: dict[str, torch.Tensor]) -> None:
        """Set the rows of the tokens that the recipe names."""
        for token, entry in self._choice.tokens.items():
            number, source = self.ids[token], entry["source"]
            with located(self._lines.get(token, "")):
                missing = [ref for ref, rows in own.items() if entry["force"] or rows[number] < 0]
                if not missing:
                    continue
                chosen = self._row_of(token, source, own)
                for ref, rows in donors.items():
                    rows[number] = chosen[1] if chosen and chosen[0] == ref else -1
            for ref in missing:
                own[ref][number] = -1

    def _row_of(
        self, token: str, source: Any, own: Mapping[str, torch.Tensor]
    ) -> tuple[str, int] | None:
        """Return the model and the row that a token's row is taken from; None for zeros."""
        if isinstance(source, Mapping) and source["kind"] == "zero":
            return None
        if source is None:
            raise RecipeError(
                f"the token {token!r} has no source, and not all models have it",
                hint="source: MODEL, {kind: zero}, or {kind: model_token, model: ..., token: ...}",
            )
        ref = source["model"] if isinstance(source, Mapping) else source
        if ref not in own:
            raise RecipeError(
                f"the row of {token!r} is taken from {ref}, which isn't one of the models",
                hint=f"these are {first_few(own, 9)}",
            )
        wanted = (
            source.get("token", source.get("token_id")) if isinstance(source, Mapping) else token
        )
        row = wanted if type(wanted) is int else self.vocabularies[ref].ids.get(str(wanted), -1)
        if not 0 <= row < self.rows[ref]:
            raise RecipeError(f"{ref} has no token {wanted!r}, from which {token!r} takes its row")
        return ref, row

    def _warn_of_zeros(
        self, own: Mapping[str, torch.Tensor], donors: Mapping[str, torch.Tensor]
    ) -> None:
        both = torch.stack([*own.values(), *donors.values()]).amax(0)
        numbers = set((both < 0).nonzero().flatten().tolist())
        zero = [
            token
            for token, number in (self.ids.items() if numbers else ())
            if number in numbers and token not in self._choice.tokens
        ]
        if zero:
            log.warning("no model has %s: rows of 0", first_few([repr(token) for token in zero]))


def _height(model: Checkpoint) -> int:
    """Return the number of rows of a model's embedding."""
    return model.specs[vocabulary_tensors(model.specs)[0]].shape[0]


def _folder(model: Checkpoint) -> Path:
    """Return the folder of a model's tokenizer.

    Raises:
        RecipeError: if the model is weights alone.
    """
    if model.architecture is None:
        raise RecipeError(
            f"{model.ref} holds weights alone, without a tokenizer",
            hint="name a folder with config.json and tokenizer.json beside the weights",
        )
    return model.architecture.folder
