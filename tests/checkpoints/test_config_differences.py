"""Models with the same tensors that compute something else with them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightops import TaskVector, merge, open_checkpoint
from weightops.cli.main import run
from weightops.errors import MismatchError

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_attention_heads": 2,
    "rope_theta": 1e4,
    "transformers_version": "4.40",
    "torch_dtype": "float32",
    "attention_dropout": 0.0,
    "text_config": {"layer_norm_eps": 1e-5, "pad_token_id": 0},
}


def folder(path: Path, **changes: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file({"w": torch.ones(2)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads: 4 / 2"),
        ({"model_type": "mistral"}, "model_type: mistral / llama"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu / silu"),
        ({"rope_theta": 5e5}, "rope_theta: 500000.0 / 10000.0"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "text_config.layer_norm_eps: 1e-06 / 1e-05"),
        ({"transformers_version": "5.1", "torch_dtype": "bfloat16"}, ""),
        ({"attention_dropout": 0.1, "new_setting": 3}, ""),
    ],
)
def test_what_is_configured_differently_is_said(
    changes: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, other = folder(tmp_path / "base"), folder(tmp_path / "other", **changes)
    with caplog.at_level(logging.WARNING, "weightops"):
        merge([base, other])
    assert said in caplog.text if said else not caplog.text
    caplog.clear()
    TaskVector(base, other)
    assert said in caplog.text


def test_a_rope_base_under_its_new_name_is_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = folder(tmp_path / "base")
    other = folder(tmp_path / "other")
    config = {n: v for n, v in CONFIG.items() if n != "rope_theta"}
    for theta, said in ((1e4, ""), (5e5, "rope_theta: 500000.0 / 10000.0")):
        new = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        (other / "config.json").write_text(json.dumps(new))
        merge([base, other])
        assert said in caplog.text if said else not caplog.text


def test_strict_verbs_refuse_what_is_configured_differently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = folder(tmp_path / "base"), tmp_path / "out.safetensors"
    alike = folder(tmp_path / "alike", transformers_version="5.1")
    other = folder(tmp_path / "other", num_attention_heads=4)
    recipe = tmp_path / "recipe.yaml"
    written = ["-o", out, "--overwrite"]
    for verb, given in {
        "merge BASE MODEL": written,
        "merge MODEL --base BASE": written,
        "merge RECIPE": written,
        "vector BASE MODEL": written,
        "compare BASE MODEL": [],
        "pack MODEL --base BASE": written,
        "evaluate MODEL --base BASE": ["--tasks", "digits"],
    }.items():
        for model in (alike, other):
            recipe.write_text(json.dumps({"models": [str(base), str(model)]}))
            places = {"BASE": base, "MODEL": model, "RECIPE": recipe}
            arguments = [*(places.get(word, word) for word in verb.split()), *given, "--strict"]
            code = run([str(argument) for argument in arguments])
            said = "num_attention_heads: 4 / 2" in capsys.readouterr().err
            assert said == (model is other), verb
            assert bool(code) == (model is other) or verb.startswith("evaluate"), verb
    twin = open_checkpoint(other)
    assert TaskVector(base, alike).apply(twin)["w"].eq(1).all()
    with pytest.raises(MismatchError, match="num_attention_heads: 4 / 2"):
        TaskVector(base, alike).apply(twin, strict=True)
