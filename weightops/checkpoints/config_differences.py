"""Settings in which the configurations of two models differ, though their tensors match."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from weightops.checkpoints.libraries.base import Architecture

_IRRELEVANT = re.compile(
    r"""
    _(?!class_name).* | .*version.* | (torch_)?dtype | architectures | auto_map | use_cache
    | (hf_)?hub_.* | tags | .*_token_ids? | .*token_index | id2label | label2id | label_names
    | num_labels | num_classes | problem_type | finetuning_task | task_specific_params
    | .*drop.* | .*(rate|prob)
    | initializer_.* | init_.* | gradient_checkpointing | output_.* | return_dict | pretrained_cfg
    | quantization_config | license | tokenizer_class | processor_class | torchscript
    | max_length | min_length | do_sample | num_beams | temperature | top_[kp] | preprocess_cfg
    """,
    re.VERBOSE,
)
"""Names of settings that don't change what a model computes in evaluation."""


def config_differences(a: Architecture, b: Architecture) -> list[str]:
    """Return the settings of both configurations that have other values, as ``name: a / b``.

    Settings that only one configuration names are passed over: most are defaults that versions of
    a library write or don't write.
    """
    x, y = _flat(a.settings), _flat(b.settings)
    return [f"{key}: {x[key]} / {y[key]}" for key in x if key in y and x[key] != y[key]]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return setting -> value, of inner settings, too; a rope base is under one name."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if _IRRELEVANT.fullmatch(key):
            continue
        if isinstance(value, Mapping):
            inner = "" if key in ("rope_parameters", "rope_scaling") else f"{key}."
            flat |= _flat(value, prefix + inner)
        else:
            flat[prefix + key] = value
    return flat
