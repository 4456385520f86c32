"""The table of which axes of a model's tensors permute together; a new architecture is one entry.

A line ``name = labels`` gives a label to each axis of the tensors of a name; ``.`` keeps an axis in
its order. Tensors of fewer axes, such as biases, have the first labels only. In names ``#`` is a
number, ``*`` any end, ``~`` the family's prefix, if there is one; the first line that matches a
name counts. Axes of one label permute together in the whole model, with ``#`` in it in each block:
as far as the first number in the name, the second with ``##``. ``heads#:q`` (``k``, ``v``, ``o``,
or ``qkv`` one after another) is attention, whose heads permute, and units within a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple


class Family(NamedTuple):
    """Models whose tensors have names in common.

    Attributes:
        lines: the lines of the table; or a function that gives them for a model's names.
        prefix: what the names may begin with.
        read_by: label -> names of which the model must have one each, as else the axis is an output
            of the model, and keeps its order.
        rotary: whether queries and keys are rotated by position, and so keep their order in a head.
    """

    lines: str | Callable[[Set[str]], str]
    prefix: str = ""
    read_by: Mapping[str, tuple[str, ...]] = {}
    rotary: bool = False


_OPEN_CLIP_BLOCKS = """
    {tower}transformer.resblocks.#.(ln_1|ln_2).* = {stream}
    {tower}transformer.resblocks.#.(ls_1|ls_2).gamma = {stream}
    {tower}transformer.resblocks.#.attn.in_proj_* = heads#:qkv {stream}
    {tower}transformer.resblocks.#.attn.out_proj.* = {stream} heads#:o
    {tower}transformer.resblocks.#.mlp.c_fc.* = hidden# {stream}
    {tower}transformer.resblocks.#.mlp.c_proj.* = {stream} hidden#
"""

_OPEN_CLIP_TEXT = """
    ~token_embedding.weight = . text
    ~positional_embedding = . text
    ~cls_emb = text
    ~ln_final.* = text
    ~text_projection = text joint
    ~text_projection.* = joint text
    (logit_scale|logit_bias) =
""" + _OPEN_CLIP_BLOCKS.format(tower="~", stream="text")

_OPEN_CLIP_VISION = """
    visual.conv1.* = vision
    visual.class_embedding = vision
    visual.positional_embedding = . vision
    visual.(ln_pre|ln_post).* = vision
    visual.proj = vision joint
""" + _OPEN_CLIP_BLOCKS.format(tower="visual.", stream="vision")

_TIMM_VIT = """
    {trunk}(cls_token|dist_token|reg_token|pos_embed) = . . {stream}
    {trunk}patch_embed.proj.* = {stream}
    {trunk}(norm_pre|norm|fc_norm).* = {stream}
    {trunk}blocks.#.(norm1|norm2).* = {stream}
    {trunk}blocks.#.(ls1|ls2).gamma = {stream}
    {trunk}blocks.#.attn.qkv.* = heads#:qkv {stream}
    {trunk}blocks.#.attn.proj.* = {stream} heads#:o
    {trunk}blocks.#.mlp.fc1.* = hidden# {stream}
    {trunk}blocks.#.mlp.fc2.* = {stream} hidden#
    {trunk}(head|head_dist).* = . {stream}
"""

_TIMM_CLIP = (
    _TIMM_VIT.format(trunk="visual.trunk.", stream="vision")
    + "visual.head.proj.* = joint vision"
    + _OPEN_CLIP_TEXT
)

_VIT = """
    ~embeddings.(cls_token|distillation_token|position_embeddings) = . . stream
    ~embeddings.patch_embeddings.projection.* = stream
    ~layers.#.(layernorm_before|layernorm_after).* = stream
    ~layers.#.attention.(q|k|v)_proj.* = heads#:\\1 stream
    ~layers.#.attention.o_proj.* = stream heads#:o
    ~layers.#.mlp.fc1.* = hidden# stream
    ~layers.#.mlp.fc2.* = stream hidden#
    ~layernorm.* = stream
    ~pooler.dense.* = . stream
    (classifier|cls_classifier|distillation_classifier).* = . stream
"""

_CLIP_TOWER = """
    {tower}.embeddings.(token_embedding|position_embedding).weight = . {stream}
    {tower}.embeddings.class_embedding = {stream}
    {tower}.embeddings.patch_embedding.* = {stream}
    {tower}.embeddings.position_ids =
    {tower}.(pre_layrnorm|post_layernorm|final_layer_norm).* = {stream}
    {tower}.encoder.layers.#.(layer_norm1|layer_norm2).* = {stream}
    {tower}.encoder.layers.#.self_attn.(q|k|v)_proj.* = heads#:\\1 {stream}
    {tower}.encoder.layers.#.self_attn.out_proj.* = {stream} heads#:o
    {tower}.encoder.layers.#.mlp.fc1.* = hidden# {stream}
    {tower}.encoder.layers.#.mlp.fc2.* = {stream} hidden#
"""

_CLIP = (
    _CLIP_TOWER.format(tower="vision_model", stream="vision")
    + _CLIP_TOWER.format(tower="text_model", stream="text")
    + """
    visual_projection.weight = joint vision
    text_projection.weight = joint text
    logit_scale =
"""
)

_SIGLIP = (
    _CLIP
    + """
    text_model.head.* = joint text
    vision_model.head.probe = . . vision
    vision_model.head.attention.in_proj_* = vision_model.head.heads:qkv vision
    vision_model.head.attention.out_proj.* = joint vision_model.head.heads:o
    vision_model.head.layernorm.* = joint
    vision_model.head.mlp.fc1.* = vision_model.head.hidden joint
    vision_model.head.mlp.fc2.* = joint vision_model.head.hidden
    logit_bias =
"""
)

_BERT = """
    ~embeddings.(word|position|token_type)_embeddings.weight = . stream
    ~embeddings.position_ids =
    ~embeddings.LayerNorm.* = stream
    ~encoder.layer.#.attention.self.query.* = heads#:q stream
    ~encoder.layer.#.attention.self.key.* = heads#:k stream
    ~encoder.layer.#.attention.self.value.* = heads#:v stream
    ~encoder.layer.#.attention.output.dense.* = stream heads#:o
    ~encoder.layer.#.(attention.output|output).LayerNorm.* = stream
    ~encoder.layer.#.intermediate.dense.* = hidden# stream
    ~encoder.layer.#.output.dense.* = stream hidden#
    ~pooler.dense.* = pooled stream
    (cls.predictions.transform|lm_head).dense.* = stream stream
    (cls.predictions.transform.LayerNorm|lm_head.layer_norm).* = stream
    (cls.predictions|lm_head).decoder.* = . stream
    (cls.predictions|lm_head).bias =
    cls.seq_relationship.* = . pooled
    ~transformer.layer.#.attention.(q|k|v)_lin.* = heads#:\\1 stream
    ~transformer.layer.#.attention.out_lin.* = stream heads#:o
    ~transformer.layer.#.(sa|output)_layer_norm.* = stream
    ~transformer.layer.#.ffn.lin1.* = hidden# stream
    ~transformer.layer.#.ffn.lin2.* = stream hidden#
    vocab_transform.* = stream stream
    vocab_layer_norm.* = stream
    vocab_projector.* = . stream
    pre_classifier.* = pooled stream
    classifier.dense.* = transformed stream
    classifier.out_proj.* = . transformed
    classifier.(weight|bias) = . {summary}
    qa_outputs.* = . stream
"""


# The decoder is the embeddings if they are tied, so that what it reads is in the stream's order.


def _bert(names: Set[str]) -> str:
    """Return the table of BERT, whose classifier reads the pooler's units if there is one."""
    poolers = ("pooler.dense.weight", "pre_classifier.weight")
    pooled = any(name.endswith(poolers) for name in names)
    return _BERT.format(summary="pooled" if pooled else "stream")


_GPT2 = """
    ~(wte|wpe).weight = . stream
    ~ln_f.* = stream
    ~h.#.(ln_1|ln_2).* = stream
    ~h.#.attn.(bias|masked_bias) =
    ~h.#.attn.c_attn.weight = stream heads#:qkv
    ~h.#.attn.c_attn.bias = heads#:qkv
    ~h.#.attn.c_proj.weight = heads#:o stream
    ~h.#.attn.c_proj.bias = stream
    ~h.#.mlp.c_fc.weight = stream hidden#
    ~h.#.mlp.c_fc.bias = hidden#
    ~h.#.mlp.c_proj.weight = hidden# stream
    ~h.#.mlp.c_proj.bias = stream
    (lm_head|score).weight = . stream
"""

_OPT = """
    ~decoder.(embed_tokens|embed_positions).weight = . stream
    ~decoder.final_layer_norm.* = stream
    ~decoder.layers.#.(self_attn|final)_layer_norm.* = stream
    ~decoder.layers.#.self_attn.(q|k|v)_proj.* = heads#:\\1 stream
    ~decoder.layers.#.self_attn.out_proj.* = stream heads#:o
    ~decoder.layers.#.fc1.* = hidden# stream
    ~decoder.layers.#.fc2.* = stream hidden#
    (lm_head|score).weight = . stream
"""

_LLAMA = """
    ~embed_tokens.weight = . stream
    ~layers.#.(input|post_attention|pre_feedforward|post_feedforward)_layernorm.weight = stream
    ~layers.#.self_attn.(q|k|v)_proj.* = heads#:\\1 stream
    ~layers.#.self_attn.o_proj.* = stream heads#:o
    ~layers.#.self_attn.(q_norm|k_norm).weight = .
    ~layers.#.mlp.(gate_proj|up_proj).* = hidden# stream
    ~layers.#.mlp.down_proj.* = stream hidden#
    ~norm.weight = stream
    (lm_head|score).weight = . stream
"""


class _ResNet(NamedTuple):
    """The names of a ResNet's convolutions and norms.

    In names ``{stage}`` and ``{i}`` count from 0, ``{layer}`` and ``{n}`` from 1.
    """

    stem: tuple[tuple[str, str], ...]
    part: tuple[str, str]
    shortcut: tuple[str, str]
    rest: str

    def lines(self, names: Set[str]) -> str:
        """Return the table: a stage whose first block has no shortcut adds to the stream before."""
        depth = sum(f"{_named(self.part, i=i)[0]}.weight" in names for i in range(3))
        rows = [self.rest, *_chain(self.stem, [f"stem{i}" for i in range(len(self.stem))], ".")]
        stream = f"stem{len(self.stem) - 1}"
        for stage in range(4):
            shortcut, own = _named(self.shortcut, stage=stage), stream
            if f"{shortcut[0]}.weight" in names:
                own = "vision" if stage == 3 else f"stage{stage}"
                rows += _chain([shortcut], [own], stream)
            for block, label in (("0", f"first{stage}.inner"), ("#", "inner#")):
                parts = [_named(self.part, stage=stage, block=block, i=i) for i in range(depth)]
                inner = [f"{label}.{i}" for i in range(depth - 1)]
                rows += _chain(parts, [*inner, own], stream if block == "0" else own)
            stream = own
        return "\n".join(rows)


def _named(names: tuple[str, str], stage: int = 0, block: str = "0", i: int = 0) -> tuple[str, str]:
    numbers = {"stage": stage, "layer": stage + 1, "block": block, "i": i, "n": i + 1}
    return names[0].format(**numbers), names[1].format(**numbers)


def _chain(parts: Sequence[tuple[str, str]], labels: Sequence[str], start: str) -> list[str]:
    """Return the lines of convolutions and norms, each of which reads what the one before gives."""
    rows = []
    for (convolution, norm), label, read in zip(parts, labels, [start, *labels], strict=False):
        rows += [f"{convolution}.weight = {label} {read}", f"{norm}.* = {label}"]
    return rows


_PLAIN_RESNET = _ResNet(
    (("conv1", "bn1"),),
    ("layer{layer}.{block}.conv{n}", "layer{layer}.{block}.bn{n}"),
    ("layer{layer}.{block}.downsample.0", "layer{layer}.{block}.downsample.1"),
    "fc.* = . vision",
)

_CLIP_RESNET = _ResNet(
    tuple((f"visual.conv{n}", f"visual.bn{n}") for n in (1, 2, 3)),
    ("visual.layer{layer}.{block}.conv{n}", "visual.layer{layer}.{block}.bn{n}"),
    ("visual.layer{layer}.{block}.downsample.0", "visual.layer{layer}.{block}.downsample.1"),
    """
    visual.attnpool.positional_embedding = . vision
    visual.attnpool.(q|k|v)_proj.* = visual.attnpool.heads:\\1 vision
    visual.attnpool.c_proj.* = joint visual.attnpool.heads:o
"""
    + _OPEN_CLIP_TEXT,
)

_HF_RESNET = _ResNet(
    (("~embedder.embedder.convolution", "~embedder.embedder.normalization"),),
    (
        "~encoder.stages.{stage}.layers.{block}.layer.{i}.convolution",
        "~encoder.stages.{stage}.layers.{block}.layer.{i}.normalization",
    ),
    (
        "~encoder.stages.{stage}.layers.{block}.shortcut.convolution",
        "~encoder.stages.{stage}.layers.{block}.shortcut.normalization",
    ),
    "classifier.1.* = . vision",
)

_VISION_HEAD = (
    "(visual(_projection.weight|.proj|.head.proj.weight|.attnpool.c_proj.weight)"
    "|vision_model.head.probe)"
)
_TEXT_HEAD = "(~text_projection(|.weight)|text_model.head.weight)"
_TOWERS = {"vision": (_VISION_HEAD,), "text": (_TEXT_HEAD,), "joint": (_VISION_HEAD, _TEXT_HEAD)}

FAMILIES: Mapping[str, Family] = {
    "CLIP of open_clip": Family(_OPEN_CLIP_VISION + _OPEN_CLIP_TEXT, "text", _TOWERS),
    "CLIP with a ResNet, of open_clip": Family(_CLIP_RESNET.lines, "text", _TOWERS),
    "CLIP with a ViT of timm, of open_clip": Family(_TIMM_CLIP, "text", _TOWERS),
    "CLIP or SigLIP of transformers": Family(_SIGLIP, "", _TOWERS),
    "ViT of timm": Family(
        _TIMM_VIT.format(trunk="", stream="stream"), "", {"stream": ("head.weight",)}
    ),
    "ViT or DeiT of transformers": Family(
        _VIT, "(vit|deit)", {"stream": ("(classifier|cls_classifier).weight",)}
    ),
    "ResNet of timm or torchvision": Family(_PLAIN_RESNET.lines, "", {"vision": ("fc.weight",)}),
    "ResNet of transformers": Family(
        _HF_RESNET.lines, "resnet", {"vision": ("classifier.1.weight",)}
    ),
    "BERT, RoBERTa or DistilBERT": Family(
        _bert,
        "(bert|roberta|distilbert)",
        {
            "stream": ("(cls|classifier|lm_head|qa_outputs|vocab_projector).*",),
            "pooled": ("(cls.seq_relationship|classifier).weight",),
        },
    ),
    "GPT-2": Family(_GPT2, "transformer", {"stream": ("(lm_head|score).weight",)}),
    "OPT": Family(_OPT, "model", {"stream": ("(lm_head|score).weight",)}),
    "Llama, Mistral, Qwen or Gemma": Family(
        _LLAMA, "model", {"stream": ("(lm_head|score).weight",)}, rotary=True
    ),
}
"""What a family is called -> its entry."""
