"""A tiny CLIP model, in open_clip's form and in transformers'."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import nn

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2},
}


def of_open_clip(seed: int) -> nn.Module:
    """Return a model of open_clip with random weights."""
    torch.manual_seed(seed)
    return open_clip.model.CLIP(**CONFIG).eval()


def of_hf(seed: int) -> nn.Module:
    """Return a model of transformers with random weights."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(seed)
    common = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 24,
        "hidden_act": "quick_gelu",
    }
    text = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=128,
        vocab_size=99,
        max_position_embeddings=16,
        eos_token_id=98,
        bos_token_id=97,
        **common,
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, image_size=32, patch_size=8, **common
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    ).eval()
