"""Tell files of LoRA matrices from files of weights: to average A and B apart averages no edit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from weightops.checkpoints.adapters.adapter import CONFIG
from weightops.errors import CheckpointError

_HALVES = (
    (r"[._]lora_A\b", r"[._]lora_B\b", "peft or diffusers"),
    (r"[._]lora_embedding_A\b", r"[._]lora_embedding_B\b", "peft"),
    (r"[._]lora_down\b", r"[._]lora_up\b", "kohya"),
    (r"[._]lora\.down\b", r"[._]lora\.up\b", "diffusers"),
    (r"[._]lora_linear_layer\.down\b", r"[._]lora_linear_layer\.up\b", "diffusers"),
    (r"\w_lora\.down\b", r"\w_lora\.up\b", "diffusers"),
    (r"\.hada_w1_a\b", r"\.hada_w1_b\b", "LoHa"),
    (r"\.lokr_w1(_a)?\b", r"\.lokr_w2(_[ab])?\b", "LoKr"),
)
"""Ends of the names of two matrices that stand for one edit, and who writes them."""
_MARKS = ("lora", "hada_w1", "lokr_w")
"""What all of these names have in them: models have many tensors, and few such names."""


def check_no_halves(names: Iterable[str], ref: str) -> None:
    """Refuse tensors of which some are the halves of edits.

    Args:
        names: the names of the tensors.
        ref: their place.

    Raises:
        CheckpointError: naming two halves and the library that has such names.
    """
    listed = [name for name in names if any(mark in name for mark in _MARKS)]
    for first, second, library in _HALVES:
        a, b = (next((n for n in listed if re.search(p, n)), None) for p in (first, second))
        if a and b:
            raise CheckpointError(
                f"{ref} holds an adapter without its configuration, in names of {library}: {a} and "
                f"{b} are factors of one edit, and weights of none",
                hint=f"name a folder with {CONFIG}, as save_pretrained of peft writes it; or merge "
                "the adapter into its model with the library that made it",
            )


def folder_of(file: Path) -> Path | None:
    """Return the configuration of the adapter that a file is the weights of; None for others."""
    config = file.parent / CONFIG
    return config if file.stem == "adapter_model" and config.is_file() else None
