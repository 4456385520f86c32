"""Adapters of models whose encoder and decoder run other ends of one embedding."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf

from weightops import TaskVector
from weightops.errors import MismatchError

T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BART = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 20}

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")

TOKENS = torch.arange(3, 9)[None]


def _model(kind: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    if kind == "T5":
        settings = hf.T5Config(**T5, decoder_start_token_id=0)
        return hf.T5ForConditionalGeneration(settings).eval()
    return hf.BartForConditionalGeneration(hf.BartConfig(**BART)).eval()


def _adapted(folder: Path, base: hf.PreTrainedModel, *targets: str, trained: bool = True) -> object:
    """Return a model with an adapter, which is written to a folder."""
    settings = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=not trained)
    model = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def _logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits  # type: ignore[operator]
    return logits


@pytest.mark.parametrize("kind", ["T5", "BART"])
def test_embeddings_that_the_model_runs_are_changed_as_it_runs_them(
    tmp_path: Path, kind: str
) -> None:
    base = _model(kind)
    base.save_pretrained(tmp_path / "base")
    model = _adapted(tmp_path / "adapter", base, "embed_tokens")
    assert not torch.allclose(_logits(model), _logits(base), atol=0.1)
    vector = TaskVector(tmp_path / "base", tmp_path / "adapter")
    loaded = type(base).from_pretrained(vector.apply(tmp_path / "base").save(tmp_path / "out"))
    assert torch.allclose(_logits(loaded.eval()), _logits(model), atol=1e-5)


@pytest.mark.parametrize("targets", [["shared"], ["shared", "lm_head"]])
@pytest.mark.parametrize("kind", ["T5", "BART"])
def test_an_embedding_that_the_model_does_not_run_is_not_changed_in_silence(
    tmp_path: Path, kind: str, targets: list[str]
) -> None:
    """With peft, the running model leaves the change out, and the merged model has it."""
    base = _model(kind)
    base.save_pretrained(tmp_path / "base")
    _adapted(tmp_path / "adapter", base, *targets)
    with pytest.raises(MismatchError, match=r"changes (model\.)?shared\.weight, .* doesn't run"):
        TaskVector(tmp_path / "base", tmp_path / "adapter").apply(tmp_path / "base")
    _adapted(tmp_path / "blank", base, *targets, trained=False)
    same = TaskVector(tmp_path / "base", tmp_path / "blank").apply(tmp_path / "base")
    loaded = type(base).from_pretrained(same.save(tmp_path / "out"))
    assert torch.allclose(_logits(loaded.eval()), _logits(base), atol=1e-6)
