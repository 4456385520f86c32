"""Checkpoints under other names: wrappers, both CLIP libraries, and image encoders alone."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.clip_models import of_hf, of_open_clip
from safetensors.torch import load_file, save_file
from torch import nn

from weightops import Checkpoint, TaskVector, merge, open_checkpoint
from weightops.checkpoints.clip_names import from_transformers, mappings
from weightops.checkpoints.matching import match_to_base, open_matched
from weightops.cli.main import run
from weightops.errors import MismatchError

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def image_encoder(
    state: dict[str, torch.Tensor], prefix: str = "vision_model."
) -> dict[str, torch.Tensor]:
    return {
        prefix + n.removeprefix("vision_model."): t
        for n, t in state.items()
        if n.startswith("vision_model.")
    }


@pytest.fixture(scope="module")
def states() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base in open_clip's names, and two checkpoints in transformers'."""
    return of_open_clip(0).state_dict(), of_hf(1).state_dict(), of_hf(2).state_dict()


def test_features_of_both_libraries_agree() -> None:
    ours, theirs = of_open_clip(0), of_hf(1)
    match_to_base(open_checkpoint(theirs), open_checkpoint(ours)).load_into(ours)
    images = torch.randn(3, 3, 32, 32)
    texts = torch.randint(1, 90, (3, 16))
    texts[:, 10] = 98
    with torch.no_grad():
        image = theirs.get_image_features(pixel_values=images)
        text = theirs.get_text_features(input_ids=texts)
        assert torch.allclose(
            ours.encode_image(images), getattr(image, "pooler_output", image), atol=1e-5
        )
        assert torch.allclose(
            ours.encode_text(texts), getattr(text, "pooler_output", text), atol=1e-5
        )


def test_there_and_back_to_the_bit(states: Any) -> None:
    base, ft, _ = map(open_checkpoint, states)
    back = match_to_base(match_to_base(ft, base), ft)
    assert list(match_to_base(ft, base)) != list(ft)
    assert {n: t.shape for n, t in back.state_dict().items()} == {
        n: t.shape for n, t in ft.state_dict().items()
    }
    assert all(torch.equal(back[name], ft[name]) for name in ft)


def test_task_vectors_across_the_libraries(states: Any, tmp_path: Path) -> None:
    base, ft, other = states
    vector = TaskVector(base, ft)
    edited = vector.apply(base, 1.0)
    assert all(
        torch.equal(match_to_base(open_checkpoint(edited), open_checkpoint(ft))[n], t)
        for n, t in ft.items()
    )
    half = vector.apply(ft, -0.5)  # to a base in transformers' names, the result has them too
    assert half.keys() == ft.keys()
    q = base["visual.transformer.resblocks.1.attn.in_proj_weight"][:64]
    name = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    assert torch.allclose(half[name], ft[name] - 0.5 * (ft[name] - q), atol=1e-6)
    both = TaskVector(base, ft) + TaskVector(ft, other)
    assert len(both) == len(base)
    assert torch.allclose(
        both["visual.proj"], other["visual_projection.weight"].T - base["visual.proj"], atol=1e-6
    )
    mean = merge([base, ft, other])
    assert torch.allclose(
        mean["ln_final.bias"],
        sum(s["text_model.final_layer_norm.bias"] for s in (ft, other)) / 3
        + base["ln_final.bias"] / 3,
    )
    ties = merge([ft, other], "ties", base=base, density=0.5)
    assert set(ties) == set(base)
    chosen = vector.select("visual.*").apply(ft, 1.0)
    assert torch.equal(chosen["text_projection.weight"], ft["text_projection.weight"])
    with pytest.raises(MismatchError, match="have different coefficients, and are one tensor"):
        TaskVector(ft, other).apply(base, {"*.q_proj.*": 1.0, "*.v_proj.*": 0.5})
    save_file({n: t.contiguous() for n, t in ft.items()}, tmp_path / "model.safetensors")
    saved = vector.apply(open_checkpoint(tmp_path / "model.safetensors"), -0.5).save(
        tmp_path / "out.safetensors"
    )
    assert all(torch.equal(t, half[n]) for n, t in load_file(saved).items())


@pytest.mark.parametrize("prefix", ["vision_model.", "", "module.vision_model."])
def test_image_encoders_are_completed_from_the_base(
    states: Any, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    base, ft, _ = states
    alone = image_encoder(ft, prefix)
    with caplog.at_level(logging.INFO, "weightops"):
        edited = TaskVector(base, alone).apply(base, 1.0)
    assert "is an image encoder" in caplog.text
    assert torch.equal(
        edited["visual.conv1.weight"], ft["vision_model.embeddings.patch_embedding.weight"]
    )
    assert torch.equal(edited["visual.proj"], base["visual.proj"])
    assert torch.equal(
        edited["transformer.resblocks.0.ln_1.weight"], base["transformer.resblocks.0.ln_1.weight"]
    )
    delta = TaskVector(alone, {n: t + 1 for n, t in alone.items()})
    assert torch.allclose(delta.apply(base)["visual.ln_pre.bias"], base["visual.ln_pre.bias"] + 1)
    assert delta.apply(alone).keys() == alone.keys()


def test_the_papers_image_encoders(states: Any) -> None:
    """The text tower lacks some tensors, and all names begin with ``model.``."""
    base = states[0]
    kept = {f"model.{n}": t + 0.5 for n, t in base.items() if not n.startswith("transformer.")}
    edited = TaskVector(base, kept).apply(base, 0.5)
    assert torch.allclose(edited["visual.proj"], base["visual.proj"] + 0.25)
    assert torch.equal(
        edited["transformer.resblocks.0.ln_1.weight"], base["transformer.resblocks.0.ln_1.weight"]
    )


def test_what_is_missing_from_an_image_encoder_is_not_made_up(states: Any) -> None:
    base, ft, _ = states
    damaged = {n: t for n, t in image_encoder(ft).items() if "layers.1.mlp" not in n}
    with pytest.raises(MismatchError, match="don't match"):
        TaskVector(base, damaged)
    with pytest.raises(MismatchError, match="don't match"):
        TaskVector(
            base,
            {n: t for n, t in base.items() if n != "visual.proj"} | {"visual.head": torch.zeros(2)},
        )


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "image_encoder.", "module._orig_mod.", "module.model."],
)
def test_prefixes_of_wrappers(net: nn.Module, tuned: nn.Module, prefix: str) -> None:
    wrapped = {prefix + name: tensor for name, tensor in tuned.state_dict().items()}
    expected = TaskVector(net, tuned).apply(net, 0.4).state_dict()
    edited = TaskVector(net, wrapped).apply(net, 0.4).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in edited.items())
    around = TaskVector(net, tuned).apply(wrapped, 1.0)
    assert around.keys() == wrapped.keys()
    assert open_matched(wrapped, open_checkpoint(net)).source.ties == {"out.weight": "embed.weight"}
    with pytest.raises(MismatchError, match="don't match"):
        TaskVector(net, {**wrapped, "more": torch.zeros(2)})


def test_buffers_that_state_sizes_are_those_of_the_base(states: Any) -> None:
    base, ft, _ = states
    older = {
        **ft,
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    assert set(TaskVector(base, older).apply(base)) == set(base)
    edited = TaskVector(older, ft).apply(older)
    assert torch.equal(edited["text_model.embeddings.position_ids"], torch.arange(16)[None])
    openai = {
        **base,
        "input_resolution": torch.tensor(224),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(99),
    }
    assert TaskVector(base, openai).norm() == 0


def test_every_tensor_is_mapped(states: Any) -> None:
    base, ft, _ = states
    assert mappings(ft, base).keys() == base.keys()
    assert mappings(base, ft).keys() == ft.keys()
    assert from_transformers("visual.transformer.resblocks.0.attn.other") is None
    assert isinstance(match_to_base(open_checkpoint(ft), open_checkpoint(base)), Checkpoint)
    assert json.dumps(list(base))


@pytest.fixture
def tied(tmp_path: Path) -> dict[str, Path]:
    """Two tied language models, each with its head stored once and twice."""
    from helpers.transformers_folders import small_gpt2

    folders = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        once, twice = tmp_path / f"once{seed}", tmp_path / f"twice{seed}"
        for folder in (once, twice):
            torch.manual_seed(seed)
            small_gpt2().save_pretrained(folder)
        tensors = load_file(twice / "model.safetensors")
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
        folders |= {f"once{seed}": once, f"twice{seed}": twice}
    return folders


@pytest.mark.parametrize("base", ["once0", "twice0"])
@pytest.mark.parametrize("other", ["once1", "twice1"])
def test_a_tied_head_stored_twice_is_the_same_model(
    base: str, other: str, tied: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import GPT2LMHeadModel

    plain = merge([tied["once0"], tied["once1"]]).state_dict()
    merged = merge([tied[base], tied[other]])
    saved = merged.save(tmp_path / "merged")
    TaskVector(tied["once0"], tied[other]).save(tmp_path / "vector.safetensors")
    vector = TaskVector.load(tmp_path / "vector.safetensors")
    applied = vector.apply(tied[base], 0.5, strict=True).save(tmp_path / "applied")
    for folder in (saved, applied):
        model, told = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
        assert not any(told.values())
        head, embedding = model.lm_head.weight, model.transformer.wte.weight
        assert torch.allclose(head, plain["transformer.wte.weight"], atol=1e-7)
        assert torch.equal(head, embedding)
    fingerprints = {open_checkpoint(tied[name]).fingerprint for name in ("once0", "twice0")}
    assert len(fingerprints) == 1


def test_a_tied_model_whose_ends_differ_is_built_as_it_is_stored(
    tied: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import GPT2LMHeadModel

    file = tied["twice0"] / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}, file, {"format": "pt"})
    built = open_checkpoint(tied["twice0"]).model()
    assert "lm_head.weight are tied in the model, and differ here" in caplog.text
    loaded = GPT2LMHeadModel.from_pretrained(tied["twice0"]).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(built(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize("verb", ["merge", "vector", "apply"])
def test_a_tied_model_whose_ends_differ_is_said_before_an_edit(
    verb: str, tied: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edits: dict[str, list[str]] = {
        "merge": ["merge", str(tied["twice0"]), str(tied["once1"])],
        "vector": ["vector", str(tied["once1"]), str(tied["twice0"])],
        "apply": ["apply", str(tmp_path / "v.safetensors"), "--base", str(tied["twice0"])],
    }
    TaskVector(tied["once0"], tied["once1"]).save(tmp_path / "v.safetensors")
    TaskVector(tied["twice0"], tied["twice1"])
    assert "are tied in the model" not in caplog.text
    file = tied["twice0"] / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}, file, {"format": "pt"})
    run([*edits[verb], "-o", str(tmp_path / "out.safetensors")])
    said = f"lm_head.weight are tied in the model, and differ in {tied['twice0']}"
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize(
    "infix", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"]
)
def test_infixes_of_wrappers_do_not_matter(infix: str) -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()
    wrapped = {f"{infix}.{name[0]}.{infix}{name[1:]}": t + 1 for name, t in plain.items()}
    vector = TaskVector(plain, wrapped)
    assert vector.form.specs.keys() == plain.keys()
    assert vector.norm() == pytest.approx(12**0.5)


def test_a_vector_of_heads_stored_twice_edits_a_tied_module(tied: dict[str, Path]) -> None:
    module, tuned = (open_checkpoint(tied[name]).model() for name in ("twice0", "once1"))
    edited = TaskVector(tied["twice0"], tied["twice1"]).apply(module, 0.5)
    head, embedding = edited.lm_head.weight, edited.transformer.wte.weight
    assert head is embedding
    ends = (model.transformer.wte.weight for model in (module, tuned))
    assert torch.allclose(head, sum(ends) / 2, atol=1e-7)


@pytest.mark.parametrize(
    "buffer",
    [
        ("rotary_emb.cos_cached", torch.arange(16.0).reshape(4, 4)),
        ("attn.relative_position_index", torch.arange(16).reshape(4, 4)),
        ("norm.num_batches_tracked", torch.tensor(3)),
    ],
)
def test_a_buffer_that_one_of_two_versions_saves(buffer: tuple[str, torch.Tensor]) -> None:
    name, tensor = buffer
    weight = {"proj.weight": torch.ones(4, 4)}
    newer = {"proj.weight": torch.full((4, 4), 3.0)}
    for base, other in (({**weight, name: tensor}, newer), (weight, {**newer, name: tensor})):
        merged = merge([base, other])
        assert merged.keys() == base.keys()
        assert torch.equal(merged["proj.weight"], torch.full((4, 4), 2.0))
        assert torch.equal(TaskVector(base, other).apply(base)["proj.weight"], newer["proj.weight"])
        assert all(torch.equal(merged[n], t) for n, t in base.items() if n == name)
