"""`Adapter`: the folder of an adapter, as peft saves it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from weightops.algebra.source import Source
from weightops.errors import SpaceError
from weightops.support.lazy import torch
from weightops.support.sibling_files import ADAPTER_CONFIG

CONFIG = ADAPTER_CONFIG
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""The prefix of all names of tensors."""


class Adapter(Source):
    """An adapter: a delta, or an edit that needs the base's weights to be one.

    Args:
        config: the content of ``adapter_config.json``.
        stored: the tensors of the adapter.
        ref: the name of the adapter in messages.

    Attributes:
        config: the configuration.
        stored: the tensors of the adapter.
        needs_base: why the edit isn't known without its base, to follow the adapter's name; empty
            if it is.
    """

    space = "delta"
    computed = True
    needs_base = ""

    def __init__(self, config: Mapping[str, Any], stored: Source, ref: str) -> None:
        self.config, self.stored, self.ref = config, stored, ref
        self.specs, self.skipped, self.ties = {}, stored.skipped, {}
        settings = json.dumps(config, sort_keys=True, default=str)
        self.identity = stored.identity and ("adapter", settings, stored.identity)
        self.files = stored.files

    def describe_as(self, kind: str, *, ranks: list[int], modules: int, whole: list[str]) -> None:
        """Set the description of the adapter.

        Args:
            kind: the name of the method.
            ranks: the ranks of its modules.
            modules: how many modules it changes.
            whole: the names of the tensors that it stores whole.
        """
        self.made_from = {
            "adapter": {
                "kind": kind,
                "base": self.config.get("base_model_name_or_path"),
                "ranks": ranks,
                "modules": modules,
                "whole": whole,
            }
        }

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the stored tensors; no delta is computed for it."""
        return self.stored.fingerprint

    @property
    def made_on(self) -> str | None:
        """The class of the module that the adapter was made on; None if it isn't stated."""
        mapping = self.config.get("auto_mapping")
        return mapping.get("base_model_class") if isinstance(mapping, Mapping) else None

    def read(self, name: str) -> torch.Tensor:
        raise SpaceError(f"{self.ref} {self.needs_base}, and so needs its base")

    def describe(self) -> dict[str, object]:
        """Return the description of a source, with its kind."""
        kind = self.made_from["adapter"]["kind"]
        return {**super().describe(), "kind": f"{kind} adapter"}
