"""The files beside merged weights: the configuration of another vocabulary, and its tokenizer."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from weightops.checkpoints.libraries.base import Architecture
from weightops.errors import CheckpointError
from weightops.merging.chat_templates import chat_template
from weightops.merging.vocabulary import FILES, SETTINGS, TEMPLATE, Vocabulary
from weightops.support.atomic import atomic_output
from weightops.support.cache import cache_dir
from weightops.support.json_files import read_json
from weightops.support.text import first_few

log = logging.getLogger("weightops")

_GENERATION = "generation_config.json"
_TOKEN_ID = re.compile(r".*_token_ids?|.*_token_index")


def with_files(
    architecture: Architecture, files: Mapping[str, str], tokenizer: Path | None = None
) -> Architecture:
    """Return an architecture whose folder, in the cache, has other files.

    Args:
        architecture: the architecture to start from.
        files: name -> text of the files that are new or other.
        tokenizer: the folder to take the tokenizer from; by default that of the architecture.
    """
    digest = sha256(json.dumps([architecture.changes, dict(files)], sort_keys=True).encode())
    for place in (architecture.folder, tokenizer):
        for path in sorted(place.iterdir()) if place else ():
            state = path.stat()
            digest.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    folder = cache_dir() / "tokenizers" / digest.hexdigest()[:16]
    if not folder.is_dir():
        with atomic_output(folder, overwrite=True) as temporary:
            temporary.mkdir()
            architecture.write(temporary)
            if tokenizer is not None:
                for name in FILES:
                    (temporary / name).unlink(missing_ok=True)
                    if (tokenizer / name).is_file():
                        shutil.copyfile(tokenizer / name, temporary / name)
            for name, text in files.items():
                (temporary / name).write_text(text, encoding="utf-8")
    changed = architecture.in_folder(folder)
    changed.chosen |= {*files, *(FILES if tokenizer else ())}
    return changed


def with_rows(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """Return the settings of a configuration that state the number of rows, with another number.

    >>> with_rows({"vocab_size": 9, "text_config": {"vocab_size": 9, "x": 1}}, 9, 10)
    {'vocab_size': 10, 'text_config': {'vocab_size': 10, 'x': 1}}
    """
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key == "vocab_size" and value == old:
            changes[key] = new
        elif isinstance(value, Mapping) and (inner := with_rows(value, old, new)):
            changes[key] = {**value, **inner}
    return changes


def with_special_ids(
    config: Mapping[str, Any], ids: Mapping[int, int], other: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of a configuration that are ids of tokens, for another vocabulary.

    Args:
        config: the configuration.
        ids: old id -> new id.
        other: the configuration of a model of the new vocabulary, whose settings come first.
    """
    changes: dict[str, Any] = {}
    for key, value in config.items():
        there = other.get(key)
        if isinstance(value, Mapping):
            inner = with_special_ids(value, ids, there if isinstance(there, Mapping) else {})
            changes |= {key: {**value, **inner}} if inner else {}
        elif _TOKEN_ID.fullmatch(key) and value is not None:
            renumbered = [ids.get(i) for i in (value if isinstance(value, list) else [value])]
            known = [i for i in renumbered if i is not None]
            renewed = (known if isinstance(value, list) else known[0]) if known else None
            changes[key] = there if there is not None else renewed
    return changes


def with_vocabulary(
    architecture: Architecture,
    *,
    rows: tuple[int, int],
    files: Mapping[str, str],
    ids: Mapping[int, int] | None = None,
    tokenizer: Architecture | None = None,
) -> Architecture:
    """Return an architecture for another vocabulary, with its tokenizer.

    Args:
        architecture: the architecture to start from.
        rows: the old and the new number of rows.
        files: name -> text of the tokenizer's files that are new.
        ids: old id -> new id, where the tokenizer is another model's.
        tokenizer: the architecture of that model.
    """
    config = architecture.config
    changes = with_rows(config, *rows) if rows[0] != rows[1] else {}
    written = dict(files)
    if ids is not None and tokenizer is not None:
        changes |= with_special_ids({**config, **changes}, ids, tokenizer.config)
        generation, theirs = (_generation(each.folder) for each in (architecture, tokenizer))
        if special := with_special_ids(generation, ids, theirs):
            written[_GENERATION] = json.dumps({**generation, **special}, indent=2)
    changed = architecture.changed(changes) if changes else architecture
    if not written and tokenizer is None:
        return changed
    return with_files(changed, written, tokenizer.folder if tokenizer else None)


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / _GENERATION
    return read_json(path) if path.is_file() else {}


def with_chat_template(
    architecture: Architecture, choice: str, folders: Mapping[str, Path]
) -> Architecture:
    """Return an architecture whose tokenizer has a chat template.

    Args:
        architecture: the architecture to start from.
        choice: "auto" for the one that most of the models have, the name of a template, or its
            text in Jinja.
        folders: ref -> the folder of each model.

    Raises:
        RecipeError: if the choice is none of these.
    """
    text = chat_template(choice, folders)
    if text is None:
        return architecture
    files = {TEMPLATE: text}
    path = architecture.folder / SETTINGS
    settings = read_json(path) if path.is_file() else {}
    if "chat_template" in settings:  # of the two places, the file is the one that is kept
        rest = {key: value for key, value in settings.items() if key != "chat_template"}
        files[SETTINGS] = json.dumps(rest, ensure_ascii=False, indent=2)
    return with_files(architecture, files)


def warn_of_differing_tokens(folders: Mapping[str, Path]) -> None:
    """Warn of models whose rows are merged by number though their tokens have other numbers.

    Args:
        folders: ref -> the folder of each model.
    """
    try:
        found = _differing_tokens(folders)
    except CheckpointError as error:
        log.warning("the tokenizers aren't compared: %s", error.fact)
        return
    if found is not None:
        ref, tokens = found
        log.warning(
            "the tokenizers of %s and %s differ in %d tokens, such as %s, and rows are merged by "
            "number; tokenizer: {source: union} merges them by token",
            next(iter(folders)),
            ref,
            len(tokens),
            first_few([repr(token) for token in tokens]),
        )


def _differing_tokens(folders: Mapping[str, Path]) -> tuple[str, list[str]] | None:
    """Return the first model whose tokens have other ids than the first one's, and these tokens."""
    first: Vocabulary | None = None
    start = b""
    for ref, folder in folders.items():
        path = folder / "tokenizer.json"
        if not path.is_file():
            continue
        content = path.read_bytes()
        if first is None:
            first, start = Vocabulary.read(folder), content
        elif content != start:
            other = Vocabulary.read(folder)
            pairs = (first.ids.items() ^ other.ids.items()) if first and other else set()
            if pairs:
                return ref, list(dict.fromkeys(token for token, _ in sorted(pairs, key=_by_id)))
    return None


def _by_id(pair: tuple[str, int]) -> tuple[int, str]:
    return pair[1], pair[0]
