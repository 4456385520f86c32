"""Weights in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from weightops import TaskVector, open_checkpoint


def test_lazy_conjugates_and_negatives_are_what_they_show(tmp_path: Path) -> None:
    torch.manual_seed(0)
    z = torch.randn(5, dtype=torch.complex64)
    state = {"z": z, "conjugate": z.conj(), "imaginary": z.conj().imag}
    assert state["imaginary"].is_neg()
    saved = open_checkpoint(open_checkpoint(state).save(tmp_path / "model.safetensors"))
    for name, tensor in state.items():
        assert torch.equal(saved[name], tensor.resolve_conj().resolve_neg()), name
    tau = TaskVector({"a": torch.zeros(5)}, {"a": state["imaginary"]})
    assert torch.equal(tau.apply({"a": torch.zeros(5)}, 1.0)["a"], -z.imag)
