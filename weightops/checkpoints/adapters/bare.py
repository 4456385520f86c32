"""Open files of factors without a configuration, as kohya, diffusers and LyCORIS write them.

The names say what edits a module: ``lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`` or
``unet.mid_block.attentions.0.proj_in.lora_A.weight``. A module's ``alpha`` lies beside its factors,
or diffusers notes it in the file's metadata. To average factors apart averages no edit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from weightops.algebra.source import Source
from weightops.checkpoints.adapters import mlx
from weightops.checkpoints.adapters.adapter import CONFIG, PREFIX, Adapter
from weightops.checkpoints.adapters.factors import BESIDE, ENDS, KINDS, Kind
from weightops.checkpoints.adapters.lora import LoraSource, Selection, is_plain
from weightops.errors import CheckpointError
from weightops.support.json_files import parse_json
from weightops.support.lazy import torch
from weightops.support.text import first_few

_HALVES = (
    (r"[._]lora_A\b", r"[._]lora_B\b", "peft or diffusers"),
    (r"[._]lora_embedding_A\b", r"[._]lora_embedding_B\b", "peft"),
    (r"[._]lora_a\b", r"[._]lora_b\b", "MLX or torchtune"),
    (r"[._]lora_down\b", r"[._]lora_up\b", "kohya"),
    (r"[._]lora\.down\b", r"[._]lora\.up\b", "diffusers"),
    (r"[._]lora_linear_layer\.down\b", r"[._]lora_linear_layer\.up\b", "diffusers"),
    (r"\w_lora\d*\.down\b", r"\w_lora\d*\.up\b", "diffusers or XLabs"),
    (r"\.hada_w1_a\b", r"\.hada_w1_b\b", "LoHa"),
    (r"\.lokr_w1(_a)?\b", r"\.lokr_w2(_[ab])?\b", "LoKr"),
    (r"\.oft_(blocks|diag|R)\b", r"", "OFT"),
    (r"\.base_layer\.(weight|bias)\b|\.modules_to_save\.", r"", "peft"),
    (r"\.(ia3_l|vera_lambda_[bd]|boft_[Rs]|hra_u|miss_block|fourierft_spectrum)\b", r"", "peft"),
    (r"\.(randlora_lambda|shira_weight|c3a_kernel|trainable_tokens_delta)\b", r"", "peft"),
    (r"^(lora_(unet|te\d?|transformer)|lycoris)_", r"", "kohya or LyCORIS"),
)
"""Parts of the names of two factors that stand for one edit, and who writes them."""
_MARKS = (
    *("lora", "hada_w1", "lokr_w", "oft_", "lycoris_", "base_layer", "modules_to_save", "ia3_l"),
    *("vera_lambda", "boft_", "hra_u", "miss_block", "fourierft", "shira", "c3a_", "tokens_delta"),
)
"""What all of these names have in them: models have many tensors, and few such names."""
_PARTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
    "lycoris_": "unet",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "transformer.": "transformer",
    "transformer_2.": "transformer_2",
    "diffusion_model.": "transformer",
}
"""What names begin with -> the folder that diffusers' pipelines have the edited model in."""
_METADATA = "lora_adapter_metadata"
"""The metadata entry of diffusers' files with the settings of peft, by part."""
_UNSCALED = (".lora_A.weight", ".lora_B.weight")
"""Factors that peft and others write, too, and scale by an alpha that isn't in the file."""


_HINT = "merge the adapter into its model with the library that made it"


class Edit(NamedTuple):
    """The edit of one weight or bias.

    Attributes:
        kind: how it is computed.
        names: factor -> stored name.
        scale: the factor of the delta, or None for ``alpha / rank``.
        shape: the shape of the delta, whose dimensions after the first may be flattened.
    """

    kind: Kind
    names: Mapping[str, str]
    scale: float | None
    shape: tuple[int, ...]


class BareAdapter(Adapter):
    """An adapter whose file says by its names alone what it is.

    Args:
        stored: the tensors.
        ref: the name of the adapter in messages.

    Attributes:
        parts: part of a pipeline -> the module's name, without dots, and "weight" or "bias" -> the
            edit; a part that isn't named is "".

    Raises:
        CheckpointError: if the names or shapes are of no kind that is known.
    """

    needs_base = "names no model of which its modules are"

    def __init__(self, stored: Source, ref: str) -> None:
        super().__init__({}, stored, ref)
        factors: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
        for name in stored.specs:
            part, module, factor = self._parsed(name)
            wanted = "bias" if factor.endswith("bias") else "weight"
            factors.setdefault(part, {}).setdefault((module, wanted), {})[factor] = name
        self.parts: dict[str, dict[tuple[str, str], Edit]] = {}
        for part, edits in factors.items():
            scales = self._scales(part)
            self.parts[part] = {key: self._edit(key, names, scales) for key, names in edits.items()}
        every = [edit for edits in self.parts.values() for edit in edits.values()]
        ranks = {stored.specs[e.names[e.kind.rank_of]].shape[0] for e in every if e.kind.rank_of}
        kinds = sorted({edit.kind.name for edit in every})
        self.describe_as(", ".join(kinds), ranks=sorted(ranks), modules=len(every), whole=[])

    def _parsed(self, name: str) -> tuple[str, str, str]:
        """Return the part of a stored name, the name of its module without dots, and its factor."""
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is None:
            raise CheckpointError(
                f"{self.ref} holds {name}, which weightops can't apply", hint=_HINT
            )
        module = name.removesuffix(end)
        if end.startswith("_lora"):  # as diffusers named them until 0.20
            module = _of_processor(module)
        begin = max((begin for begin in _PARTS if module.startswith(begin)), key=len, default="")
        part = _PARTS.get(begin, "")
        stated = (
            part or self.stored.metadata.get(_METADATA) or f"{module}.alpha" in self.stored.specs
        )
        if end in _UNSCALED and not stated:
            raise CheckpointError(
                f"{self.ref} holds {name}, and no alpha by which its edit is scaled",
                hint=f"name a folder with {CONFIG}, as save_pretrained of peft writes it",
            )
        return part, module.removeprefix(begin).replace(".", "_"), ENDS[end]

    def _scales(self, part: str) -> dict[str, float]:
        """Return module -> scale where the file's metadata state the settings of peft."""
        begin = f"{part}." if part else ""
        try:
            noted = parse_json(self.stored.metadata.get(_METADATA, "{}"))
            settings = {n.removeprefix(begin): v for n, v in noted.items() if n.startswith(begin)}
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"the {_METADATA} of {self.ref} aren't sound") from error
        if not settings:
            return {}
        names = {
            n.removeprefix(begin): n
            for n in self.stored.specs
            if n.startswith(begin) and n.endswith(_UNSCALED)
        }
        settings["use_dora"] = False  # its norms are known by their names
        if not is_plain(settings, names):
            raise CheckpointError(f"{self.ref} holds more than a plain LoRA", hint=_HINT)
        pairs = LoraSource(settings, Selection(self.stored, names, self.ref), self.ref).pairs
        return {n.removesuffix(".weight").replace(".", "_"): p.scale for n, p in pairs.items()}

    def _edit(
        self, key: tuple[str, str], names: dict[str, str], scales: Mapping[str, float]
    ) -> Edit:
        """Return the edit of factors whose shapes go together."""
        given = names.keys() - {*BESIDE}
        kind = next((k for k in KINDS if given <= {*k.factors} and k.factors[0] in given), None)
        blank = {f: torch.empty(self.stored.specs[names[f]].shape, device="meta") for f in given}
        try:
            if kind is None:
                raise KeyError(f"{key[0]} has {', '.join(sorted(given)) or 'nothing but alpha'}")
            shape = tuple(kind.compute(blank).shape)
        except (KeyError, RuntimeError, IndexError) as error:
            listed = (f"{name} {self.stored.specs[name].shape}" for name in names.values())
            raise CheckpointError(
                f"{self.ref} holds factors that make no edit: {first_few(listed)}", hint=_HINT
            ) from error
        if not shape or math.prod(shape) > 2**33:
            raise CheckpointError(f"{self.ref} claims a delta of shape {shape} for {key[0]}")
        return Edit(kind, names, scales.get(key[0]), shape)

    def unscaled(self, edit: Edit) -> torch.Tensor:
        """Compute a delta in float32, without its scale."""
        factors = {f: self.stored.read(n).float() for f, n in edit.names.items() if f not in BESIDE}
        return edit.kind.compute(factors)

    def magnitude(self, edit: Edit, dimensions: int) -> torch.Tensor | None:
        """Return the norms of a DoRA, for a weight of some dimensions; None for others."""
        if "magnitude of rows" in edit.names:
            rows = self.stored.read(edit.names["magnitude of rows"]).float()
            return rows.reshape(-1, *[1] * (dimensions - 1))
        name = edit.names.get("magnitude")
        return None if name is None else self.stored.read(name).float()

    def scale_of(self, edit: Edit) -> float:
        """Return the factor of a delta.

        Raises:
            CheckpointError: if its alpha is none.
        """
        if edit.scale is not None:
            return edit.scale
        if "alpha" not in edit.names or not edit.kind.rank_of:
            return 1.0
        alpha = self.stored.read(edit.names["alpha"]).float()
        if alpha.numel() != 1 or not alpha.isfinite().all() or not alpha.any():
            raise CheckpointError(f"{edit.names['alpha']} of {self.ref} is no alpha: {alpha}")
        rank = self.stored.specs[edit.names[edit.kind.rank_of]].shape[0]
        return float(alpha) / rank


def is_unscaled(edit: Edit) -> bool:
    """Return whether nothing says how an edit is scaled, in names that tools of all kinds write."""
    stated = edit.scale is not None or "alpha" in edit.names
    return not stated and any(name.endswith(_UNSCALED) for name in edit.names.values())


def _of_processor(module: str) -> str:
    """Return the module that an attention processor's layer edits.

    >>> _of_processor("mid.attn1.processor.to_out"), _of_processor("layers.0.self_attn.to_q")
    ('mid.attn1.to_out.0', 'layers.0.self_attn.q_proj')
    """
    place, _, layer = module.removesuffix(".").rpartition(".")
    if place.endswith("self_attn"):
        return f"{place}.{layer.removeprefix('to_')}_proj"
    return f"{place.removesuffix('.processor')}.{layer}{'.0' if layer == 'to_out' else ''}"


def opened(source: Source, ref: str) -> Source:
    """Return the adapter that a source's tensors are the factors of; another source unchanged.

    Raises:
        CheckpointError: naming two factors, if they are of an adapter that can't be applied alone.
    """
    found = _halves(source.specs)
    if found is None:
        return source
    if found[0].startswith(PREFIX) or found[2] in ("peft", "MLX or torchtune"):
        raise _unknown(found, ref)
    return BareAdapter(source, ref)


def check_no_halves(names: Iterable[str], ref: str) -> None:
    """Refuse the tensors of a module of which some are the halves of edits.

    Raises:
        CheckpointError: naming two halves and the library that has such names.
    """
    found = _halves(names)
    if found:
        raise _unknown(found, ref)


def _halves(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Return two factors of one edit and the library that has such names, or None."""
    listed = [name for name in names if any(mark in name for mark in _MARKS)]
    for first, second, library in _HALVES:
        a = next((name for name in listed if re.search(first, name)), None)
        b = next((name for name in listed if re.search(second or first, name)), None)
        if a and b:
            return a, b, library
    return None


def _unknown(halves: tuple[str, str, str], ref: str) -> CheckpointError:
    first, second, library = halves
    what = f"{first} and {second} are factors of one edit, and weights of none"
    if first == second:
        what = f"{first} is a part of an edit, or of what it edits"
    return CheckpointError(
        f"{ref} holds an adapter without its configuration, in names of {library}: {what}",
        hint=f"name a folder with {CONFIG}, as save_pretrained of peft writes it; or {_HINT}",
    )


def folder_of(file: Path) -> Path | None:
    """Return the configuration of the adapter that a file is the weights of; None for others."""
    config = file.parent / CONFIG
    named = file.stem == "adapter_model" or file.name == mlx.WEIGHTS
    return config if named and config.is_file() else None
