"""The vocabulary that a recipe chooses for its merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightops.errors import RecipeError
from weightops.merging.recipe_values import flag_of
from weightops.merging.yaml_lines import line_of, located
from weightops.support.registry import unknown

_KEYS = ("source", "base", "tokens", "pad_to_multiple_of")


@dataclass(frozen=True)
class TokenizerChoice:
    """The vocabulary of a merge.

    Attributes:
        source: "union" of all models' tokens, "base", or the ref of the model whose tokenizer it
            is.
        base: the ref of the model whose tokens come first and whose rows stand in where a model
            lacks a token; by default the recipe's base. Without any, it is the mean of the rows
            of the models that have the token.
        tokens: token -> where its row comes from, and whether in every model.
        pad_to_multiple_of: a number that divides the number of rows.
    """

    source: str = "union"
    base: str | None = None
    tokens: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    @classmethod
    def of(cls, content: Any) -> TokenizerChoice:
        """Return the choice that a recipe's ``tokenizer`` describes.

        Raises:
            RecipeError: for a value that its key can't have.
            UnknownNameError: for an unknown key, with the nearest.
        """
        if isinstance(content, str):
            return cls(content)
        if not isinstance(content, Mapping):
            raise RecipeError(f"tokenizer is a mapping, or union, base or a ref, not {content!r}")
        for key in content:
            if key not in _KEYS:
                with located(line_of(content, key)):
                    raise unknown("key of tokenizer", str(key), _KEYS)
        multiple = content.get("pad_to_multiple_of")
        if multiple is not None and (type(multiple) is not int or multiple < 1):
            raise RecipeError(f"pad_to_multiple_of is a whole number from 1, not {multiple!r}")
        tokens = content.get("tokens") or {}
        if not isinstance(tokens, Mapping):
            raise RecipeError(f"tokens is a mapping of tokens to sources, not {tokens!r}")
        checked = {}
        for token, entry in tokens.items():
            with located(line_of(tokens, token)):
                checked[str(token)] = _token(str(token), entry)
        for key in ("source", "base"):
            if not isinstance(content.get(key), (str, type(None))):
                raise RecipeError(f"{key} is {content[key]!r:.80}, and must be text")
        return cls(content.get("source") or "union", content.get("base"), checked, multiple)

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that `of` reads, without defaults."""
        content = {
            "source": self.source,
            "base": self.base,
            "tokens": {t: {k: v for k, v in e.items() if v} for t, e in self.tokens.items()},
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }
        return {key: value for key, value in content.items() if value}


def _token(token: str, entry: Any) -> Mapping[str, Any]:
    """Return where a token's row comes from: ``{"source": ..., "force": ...}``."""
    if not isinstance(entry, Mapping) or not set(entry) <= {"source", "force"}:
        raise RecipeError(f"the token {token!r} is {{source: ..., force: ...}}, not {entry!r}")
    source = entry.get("source")
    if isinstance(source, Mapping):
        kind = source.get("kind")
        if kind == "model_token":
            if not source.get("model") or ("token" in source) == ("token_id" in source):
                raise RecipeError(f"the token {token!r} needs a model, and a token or a token_id")
        elif kind != "zero":
            raise RecipeError(f"the kind of the token {token!r} is zero or model_token: {kind!r}")
        source = dict(source)
    elif source is not None and not isinstance(source, str):
        raise RecipeError(f"the source of the token {token!r} is a ref or a mapping: {source!r}")
    force = flag_of(f"force of the token {token!r}", entry.get("force", False))
    return {"source": source, "force": force}
