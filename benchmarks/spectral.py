"""TSV-M and Iso-C against their formulas as published: time, and error against float64.

The formulas are run as the papers' code runs them: thin singular value decompositions of each
matrix as it is, in float32. weightops works on the transpose where a matrix is wide, or on its
smaller Gram matrix, in float64. By default the matrices are those of a block of ViT-B/32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from weightops.merging.methods.spectral import iso_c, tsv_m

Method = Callable[[torch.Tensor], torch.Tensor]


def published_tsv_m(deltas: torch.Tensor) -> torch.Tensor:
    """Return TSV-M by its formula: decompositions of each task, then of the joined vectors."""
    rank = max(1, min(deltas.shape[1:]) // len(deltas))
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = torch.cat([u[:, :rank] for u, _, _ in parts], dim=1)
    right = torch.cat([vh[:rank] for _, _, vh in parts])
    scale = torch.cat([s[:rank] for _, s, _ in parts])
    (a, _, b), (c, _, d) = (torch.linalg.svd(m, full_matrices=False) for m in (left, right))
    return (a @ b * scale) @ (c @ d)


def published_iso_c(deltas: torch.Tensor) -> torch.Tensor:
    """Return Iso-C by its formula."""
    u, s, vh = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    return s.mean() * (u @ vh)


BLOCK = ["2304x768", "768x768", "3072x768", "768x3072"]
"""The matrices of one block of ViT-B/32."""

METHODS: dict[str, tuple[Method, Method]] = {
    "tsv_m": (tsv_m, published_tsv_m),
    "iso_c": (iso_c, published_iso_c),
}


def timed(method: Method, deltas: torch.Tensor, repeats: int) -> tuple[float, torch.Tensor]:
    """Return the least seconds of some runs, and the result."""
    best, result = float("inf"), deltas
    for _ in range(repeats):
        start = time.perf_counter()
        result = method(deltas.clone())
        best = min(best, time.perf_counter() - start)
    return best, result


def measure(name: str, shape: tuple[int, int], tasks: int, repeats: int) -> dict[str, Any]:
    """Return seconds and errors of one method on matrices like those of fine-tuning."""
    ours, published = METHODS[name]
    generator = torch.Generator().manual_seed(0)
    decay = torch.linspace(0, -6, min(shape)).exp()
    height, width = shape
    deltas = torch.stack(
        [
            (torch.randn(height, min(shape), generator=generator) * decay)
            @ torch.randn(min(shape), width, generator=generator)
            for _ in range(tasks)
        ]
    )
    exact = published(deltas.double())
    (own, result), (other, reference) = (timed(m, deltas, repeats) for m in (ours, published))
    errors = [float((r.double() - exact).norm() / exact.norm()) for r in (result, reference)]
    return {
        "method": name,
        "shape": f"{height} x {width}",
        "seconds": round(own, 3),
        "published_seconds": round(other, 3),
        "times_as_fast": round(other / own, 2),
        "error": errors[0],
        "published_error": errors[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=BLOCK)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in METHODS:
        total = published = 0.0
        for shape in given.shapes:
            height, _, width = shape.partition("x")
            row = measure(name, (int(height), int(width)), given.tasks, given.repeats)
            print(json.dumps(row), flush=True)
            total, published = total + row["seconds"], published + row["published_seconds"]
        print(json.dumps({"method": name, "all_shapes_times_as_fast": round(published / total, 2)}))


if __name__ == "__main__":
    main()
