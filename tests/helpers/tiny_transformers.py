"""Tiny models of transformers, one for each kind of difference between files and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


class TinyModel(NamedTuple):
    """A class of transformers with its configuration, and what its models are given.

    Attributes:
        kind: the name of the class.
        config: makes the configuration.
        inputs: the names of the inputs: "ids", "pixels", or both.
    """

    kind: str
    config: Callable[[Any], Any]
    inputs: tuple[str, ...] = ("ids",)

    def build(self, seed: int) -> Any:
        """Return a model with random weights, biases and norms included."""
        import transformers

        torch.manual_seed(seed)
        model = getattr(transformers, self.kind)(self.config(transformers)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    @torch.no_grad()
    def outputs(self, model: Any) -> torch.Tensor:
        """Return what a model makes of fixed inputs."""
        generator = torch.Generator().manual_seed(0)
        given: dict[str, Any] = {}
        if "ids" in self.inputs:
            given["input_ids"] = torch.randint(0, 60, (2, 9), generator=generator)
        if "pixels" in self.inputs:
            given["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
        outputs = model(**given)
        return next(
            getattr(outputs, name)
            for name in ("logits", "logits_per_image", "last_hidden_state")
            if getattr(outputs, name, None) is not None
        )


MODELS = {
    "mixtral": TinyModel(
        "MixtralForCausalLM",
        lambda t: t.MixtralConfig(**_TEXT, num_local_experts=3, num_experts_per_tok=2),
    ),
    "qwen2_moe": TinyModel(
        "Qwen2MoeForCausalLM",
        lambda t: t.Qwen2MoeConfig(**_TEXT, **_EXPERTS, shared_expert_intermediate_size=8),
    ),
    "qwen3_moe": TinyModel(
        "Qwen3MoeForCausalLM", lambda t: t.Qwen3MoeConfig(**_TEXT, **_EXPERTS, head_dim=8)
    ),
    "olmoe": TinyModel(
        "OlmoeForCausalLM", lambda t: t.OlmoeConfig(**_TEXT, num_experts=3, num_experts_per_tok=2)
    ),
    "deepseek_v3": TinyModel(
        "DeepseekV3ForCausalLM",
        lambda t: t.DeepseekV3Config(
            **{**_TEXT, "num_key_value_heads": 2},
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
    ),
    "llava": TinyModel(
        "LlavaForConditionalGeneration",
        lambda t: t.LlavaConfig(
            text_config=t.LlamaConfig(**_TEXT).to_dict(),
            vision_config=t.CLIPVisionConfig(**_VISION).to_dict(),
            image_token_index=63,
        ),
    ),
    "gemma3": TinyModel(
        "Gemma3ForConditionalGeneration",
        lambda t: t.Gemma3Config(
            text_config=t.Gemma3TextConfig(**_TEXT, head_dim=8).to_dict(),
            vision_config=t.SiglipVisionConfig(**_VISION).to_dict(),
            mm_tokens_per_image=4,
            image_token_id=63,
            boi_token_index=62,
            eoi_token_index=61,
        ),
    ),
    "gpt_neox": TinyModel(
        "GPTNeoXForCausalLM",
        lambda t: t.GPTNeoXConfig(**{n: v for n, v in _TEXT.items() if "key_value" not in n}),
    ),
    "vit": TinyModel(
        "ViTForImageClassification", lambda t: t.ViTConfig(**_VISION, num_labels=5), ("pixels",)
    ),
    "deit": TinyModel(
        "DeiTForImageClassification", lambda t: t.DeiTConfig(**_VISION, num_labels=5), ("pixels",)
    ),
    "beit": TinyModel(
        "BeitForImageClassification", lambda t: t.BeitConfig(**_VISION, num_labels=5), ("pixels",)
    ),
    "dinov2": TinyModel(
        "Dinov2Model",
        lambda t: t.Dinov2Config(
            **{n: v for n, v in _VISION.items() if n != "intermediate_size"}, use_swiglu_ffn=True
        ),
        ("pixels",),
    ),
    "swin": TinyModel(
        "SwinForImageClassification",
        lambda t: t.SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
        ),
        ("pixels",),
    ),
    "segformer": TinyModel(
        "SegformerForImageClassification",
        lambda t: t.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
        ),
        ("pixels",),
    ),
    "bert": TinyModel(
        "BertForMaskedLM",
        lambda t: t.BertConfig(**{n: v for n, v in _TEXT.items() if "key_value" not in n}),
    ),
    "clip_vision": TinyModel(
        "CLIPVisionModel", lambda t: t.CLIPVisionConfig(**_VISION), ("pixels",)
    ),
    "llama": TinyModel(
        "LlamaForCausalLM", lambda t: t.LlamaConfig(**_TEXT, tie_word_embeddings=True)
    ),
}
"""Name -> model."""
