"""The names that UNets of Stable Diffusion have in diffusers, from those of their authors.

The authors number blocks through (``input_blocks_4_1`` is the second part of the fifth block),
diffusers counts the layers of each resolution anew. Adapters of kohya for SDXL have the authors'.
"""

from __future__ import annotations

import re

_FIXED = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_MIDDLE = ("resnets_0", "attentions_0", "resnets_1")
_IN_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d)_(.+)")


def in_diffusers(module: str, layers: int) -> str:
    """Return the name of a module in diffusers, without dots; other names unchanged.

    Args:
        module: the authors' name, without dots.
        layers: the number of layers of each resolution in diffusers (``layers_per_block``).

    >>> in_diffusers("input_blocks_4_1_transformer_blocks_0_attn1_to_q", 2)
    'down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q'
    >>> in_diffusers("output_blocks_2_1_conv", 2), in_diffusers("input_blocks_3_0_op", 2)
    ('up_blocks_0_upsamplers_0_conv', 'down_blocks_0_downsamplers_0_conv')
    """
    if module in _FIXED:
        return _FIXED[module]
    if middle := re.fullmatch(r"middle_block_([012])_(.+)", module):
        place, rest = f"mid_block_{_MIDDLE[int(middle[1])]}", middle[2]
    elif match := _BLOCK.fullmatch(module):
        side, number, inner, rest = match[1], int(match[2]), int(match[3]), match[4]
        block, layer = divmod(number - (side == "input"), layers + 1)
        place = f"{'down' if side == 'input' else 'up'}_blocks_{block}"
        if rest == "op":
            return f"{place}_downsamplers_0_conv"
        if rest == "conv":
            return f"{place}_upsamplers_0_conv"
        place = f"{place}_{'attentions' if inner else 'resnets'}_{layer}"
    else:
        return module
    return f"{place}_{_IN_RESNET.get(rest, rest)}"
