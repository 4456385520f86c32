"""Put adapters together into one: exactly by joining their matrices, or to a rank.

``sum_i c_i s_i B_i A_i = [c_1 s_1 B_1, c_2 s_2 B_2, ...] [A_1; A_2; ...]``. The rank of the result
is the sum of the ranks. The base's weights have no part in it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from weightops.algebra.linear_form import LinearForm
from weightops.algebra.scratch import Scratch
from weightops.algebra.source import Source
from weightops.checkpoints.adapters.adapter import CONFIG, PREFIX, WEIGHTS
from weightops.checkpoints.adapters.lora import HALF, LoraSource
from weightops.checkpoints.adapters.writing import adapter_config, best_pair, facts_of_adapter
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.formats.compressed import float_tensor, squared_norm, write_tensors
from weightops.checkpoints.output_layout import write_records
from weightops.engine.evaluate import OnNonfinite, report_nonfinite
from weightops.engine.layout import Estimate
from weightops.engine.ranks import ONE_RANK, Ranks
from weightops.errors import MismatchError, NonfiniteError, OptionError, SpaceError
from weightops.support.atomic import Overwrite, atomic_output, check_free
from weightops.support.json_files import write_json
from weightops.support.lazy import torch

log = logging.getLogger("weightops")

_Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"


class JoinedAdapter(Checkpoint):
    """Adapters that are merged into one; `save` writes a folder that peft loads.

    Args:
        form: the merged deltas.
        adapters: the adapters.
        rank: the most rank of a module, or None for what an exact result needs.

    Attributes:
        relative_error: of what `save` wrote, the norm of the error over that of the merged deltas.
    """

    def __init__(
        self, form: LinearForm, adapters: Sequence[LoraSource], rank: int | None = None
    ) -> None:
        super().__init__(form)
        self._adapters, self._rank = list(adapters), rank
        self.relative_error = 0.0
        if rank is not None and rank < 1:
            raise OptionError(f"a rank is at least 1, not {rank}")

    def to(self, dtype: torch.dtype | str) -> JoinedAdapter:
        """Refuse another dtype: the matrices are written in the precision of the sum."""
        raise OptionError("an adapter is written in float32", hint="leave out the dtype")

    def estimate(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        max_shard_size: int | None = None,
    ) -> Estimate:
        """Refuse: the size of a merged adapter is known when it is made."""
        raise OptionError("a dry run is for weights: an adapter is small, and is made at once")

    def save(
        self,
        path: str | Path,
        *,
        overwrite: Overwrite = False,
        dtype: torch.dtype | str | None = None,
        max_shard_size: int | None = None,
        on_nonfinite: OnNonfinite = "warn",
        ranks: Ranks = ONE_RANK,
        **_: Any,
    ) -> Path:
        """Write the adapter, whole or not at all.

        Args:
            path: the folder.
            overwrite: replace a folder that exists.
            dtype: not for adapters.
            max_shard_size: not for adapters.
            on_nonfinite: what to do about NaN and Inf in the result: "ignore", "warn" or "error".
            ranks: the processes that share the work; the first one writes.

        Returns:
            The path.

        Raises:
            OptionError: if the path is a file, or the method gives no product of few columns.
            MismatchError: if the adapters don't go together.
            OutputError: if the folder exists or can't be written.
        """
        path = Path(path)
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
            raise OptionError(f"{path}: an adapter is a folder")
        if dtype is not None:
            self.to(dtype)
        if max_shard_size is not None:
            raise OptionError("an adapter is one file", hint="leave out max_shard_size=")
        if ranks.first:
            inputs = [file.path for file in self.form.files]
            check_free(path, overwrite=overwrite, inputs=inputs)
            with atomic_output(path, overwrite=overwrite) as stage:
                stage.mkdir()
                self._write(stage, on_nonfinite)
                facts = facts_of_adapter(self._adapters[0].config.get("task_type"))
                write_records(stage, self, facts=facts, device="cpu", name=path.name)
        return path

    def _write(self, folder: Path, on_nonfinite: OnNonfinite) -> None:
        tensors: dict[str, torch.Tensor] = {}
        found: dict[str, int] = {}
        total = lost = 0.0
        for name in self.form.specs:
            (a, b), squares = self._pair(name)
            total, lost = total + squares[0], lost + squares[1]
            module = name.removesuffix(".weight")
            owner = self._first_with(name)
            for half, tensor in ((owner.pairs[name].a, a), (owner.pairs[name].b, b)):
                tensors[f"{PREFIX}{half.removeprefix(PREFIX)}"] = tensor.contiguous()
            found[module] = len(a)
        tensors |= (whole := self._whole())
        report_nonfinite((n for n, t in tensors.items() if not t.isfinite().all()), on_nonfinite)
        self.relative_error = math.sqrt(lost / total) if total else 0.0
        if lost:
            log.warning(
                "the merged adapter of rank %s lacks %.3g of its norm",
                self._rank,
                self.relative_error,
            )
        record = {"lora": {"relative_error": self.relative_error}, "recipe": self.recipe}
        write_tensors(folder / WEIGHTS, tensors, record)
        write_json(folder / CONFIG, self._config(found, whole))

    def _first_with(self, name: str) -> LoraSource:
        return next(adapter for adapter in self._adapters if name in adapter.specs)

    def _pair(self, name: str) -> tuple[_Pair, tuple[float, float]]:
        """Return A and B of a module, and the squared norms of its delta and of what is lost."""
        terms = _terms(self.form, name)
        if terms is None and self.form.rank(name) is not None:
            return self._compressed_factors(name)
        if terms is None:
            return self._nearest(name)
        parts = []
        for adapter, coefficient in terms.items():
            pair = adapter.pairs[name]
            a, b = (adapter.stored.read(half).float() for half in (pair.a, pair.b))
            parts.append((a, b * (coefficient * pair.scale)))
        if not parts:  # all have the coefficient 0
            pair = self._first_with(name).pairs[name]
            a, b = (self._first_with(name).stored.read(half).float() for half in (pair.a, pair.b))
            parts = [(a[:1], torch.zeros_like(b[:, :1]))]
        a, b = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1)
        return _compressed(a, b, self._rank)

    def _compressed_factors(self, name: str) -> tuple[_Pair, tuple[float, float]]:
        """Return the pair of a delta that a method gives as a product."""
        b, a = self.form.factors(name)
        transposed = self._first_with(name).pairs[name].transposed
        (a, b) = (b.T, a.T) if transposed else (a, b)
        return _compressed(a.float(), b.float(), self._rank)

    def _nearest(self, name: str) -> tuple[_Pair, tuple[float, float]]:
        """Return the pair that is nearest to a delta that is no sum of products."""
        if self._rank is None:
            raise OptionError(
                f"{self.ref} is no sum of adapters, and so no adapter of a rank that is known",
                hint="rank=16 writes the nearest of rank 16; base=... merges into weights",
            )
        owner = self._first_with(name)
        pair = owner.pairs[name]
        delta = float_tensor(self.form, name)
        matrix = delta.T if pair.transposed else delta.flatten(1)
        a, b = best_pair(matrix, min(self._rank, *matrix.shape))
        lost = squared_norm(matrix - b @ a)
        a = a.reshape(-1, *owner.stored.specs[pair.a].shape[1:])
        b = b.reshape(len(b), -1, *owner.stored.specs[pair.b].shape[2:])
        return (a, b), (squared_norm(matrix), lost)

    def _whole(self) -> dict[str, torch.Tensor]:
        """Return the tensors that the adapters save whole, averaged.

        Raises:
            MismatchError: if their average isn't known without a base.
        """
        held = {n for each in self._adapters for n in each.stored.specs if not _is_half(n)}
        result = {}
        coefficients = _shares(self.form, self._adapters)
        for name in sorted(held):
            tensors = [
                each.stored.read(name) for each in self._adapters if name in each.stored.specs
            ]
            everywhere = len(tensors) == len(self._adapters)
            if ".base_layer." in name and all(torch.equal(tensors[0], t) for t in tensors[1:]):
                result[name] = tensors[0]  # the base's own, which peft saves beside embeddings
            elif everywhere and coefficients and abs(math.fsum(coefficients) - 1) < 1e-12:
                pairs = zip(coefficients, tensors, strict=True)
                result[name] = torch.stack([c * t.float() for c, t in pairs]).sum(0)
                result[name] = result[name].to(tensors[0].dtype)
            else:
                raise MismatchError(
                    f"{name} is replaced by some of {self.ref}, and the weights don't average it",
                    hint="base=... merges into weights",
                )
        return {f"{PREFIX}{n.removeprefix(PREFIX)}": t for n, t in result.items()}

    def _config(self, found: Mapping[str, int], whole: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``."""
        configs = [adapter.config for adapter in self._adapters]
        bases = {config.get("base_model_name_or_path") for config in configs}
        if len(bases) > 1:
            log.warning(
                "the adapters were made on several bases: %s", ", ".join(sorted(map(str, bases)))
            )
        rank = max(found.values())
        other = {f"^{re.escape(module)}": r for module, r in found.items() if r != rank}
        saved = {name for config in configs for name in config.get("modules_to_save") or ()}
        first = {key: configs[0].get(key) for key in ("task_type", "auto_mapping")}
        if configs[0].get("revision"):
            first["revision"] = configs[0]["revision"]  # of the base
        return {
            **adapter_config(list(found), rank, configs[0].get("base_model_name_or_path")),
            **first,
            "rank_pattern": other,
            "alpha_pattern": other,
            "fan_in_fan_out": any(config.get("fan_in_fan_out") is True for config in configs),
            "modules_to_save": sorted(saved) or None,
            "bias": next((c["bias"] for c in configs if c.get("bias", "none") != "none"), "none"),
            "ensure_weight_tying": any(config.get("ensure_weight_tying") for config in configs),
        }


def _is_half(name: str) -> bool:
    return HALF.fullmatch(name.removeprefix(PREFIX)) is not None


def _terms(form: LinearForm, name: str) -> dict[LoraSource, float] | None:
    """Return adapter -> coefficient at a delta; None if it is no sum of adapters."""
    terms: dict[Source, float] = {}
    for source, coefficient in form.coefficients(name).items():
        inner = source.combination(name, Scratch())
        for part, value in ({source: 1.0} if inner is None else inner).items():
            terms[part] = terms.get(part, 0.0) + coefficient * value
    found = {source: value for source, value in terms.items() if isinstance(source, LoraSource)}
    return found if len(found) == len(terms) else None


def _shares(form: LinearForm, adapters: Sequence[LoraSource]) -> list[float] | None:
    """Return the coefficient of each adapter, if it is one for all tensors."""
    terms = {factor.source: c for factor, c in form.terms.items() if not factor.rules}
    known = len(terms) == len(form.terms) and all(t in adapters for t in terms)
    return [terms.get(adapter, 0.0) for adapter in adapters] if known else None


def _compressed(
    a: torch.Tensor, b: torch.Tensor, rank: int | None
) -> tuple[_Pair, tuple[float, float]]:
    """Return the nearest pair of a rank, and the squared norms of the product and of the error.

    The singular values are those of a small matrix: ``B A = Q_b (R_b R_a^T) Q_a^T``.
    """
    left, right = b.flatten(1).double(), a.flatten(1).double()
    if rank is None or len(a) <= rank:
        return (a, b), (float(((left.T @ left) * (right @ right.T)).sum()), 0.0)
    if not (left.isfinite().all() and right.isfinite().all()):
        raise NonfiniteError("the matrices of the adapters hold NaN or Inf")
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    new_a = (root[:, None] * (vh[:rank] @ q_a.T)).float().reshape(-1, *a.shape[1:])
    new_b = (q_b @ (u[:, :rank] * root)).float().reshape(len(b), -1, *b.shape[2:])
    squares = s.square()
    return (new_a, new_b), (float(squares.sum()), float(squares[rank:].sum()))


def check_joinable(adapters: Sequence[Source]) -> list[LoraSource]:
    """Return adapters as plain LoRAs, whose matrices can be joined.

    Raises:
        SpaceError: naming one that is more than a sum of products.
    """
    plain = []
    for adapter in adapters:
        if not isinstance(adapter, LoraSource):
            raise SpaceError(
                f"{adapter.ref} is no plain LoRA, and can't be merged without its base",
                hint="name the base that the adapters are merged into: base=...",
            )
        # The matrices don't depend on how the base keeps its weights.
        config = {**adapter.config, "fan_in_fan_out": False}
        plain.append(LoraSource(config, adapter.stored, adapter.ref))
    return plain
