"""A byte-pair tokenizer of open_clip as files of transformers, which load wherever they lie.

open_clip looks for the merges of its own tokenizer at a path that it takes from the working
directory; for a tokenizer of transformers, it looks into the folder of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
"""The names of the files."""

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""The words that merges stay within."""


def tokenizer_files(tokenizer: Any, max_length: int) -> Mapping[str, Any]:
    """Return file name -> JSON content of a tokenizer with the ids of open_clip's own.

    It pads with the end of text, not with id 0, which is a character: what follows the end of a
    text changes nothing in a model that looks backwards only.

    Args:
        tokenizer: an open_clip ``SimpleTokenizer``.
        max_length: the number of tokens that the model takes.
    """
    start, end = (tokenizer.decoder[i] for i in (tokenizer.sot_token_id, tokenizer.eot_token_id))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings = {
        **kind,
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    contents = (kind, _tokenizer(tokenizer, start, end), settings)  # AutoTokenizer needs the first
    return dict(zip(TOKENIZER_FILES, contents, strict=True))


def _tokenizer(tokenizer: Any, start: str, end: str) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``."""
    ids = {tokenizer.decoder[i]: i for i in tokenizer.all_special_ids}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": True} for token, i in ids.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**bytes_only, "use_regex": False}],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(start), _sequence("A"), _special(end)],
            "pair": [_sequence("A"), _sequence("B")],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]}
                for token in (start, end)
            },
        },
        "decoder": {**bytes_only, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": tokenizer.encoder,
            "merges": [list(pair) for pair in tokenizer.bpe_ranks],
        },
    }


def _special(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}
