"""Small models of transformers, and the folders that transformers saves them to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def small_clip(seed: int, **settings: Any) -> Any:
    """Return a CLIP model of transformers with open_clip's tokens and two small towers."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(seed)
    common = {"num_hidden_layers": 1, "num_attention_heads": 4, "projection_dim": 24, **settings}
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, max_position_embeddings=77, **common
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, image_size=32, patch_size=8, **common
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    ).eval()


def small_gpt2(layers: int = 1) -> Any:
    """Return a GPT-2 with random weights and tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers,
        n_head=2,
        n_embd=8,
        vocab_size=20,
        n_positions=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def save_letters(folder: Path, letters: Iterable[str], unknown: str = "?") -> None:
    """Save a tokenizer whose tokens are letters, each with its place as its number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=unknown))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def saved(model: Any, folder: Path, **options: Any) -> Path:
    """Save a model to a folder, and return the folder."""
    model.save_pretrained(folder, **options)
    return folder
