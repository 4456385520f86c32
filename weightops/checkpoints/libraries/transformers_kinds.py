"""The tasks of transformers' models, by the names of their classes: for cards and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightops.hub.cards import CardFacts

_KINDS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM", "AutoTokenizer"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM", "AutoTokenizer"),
    "ForSequenceClassification": (
        "text-classification",
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
    ),
    "ForTokenClassification": (
        "token-classification",
        "AutoModelForTokenClassification",
        "AutoTokenizer",
    ),
    "ForQuestionAnswering": (
        "question-answering",
        "AutoModelForQuestionAnswering",
        "AutoTokenizer",
    ),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM", "AutoTokenizer"),
    "ForImageClassification": (
        "image-classification",
        "AutoModelForImageClassification",
        "AutoImageProcessor",
    ),
    "ForSemanticSegmentation": (
        "image-segmentation",
        "AutoModelForSemanticSegmentation",
        "AutoImageProcessor",
    ),
}
"""End of a class's name -> the Hub's name of its task, and the classes that load it."""

_SEEING = ("image-text-to-text", "AutoModelForImageTextToText", "AutoProcessor")
_SEQUENCES = ("other", "AutoModelForSeq2SeqLM", "AutoTokenizer")
_DUAL_ENCODER = ("zero-shot-image-classification", "AutoModel", "AutoProcessor")
_OTHER = ("other", "AutoModel", "AutoTokenizer")

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""End of a class's name -> the task type of peft that adds no module of its own."""

_USAGE = """```python
from transformers import {model}, {inputs}

model = {model}.from_pretrained("{{folder}}")
inputs = {inputs}.from_pretrained("{{folder}}")
```"""


def facts_of(config: Mapping[str, Any]) -> CardFacts:
    """Return the facts for the card of a model, from its configuration.

    >>> facts_of({"architectures": ["LlamaForCausalLM"]}).pipeline_tag
    'text-generation'
    """
    name = _class_of(config)
    kind = next((kind for end, kind in _KINDS.items() if name.endswith(end)), None)
    if kind is None and name.endswith("ForConditionalGeneration"):
        kind = _SEEING if "vision_config" in config else _SEQUENCES
    if kind is None:
        kind = _DUAL_ENCODER if {"vision_config", "text_config"} <= config.keys() else _OTHER
    tag, model, inputs = kind
    return CardFacts("transformers", tag, _USAGE.format(model=model, inputs=inputs))


def task_type_of(config: Mapping[str, Any]) -> str | None:
    """Return the task type that peft gives an adapter of a model, or None.

    >>> task_type_of({"architectures": ["LlamaForCausalLM"]})
    'CAUSAL_LM'
    """
    name = _class_of(config)
    if "vision_config" in config or "audio_config" in config:
        return None
    return next((kind for end, kind in _TASK_TYPES.items() if name.endswith(end)), None)


def _class_of(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""
