"""Comparisons of task vectors, against numpy in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from weightops import TaskVector, compare, open_checkpoint
from weightops.cli.main import run
from weightops.errors import MismatchError, OptionError

SHAPES = {
    "embed.weight": (90, 80),
    "layers.0.a.weight": (70, 66),
    "layers.0.b.bias": (70,),
    "layers.1.a.weight": (70, 66),
    "frozen": (5,),
}


@pytest.fixture
def states() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    step = [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(2)]
    mixes = ((1.0, 0.0), (0.6, 0.8), (0.0, 2.0))
    return [
        base,
        *(
            {n: t + (a * step[0][n] + b * step[1][n]) * (n != "frozen") for n, t in base.items()}
            for a, b in mixes
        ),
    ]


def test_against_float64(states: list[dict[str, torch.Tensor]]) -> None:
    base, *tuned = states
    comparison = compare(tuned, base=base, spectra=True)
    d = np.stack(
        [
            np.concatenate([(s[n].double() - base[n].double()).numpy().ravel() for n in SHAPES])
            for s in tuned
        ]
    )
    norms = np.linalg.norm(d, axis=1)
    np.testing.assert_allclose(comparison.norms, norms, rtol=1e-5)
    np.testing.assert_allclose(comparison.cosines, d @ d.T / np.outer(norms, norms), atol=1e-5)
    changed = d[:, np.abs(d).sum(0) > 0]
    conflict = [[np.mean(x * y < 0) for y in changed] for x in changed]
    np.testing.assert_allclose(comparison.conflicts, conflict, atol=1e-3)
    assert list(comparison.layers()) == ["embed.weight", "layers.0", "layers.1", "frozen"]
    for layer, (_, _, conflicts) in comparison.by_layer.parts.items():
        parts = [n for n in SHAPES if n.startswith(layer)]
        x, y = (
            np.concatenate([(s[n] - base[n]).numpy().ravel() for n in parts]) for s in tuned[:2]
        )
        assert conflicts[0, 1].item() == pytest.approx(np.mean(x * y < 0), abs=1e-3)
    assert "frozen" not in comparison.by_layer.parts
    assert comparison.overlaps is not None
    names = [n for n, s in SHAPES.items() if len(s) == 2]
    deltas = [[(s[n].double() - base[n].double()).numpy() for n in names] for s in tuned]
    spectrum = np.mean(
        [(v := np.linalg.svd(m, compute_uv=False) ** 2)[:64] / v.sum() for m in deltas[0]], axis=0
    )
    np.testing.assert_allclose(comparison.spectra["vector 1"], spectrum, atol=1e-5)
    u, v = ([np.linalg.svd(m)[0][:, :8] for m in deltas[i]] for i in (0, 1))
    overlap = np.mean(
        [(np.linalg.svd(a.T @ b, compute_uv=False) ** 2).mean() for a, b in zip(u, v, strict=True)]
    )
    assert comparison.overlaps[0, 1].item() == pytest.approx(overlap, abs=1e-4)


def test_the_command(
    states: list[dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        str(open_checkpoint(s).save(tmp_path / f"m{i}.safetensors")) for i, s in enumerate(states)
    ]
    saved = [
        str(TaskVector(paths[0], p).save(tmp_path / f"v{i}.safetensors"))
        for i, p in enumerate(paths[1:])
    ]
    assert run(["compare", *paths, "-o", str(tmp_path / "g.png"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["names"] == ["m1", "m2", "m3"]
    assert result["unchanged"] == ["frozen"]
    assert (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG"
    assert run(["compare", *saved, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(again["cosines"], result["cosines"], atol=1e-5)
    assert run(["compare", *saved, "--spectra", "--per-tensor"]) == 0
    assert "overlap of subspaces" in capsys.readouterr().out
    assert run(["compare", paths[0], paths[1]]) == 0
    assert "m1" in capsys.readouterr().out
    assert run(["compare", saved[0]]) == 2
    assert "at least two task vectors" in capsys.readouterr().err
    with pytest.raises(OptionError, match=r"m1 holds weights, and there is no base\nhint: .*base="):
        compare(paths[1:])


def test_vectors_of_other_names(states: list[dict[str, torch.Tensor]]) -> None:
    base, a, b, _ = states
    wrapped = [{f"module.{name}": tensor for name, tensor in state.items()} for state in (base, b)]
    first, second, other = TaskVector(base, a), TaskVector(base, b), TaskVector(*wrapped)
    assert first.cosine(other) == first.cosine(second) == pytest.approx(0.6, abs=0.05)
    assert first.dot(other, per_tensor=True) == first.dot(second, per_tensor=True)
    comparison = compare([first, other], spectra=True)
    expected = compare([first, second], spectra=True)
    assert torch.equal(comparison.cosines, expected.cosines)
    assert comparison.overlaps is not None
    assert expected.overlaps is not None
    assert torch.equal(comparison.overlaps, expected.overlaps)
    assert first.select("layers.0.*").cosine(other.select("module.layers.0.*")) == pytest.approx(
        first.select("layers.0.*").cosine(second.select("layers.0.*"))
    )


def test_vectors_with_nothing_in_common() -> None:
    first, second = (TaskVector({n: torch.zeros(2)}, {n: torch.ones(2)}) for n in ("a.x", "b.y"))
    for compared in (first.dot, first.cosine, lambda vector: compare([first, vector])):
        with pytest.raises(MismatchError, match="no tensor name in common"):
            compared(second)
