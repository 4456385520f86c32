"""LoRA adapters: equal to peft's, in arithmetic and merging, and written from task vectors."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.transformers_folders import small_gpt2
from safetensors.torch import load_file, save_file
from torch import nn

from weightops import TaskVector, merge, open_checkpoint
from weightops.checkpoints.opening import open_any
from weightops.cli.main import run
from weightops.errors import (
    CheckpointError,
    MismatchError,
    MissingExtraError,
    OptionError,
    SpaceError,
)


class Mixer(nn.Module):
    """A plain model with a linear layer, a convolution, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 4, 3)
        self.head = nn.Linear(4, 2)
        self.config = {"model_type": "custom"}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(self.embed(tokens)).relu())
        logits: torch.Tensor = self.head(self.conv(hidden.transpose(1, 2)).mean(-1))
        return logits


def adapted(folder: Path, base: nn.Module, **settings: Any) -> tuple[nn.Module, Path]:
    """Return a model with a random adapter by peft, and the folder that peft saves it to."""
    import copy

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"], **settings}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                    assert "lora" in name or "modules_to_save" in name or "bias" in name
        model.save_pretrained(folder)
    return model.eval(), folder


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return Mixer().eval()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "ranks and alphas by module": {"rank_pattern": {"first": 2}, "alpha_pattern": {"^second": 7}},
    "convolution": {"target_modules": ["conv", "first"]},
    "embedding": {"target_modules": ["embed", "second"]},
    "whole modules": {"modules_to_save": ["head"]},
    "biases": {"bias": "lora_only"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft_computes(base: nn.Module, tmp_path: Path, kind: str) -> None:
    model, folder = adapted(tmp_path / "adapter", base, **KINDS[kind])
    tokens = torch.arange(10).reshape(2, 5)
    edited = TaskVector(base, folder).apply(base)
    with torch.no_grad():
        assert torch.allclose(edited(tokens), model(tokens), atol=1e-5)
        assert not torch.allclose(base(tokens), model(tokens), atol=1e-2)
        assert torch.allclose(TaskVector(base, folder).apply(base, 0.0)(tokens), base(tokens))


def test_fan_in_fan_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt = small_gpt2()
    gpt.save_pretrained(tmp_path / "base")
    model, folder = adapted(
        tmp_path / "adapter", gpt, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    tokens = torch.tensor([[1, 2, 3]])
    edited = TaskVector(tmp_path / "base", folder).apply(tmp_path / "base").model()
    with torch.no_grad():
        assert torch.allclose(edited(tokens).logits, model(tokens).logits, atol=1e-5)


def test_arithmetic_and_merging_with_full_checkpoints(base: nn.Module, tmp_path: Path) -> None:
    _, folder = adapted(tmp_path / "adapter", base)
    full = {
        name: tensor + 0.1 if tensor.ndim == 2 else tensor
        for name, tensor in base.state_dict().items()
    }
    vector = TaskVector.load(folder)
    assert set(vector) == {"first.weight", "second.weight"}
    weights = load_file(folder / "adapter_model.safetensors")
    b, a = (weights[f"base_model.model.first.lora_{half}.weight"] for half in "BA")
    assert torch.allclose(vector["first.weight"], 5 / 3 * b @ a)
    both = (TaskVector(base, full) - vector).apply(open_checkpoint(base))
    assert torch.allclose(both["first.weight"], base.first.weight + 0.1 - 5 / 3 * b @ a, atol=1e-6)
    assert torch.allclose(both["head.weight"], base.head.weight + 0.1)
    assert set(merge([folder, full], "ties", base=open_checkpoint(base))) == set(full)


def test_on_the_command_line(
    base: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = adapted(tmp_path / "adapter", base)
    pre = str(open_checkpoint(base).save(tmp_path / "pre.safetensors"))
    vector, edited, merged = (str(tmp_path / f"{x}.safetensors") for x in ("v", "e", "m"))
    assert run(["vector", pre, str(folder), "-o", vector]) == 0
    assert torch.allclose(
        TaskVector.load(vector)["first.weight"], TaskVector.load(folder)["first.weight"]
    )
    assert run(["apply", str(folder), "--base", pre, "--alpha", "-1", "-o", edited]) == 0
    capsys.readouterr()
    assert run(["inspect", str(folder)]) == 0
    assert "LoRA of rank " in capsys.readouterr().out
    options = ["--method", "ties", "--base", pre, "-o", merged]
    assert run(["merge", str(folder), pre, *options]) == 0


def test_on_a_clip_model_of_open_clip(tmp_path: Path) -> None:
    """An adapter of transformers' q and v changes two thirds of open_clip's in_proj_weight."""
    from helpers.clip_models import of_hf, of_open_clip

    hf = of_hf(1)
    _, folder = adapted(tmp_path / "adapter", hf, target_modules=["q_proj", "v_proj"])
    ours = of_open_clip(0).state_dict()
    delta = TaskVector(ours, folder)["visual.transformer.resblocks.0.attn.in_proj_weight"].chunk(3)
    theirs = TaskVector.load(folder)
    q, v = (theirs[f"vision_model.encoder.layers.0.self_attn.{x}_proj.weight"] for x in "qv")
    assert torch.allclose(delta[0], q, atol=1e-6)
    assert torch.equal(delta[1], torch.zeros_like(q))
    assert torch.allclose(delta[2], v, atol=1e-6)


REFUSED = {
    "is in one of them only": {"use_dora": True},
    "lora_B.default.bias": {"lora_bias": True},
    "started by pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "which IA3 of peft": {"peft_type": "IA3", "feedforward_modules": []},
    "kind SOMETHING": {"peft_type": "SOMETHING"},
    "works on inputs": {"peft_type": "PREFIX_TUNING"},
    "kind XLORA, which works": {"peft_type": "XLORA"},
    "needs Megatron's own layers": {"megatron_config": {"a": 1}},
    "is too complicated": {"use_dora": True, "target_modules": "(.a.b.c+.*)+"},
    "says 4": {"r": 4},
    "too complicated a pattern": {"rank_pattern": {"(a+)+b": 2}},
    "alpha None": {"lora_alpha": None},
    "is not a pattern": {"alpha_pattern": {"[": 2}},
    "repeats layers of its base": {"layer_replication": [[0, 1]]},
    "asks for use_everything, which LORA of peft": {"use_dora": True, "use_everything": True},
}


def test_what_would_be_read_wrongly_is_refused_by_name(base: nn.Module, tmp_path: Path) -> None:
    _, folder = adapted(tmp_path / "adapter", base)
    sound = json.loads((folder / "adapter_config.json").read_text())
    for message, settings in REFUSED.items():
        (folder / "adapter_config.json").write_text(json.dumps({**sound, **settings}))
        with pytest.raises(CheckpointError, match=message):
            TaskVector(base, folder)
    (folder / "adapter_config.json").write_text(json.dumps(sound))
    weights = load_file(folder / "adapter_model.safetensors")
    first = "base_model.model.first."
    for change, message in (
        ({first + "lora_magnitude_vector": torch.ones(8)}, "no part of a plain LoRA"),
        ({first + "lora_A.weight": torch.ones(3, 6, 2)}, "isn't one of LoRA"),
        (
            {"base_model.model.third.lora_A.weight": torch.ones(3, 6)},
            "only one half of the pair of third",
        ),
    ):
        save_file({**weights, **change}, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            TaskVector(base, folder)
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match=r"only in the second: first\.weight"):
        TaskVector(nn.Linear(2, 2), folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors beside it"):
        open_any(folder)
    _, whole = adapted(tmp_path / "whole", base, modules_to_save=["head"])
    with pytest.raises(SpaceError, match="replaces whole modules, and so needs its base"):
        TaskVector.load(whole)
    with pytest.raises(SpaceError, match="holds an adapter, not weights"):
        open_checkpoint(whole)


def test_the_nearest_lora_of_a_task_vector(base: nn.Module, tmp_path: Path) -> None:
    from peft import PeftModel

    _, folder = adapted(tmp_path / "adapter", base)
    exact = TaskVector.load(folder)
    error = exact.save_lora(tmp_path / "same", 3)
    assert "The LoRA of rank 3" in (tmp_path / "same" / "README.md").read_text()
    assert error["relative_error"] < 1e-5
    assert all(
        torch.allclose(TaskVector.load(tmp_path / "same")[name], exact[name], atol=1e-6)
        for name in exact
    )
    torch.manual_seed(2)
    full = {
        name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in base.state_dict().items()
    }
    vector = TaskVector(base, full)
    errors = [vector.save_lora(tmp_path / f"rank{rank}", rank) for rank in (1, 2, 4)]
    assert errors[0]["relative_error"] > errors[1]["relative_error"] > errors[2]["relative_error"]
    assert errors[0]["left_out"] == 4  # biases
    written = TaskVector.load(tmp_path / "rank2")
    u, s, vh = torch.linalg.svd(vector["second.weight"])
    assert torch.allclose(written["second.weight"], u[:, :2] * s[:2] @ vh[:2], atol=1e-6)
    difference = vector - written
    assert difference.norm() / vector.norm() == pytest.approx(errors[1]["relative_error"], rel=1e-4)
    tokens = torch.arange(10).reshape(2, 5)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "rank2")).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.allclose(theirs(tokens), written.apply(Mixer().eval())(tokens), atol=1e-5)
    with pytest.raises(OptionError, match="no matrix of the task vector changed"):
        TaskVector(full, full).save_lora(tmp_path / "none", 2)
    assert not (tmp_path / "none").exists()


def test_patterns_with_several_wildcards(base: nn.Module, tmp_path: Path) -> None:
    """The first pattern of the saved configuration, whose keys peft sorts, counts."""
    ranks = {r".*f.*r.*s.*t": 2, r"(s|z)?e.?c.*": 4}
    tokens = torch.arange(10).reshape(2, 5)
    model, folder = adapted(tmp_path / "adapter", base, rank_pattern=ranks)
    with torch.no_grad():
        got = TaskVector(base, folder).apply(base)(tokens)
        assert torch.allclose(got, model(tokens), atol=1e-5)


def test_without_peft(base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = adapted(tmp_path / "plain", base)
    _, dora = adapted(tmp_path / "dora", base, use_dora=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "first.weight" in TaskVector(base, plain)
    with pytest.raises(MissingExtraError, match=r"peft is needed to merge .*dora"):
        TaskVector(base, dora)
