"""Models whose tensors have other names in memory than in their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_transformers import MODELS

from weightops import TaskVector, open_checkpoint

transformers = pytest.importorskip("transformers", minversion="5")


def edited_by_hand(base: Any, tuned: Any, alpha: float) -> Any:
    """Set a model to ``base + alpha (tuned - base)`` in its own names."""
    with torch.no_grad():
        for parameter, other in zip(base.parameters(), tuned.parameters(), strict=True):
            parameter.lerp_(other, alpha)
    return base


def loaded(kind: str, folder: Path) -> Any:
    """Load a folder with transformers, which must find all that it needs and no more."""
    model, told = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_edits_of_folders_and_modules_are_the_models_that_are_meant(
    name: str, tmp_path: Path
) -> None:
    tiny = MODELS[name]
    base, tuned = tiny.build(0), tiny.build(1)
    folders = [tmp_path / "base", tmp_path / "tuned"]
    for model, folder in zip((base, tuned), folders, strict=True):
        model.save_pretrained(folder)
    assert torch.equal(tiny.outputs(open_checkpoint(folders[1]).model()), tiny.outputs(tuned))
    of_folders = TaskVector(*folders).apply(folders[0], 0.4)
    of_module = TaskVector(folders[0], tuned).apply(folders[0], 0.4)
    module = TaskVector(base, folders[1]).apply(base, 0.4)
    expected = tiny.outputs(edited_by_hand(base, tuned, 0.4))
    for i, checkpoint in enumerate((of_folders, of_module)):
        written = loaded(tiny.kind, checkpoint.save(tmp_path / f"edited{i}"))
        torch.testing.assert_close(tiny.outputs(written), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tiny.outputs(module), expected, atol=1e-5, rtol=1e-4)
