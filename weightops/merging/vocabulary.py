"""Vocabularies: the tokens of a model's folder and their ids, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightops.errors import CheckpointError
from weightops.support.json_files import read_json

JSON, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
TEMPLATE = "chat_template.jinja"
FILES = (
    *(JSON, SETTINGS, ADDED, TEMPLATE, "special_tokens_map.json", "chat_template.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
    "sentencepiece.bpe.model",
)
"""The names of the files that a tokenizer may have."""


@dataclass
class Vocabulary:
    """The tokens that a tokenizer knows.

    Attributes:
        folder: the folder of the tokenizer.
        ids: token -> id.
        added: token -> its entry among the added tokens, which texts are searched for first.
    """

    folder: Path
    ids: dict[str, int]
    added: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Vocabulary | None:
        """Read the vocabulary of a folder; None if it has no tokenizer."""
        content = tokenizer_json(folder)
        return None if content is None else cls.of(content, folder)

    @classmethod
    def of(cls, content: Mapping[str, Any], folder: Path) -> Vocabulary:
        """Return the vocabulary in the content of a ``tokenizer.json``.

        Raises:
            CheckpointError: if the content isn't what it should be.
        """
        try:
            return cls._of(content, folder)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / JSON} is not a tokenizer's file: {error!r}"
            ) from error

    @classmethod
    def _of(cls, content: Mapping[str, Any], folder: Path) -> Vocabulary:
        vocabulary = content["model"].get("vocab") or {}
        if isinstance(vocabulary, list):  # Unigram has pairs of a token and its score
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        added = {entry["content"]: entry for entry in content.get("added_tokens") or ()}
        ids = {**vocabulary, **{token: entry["id"] for token, entry in added.items()}}
        _check_ids(ids)
        taken = set(ids.values())
        for number, entry in _settings(folder).get("added_tokens_decoder", {}).items():
            if entry["content"] not in ids and int(number) not in taken:
                ids[entry["content"]] = int(number)
                added[entry["content"]] = {**entry, "id": int(number)}
        return cls(folder, ids, added)

    def by_id(self, limit: int) -> Iterable[str]:
        """Return the tokens whose ids are below a limit, in the order of the ids."""
        return sorted((t for t, i in self.ids.items() if i < limit), key=self.ids.__getitem__)


def _check_ids(ids: Mapping[str, Any]) -> None:
    """Check that each token has a number.

    Raises:
        ValueError: naming the first one that has none.
    """
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise ValueError(f"the id of {token[:80]!r} is {str(number)[:80]}")


def tokenizer_json(folder: Path) -> dict[str, Any] | None:
    """Read ``tokenizer.json``, or make it from a tokenizer's older files; None if there are none.

    Raises:
        CheckpointError: if transformers can't load the older files.
    """
    if (folder / JSON).is_file():
        content: dict[str, Any] = read_json(folder / JSON)
        if not isinstance(content.get("model"), dict):
            raise CheckpointError(f"{folder / JSON} is not a tokenizer: it has no model")
        return content
    if not any((folder / name).is_file() for name in FILES if name != TEMPLATE):
        return None
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except (ImportError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{folder} has a tokenizer without {JSON}, which transformers doesn't convert: {reason}"
        ) from error
    return content


def without_tokens(content: dict[str, Any], limit: int, folder: Path) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json`` without the tokens that the model has no rows for.

    Raises:
        CheckpointError: if they are in the middle of a vocabulary that is numbered by position.
    """
    model = dict(content["model"])
    kept_added = [entry for entry in content.get("added_tokens") or () if entry["id"] < limit]
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):
        model["vocab"] = vocabulary[:limit]
    else:
        model["vocab"] = {token: i for token, i in vocabulary.items() if i < limit}
    if len(model["vocab"]) < len(vocabulary) and "merges" in model:
        known = model["vocab"]
        pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [
            merge
            for merge, (left, right) in zip(model["merges"], pairs, strict=True)
            if left in known and right in known and left + right in known
        ]
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown not in model["vocab"]:
        raise CheckpointError(f"{folder} has no row for its unknown token {unknown!r}")
    return {**content, "model": model, "added_tokens": kept_added}


def tokenizer_files(
    content: Mapping[str, Any], new: Mapping[str, Mapping[str, Any]], folder: Path, limit: int
) -> dict[str, str]:
    """Return the files of a tokenizer with more tokens: name -> text.

    Args:
        content: the ``tokenizer.json`` to add to.
        new: token -> its entry among the added tokens, with its id.
        folder: the folder of the other files.
        limit: the id from which on the other files' tokens have no rows.
    """
    whole = {**content, "added_tokens": [*(content.get("added_tokens") or ()), *new.values()]}
    files = {JSON: json.dumps(whole, ensure_ascii=False)}
    settings = _settings(folder)
    if "added_tokens_decoder" in settings:
        kept = {k: v for k, v in settings["added_tokens_decoder"].items() if int(k) < limit}
        decoder = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in new.values()
        }
        settings = {**settings, "added_tokens_decoder": {**kept, **decoder}}
        files[SETTINGS] = json.dumps(settings, ensure_ascii=False, indent=2)
    if (folder / ADDED).is_file():
        old = read_json(folder / ADDED)
        try:
            _check_ids(old)
        except ValueError as error:
            raise CheckpointError(f"{folder / ADDED} is not a list of tokens: {error}") from error
        old = {token: i for token, i in old.items() if i < limit}
        old |= {token: entry["id"] for token, entry in new.items()}
        files[ADDED] = json.dumps(old, ensure_ascii=False, indent=2)
    return files


def new_entry(token: str, entry: Mapping[str, Any] | None, number: int) -> dict[str, Any]:
    """Return the entry of an added token, with the settings that another tokenizer gives it."""
    plain = {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }
    return {"id": number, **plain, **{k: v for k, v in (entry or {}).items() if k != "id"}}


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    return settings
