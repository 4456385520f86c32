"""Open the folders of adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from weightops.algebra.source import Source
from weightops.checkpoints.adapters import mlx
from weightops.checkpoints.adapters.adapter import CONFIG, WEIGHTS, Adapter
from weightops.checkpoints.adapters.lora import LoraSource, Selection, is_plain
from weightops.checkpoints.adapters.peft_adapter import PeftAdapter
from weightops.errors import CheckpointError
from weightops.support.json_files import read_json
from weightops.support.sibling_files import sibling

_REFUSED = {
    "megatron_config": "needs Megatron's own layers",
    "layer_replication": "repeats layers of its base",
    "arrow_config": "chooses among adapters by the input",
    "alora_invocation_tokens": "starts at certain tokens of the input",
}
"""Settings with which an adapter is no change of weights, and why."""


def recognises(path: Path) -> bool:
    """Return whether a file is a JSON object with a ``peft_type``, or is mlx-lm's."""
    if path.suffix != ".json":
        return False
    try:
        config = read_json(path)
    except CheckpointError:
        return False
    return "peft_type" in config or mlx.is_of_mlx(config)


def open_adapter(path: Path, open_stored: Callable[[Path], Source]) -> Adapter:
    """Open the adapter that a configuration describes.

    Args:
        path: the configuration.
        open_stored: opens the weights file beside it.

    Raises:
        CheckpointError: naming the setting, if such an adapter is no change of weights.
    """
    config = read_json(path)
    if mlx.is_of_mlx(config):
        return mlx.open_mlx(path, config, open_stored(sibling(path, mlx.WEIGHTS)))
    for setting, why in _REFUSED.items():
        if config.get(setting):
            raise CheckpointError(
                f"{path} asks for {setting}: the adapter {why}, and is no change of weights"
            )
    for name in (WEIGHTS, "adapter_model.bin"):
        if (path.parent / name).is_file():
            stored = _without_repeats(open_stored(path.parent / name))
            kind = LoraSource if is_plain(config, stored.specs) else PeftAdapter
            return kind(config, stored, str(path.parent))
    raise CheckpointError(f"{path.parent} holds {CONFIG}, but no {WEIGHTS} beside it")


def _without_repeats(stored: Source) -> Source:
    """Return an adapter's tensors without the biases that peft saves another time.

    With ``bias="all"``, biases of modules that are saved whole have the names of peft's wrappers
    beside their own: ``modules_to_save`` repeats the new one, ``original_module`` the base's.
    """
    kept = {name: name for name in stored.specs if ".original_module." not in name}
    for name in [name for name in kept if ".modules_to_save." in name]:
        kept.setdefault(name.replace(".modules_to_save.", "."), name)
        del kept[name]
    return stored if len(kept) == len(stored.specs) else Selection(stored, kept, stored.ref)
