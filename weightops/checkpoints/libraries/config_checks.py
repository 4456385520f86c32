"""Checks of a configuration before a library sees it: nothing in it leads to code, sizes are sizes.

A configuration comes with weights from anywhere. Libraries take what it says for granted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightops.errors import CheckpointError, WeightopsError

_CODE = re.compile(
    r"(.*[\W_])?(code|remote|trust|kernels?|custom|plugins?|repo|repository|hub|script|exec|import"
    r"|revision|overlay|pipelines?|pretrained|checkpoint)([\W_].*)?|hf_model_name",
    re.IGNORECASE,
)
"""Keys by which libraries run code, or read files, from elsewhere: those with such words."""

_HARMLESS = re.compile(
    r"custom_text|disable_custom_kernels|use_mamba_kernels|(autocast|chunkwise|sequence|step)_kernel"
    r"(_dtype)?|(gradient_)?checkpoint(ing|_format)|dataset_revision|use_pretrained_backbone"
    r"|(timm|hf)_model_pretrained|pretrained_cfg|hf_hub_(id|filename)|code_predictor_config"
)
"""Keys with such words that are allowed: the libraries take plain settings from them, or nothing
where they are told, as they are here, to fetch no weights."""

_IMPLEMENTATION = re.compile(r"_?\w*implementation(_internal)?")
"""Keys whose value is a name in the library, or else a repository with compiled code."""

_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
"""A model's name in timm, with or without a tag. A name with a scheme or a folder is fetched."""

_SIZES = re.compile(
    r"(hidden|intermediate|vocab|patch|image|projection)_size|embed_dim|width|layers|heads|d_model"
    r"|head_width|context_length|num_(attention_heads|hidden_layers|channels)|n_(head|layer|embd)"
)
"""Keys of sizes of models, which are whole numbers from 1 on, or lists of such numbers."""

_SETTINGS = re.compile(
    r"(model|vision|text|multimodal|preprocess|pretrained)_cfg|(vision|text|quantization)_config"
    r"|(tokenizer|act|norm)_kwargs|model_args"
)
"""Keys of settings that have names of their own."""

_MEANS = re.compile(r"(image_)?(mean|std)")
"""Keys of a number for each color, or one for all."""

_COUNTS = re.compile(r"\w*(layers?|depths?|blocks?|experts|labels|classes|stages|groups)")
"""Keys of numbers of parts, of which libraries make lists before they make tensors."""

_NAMED_FREELY = re.compile(
    r"label_descriptions|label2id|id2label|(extra|model_specific)_special_tokens"
    r"|added_tokens_decoder|vocabulary_map"
)
"""Keys of mappings whose own keys are names of classes and tokens."""

_DEPTH = 50
_LARGEST_COUNT = 1_000_000
_LARGEST_SIZE = 2**31


def check_config(config: Mapping[str, Any], path: Path, *, allowed: frozenset[str]) -> None:
    """Check a configuration that a library is to build something from.

    Args:
        config: its content.
        path: its file, for errors.
        allowed: values of ``hf_model_name`` that the library itself comes with.

    Raises:
        CheckpointError: naming the key, and what is expected.
    """
    for place, key, value in list(entries(config, path)):
        named = f"{path} sets {place}"
        if _IMPLEMENTATION.fullmatch(key) and isinstance(value, str) and re.search("[/:@]", value):
            raise CheckpointError(f"{named} to a place with code, which isn't allowed")
        if _may_lead_to_code(key, value, allowed):
            raise CheckpointError(f"{named}, which may run code and isn't allowed")
        if key == "backbone" and isinstance(value, str) and ":" in value:
            raise CheckpointError(f"{named} to {value!r:.80}, which is no name of a backbone")
        if key in ("timm_model_name", "architecture") and not _may_be_name(value):
            raise CheckpointError(f"{named} to {value!r:.80}, which is no name of a timm model")
        if _SIZES.fullmatch(key) and value is not None and not _is_size(value):
            raise CheckpointError(
                f"{named} to {value!r:.80}, which must be a whole number from 1 to "
                f"{_LARGEST_SIZE - 1:,}"
            )
        if key == "context_length" and type(value) is not int:
            raise CheckpointError(f"{named} to {value!r:.80}, which must be a whole number")
        if _MEANS.fullmatch(key) and value is not None and not _are_numbers(value):
            raise CheckpointError(f"{named} to {value!r:.80}, which must be numbers")
        if _COUNTS.fullmatch(key) and type(value) is int and value > _LARGEST_COUNT:
            raise CheckpointError(f"{named} to {value!r:.80}, more than {_LARGEST_COUNT:,}")
        if _SETTINGS.fullmatch(key) and value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{named} to {value!r:.80}, which must be a mapping of settings")


def entries(value: Any, path: Path) -> Iterator[tuple[str, str, Any]]:
    """Return place, key and value of all entries of mappings at any depth."""
    pending: list[tuple[str, Any, int]] = [("", value, 0)]
    while pending:
        before, item, depth = pending.pop()
        if depth > _DEPTH:
            raise CheckpointError(f"{path} is nested more than {_DEPTH} deep at {before[:80]}")
        if isinstance(item, dict):
            for key, inner in item.items():
                yield f"{before}{key}"[:200], str(key), inner
                if not _NAMED_FREELY.fullmatch(str(key)):
                    pending.append((f"{before}{key}."[:200], inner, depth + 1))
        elif isinstance(item, list):
            pending += [(before, inner, depth + 1) for inner in item]


def _is_size(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, dict) else value
    values = values if isinstance(values, list) and values else [value]
    return all(type(n) is int and 0 < n < _LARGEST_SIZE for n in values)


def _may_lead_to_code(key: str, value: Any, allowed: frozenset[str]) -> bool:
    """Return whether a key may lead to code; a number or false never does."""
    if not _CODE.fullmatch(key) or _HARMLESS.fullmatch(key):
        return False
    if isinstance(value, str):
        return bool(value) and value not in allowed
    return value is True or _holds_text(value)


def _holds_text(value: Any) -> bool:
    """Return whether a value is a text or mapping, or holds one at any depth."""
    if isinstance(value, list):
        return any(map(_holds_text, value))
    return isinstance(value, (str, dict)) and bool(value)


def _are_numbers(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(type(number) in (int, float) for number in values)


def _may_be_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(_NAME.fullmatch(value)))


@contextmanager
def library_errors(fact: str) -> Iterator[None]:
    """Convert every error of a library that works on somebody's files.

    Args:
        fact: what the library can't do, with the file.

    Raises:
        CheckpointError: the fact, and the library's reason.
    """
    try:
        yield
    except WeightopsError:
        raise
    except BaseException as error:  # libraries raise whatever a wrong setting leads to
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise  # all but interrupts, and the panics of libraries in Rust
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, (LookupError, ArithmeticError, AttributeError)):
            reason = f"{type(error).__name__}: {reason}"
        raise CheckpointError(f"{fact}: {reason}") from error
