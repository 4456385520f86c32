"""Adapters of every kind that peft merges, through peft's own code, one layer at a time.

peft makes its layers on a model without weights and fills in the adapter. The weights of one layer
are then read from the base, merged in float32, and let go.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from threading import Lock
from typing import Any, TypeAlias

from weightops.algebra.source import Source, Spec
from weightops.checkpoints.adapters.adapter import PREFIX, Adapter
from weightops.checkpoints.adapters.lora import changed_base, check_pattern
from weightops.errors import CheckpointError, missing_extra
from weightops.support.lazy import nn, torch
from weightops.support.text import first_few

Read: TypeAlias = "Callable[[str], torch.Tensor]"

_WRAPPERS = ("base_layer", "original_module", "token_adapter")
"""Parts that peft's layers put into the names of what they wrap."""
_RESTARTS = {"pissa": "pissa_init", "olora": "olora_init"}
"""Initialisations that change the base, and can be done again from it -> peft's method."""


class PeftAdapter(Adapter):
    """An adapter that is merged by peft, since it isn't a plain LoRA.

    Args:
        config: the content of ``adapter_config.json``.
        stored: the tensors of the adapter.
        ref: the name of the adapter in messages.
    """

    needs_base = "is computed from the weights that it changes"

    def __init__(self, config: Mapping[str, Any], stored: Source, ref: str) -> None:
        super().__init__(config, stored, ref)
        for pattern in _patterns(config):
            check_pattern(pattern)
        rank = config.get("r")
        self.describe_as(
            _kind(config), ranks=[rank] if isinstance(rank, int) else [], modules=0, whole=[]
        )

    def merged(self, skeleton: nn.Module, specs: Mapping[str, Spec], read: Read) -> MergedLayers:
        """Return the tensors of a base that the adapter changes, changed.

        Args:
            skeleton: the base's module, without weights; it is changed.
            specs: the shapes and dtypes of the base's tensors.
            read: returns a tensor of the base.

        Raises:
            CheckpointError: if peft can't merge such an adapter, or it isn't one of this module.
            MissingExtraError: without peft.
        """
        return MergedLayers(self, skeleton, specs, read)


def _patterns(config: Mapping[str, Any]) -> Iterable[str]:
    """Return the regular expressions of a configuration, which peft matches with modules."""
    for key in ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules"):
        if isinstance(config.get(key), str):
            yield config[key]
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        yield from config.get(key) or ()


def _kind(config: Mapping[str, Any]) -> str:
    """Return the name of an adapter's method, for people."""
    variants = {"use_dora": "DoRA", "target_parameters": "LoRA on parameters"}
    start = changed_base(config)
    named = next((name for key, name in variants.items() if config.get(key)), "")
    return named or (f"LoRA from {start}" if start else str(config.get("peft_type")))


class MergedLayers(Source):
    """The changed tensors of a base; see `PeftAdapter.merged`."""

    computed = True

    def __init__(
        self, adapter: PeftAdapter, skeleton: nn.Module, specs: Mapping[str, Spec], read: Read
    ) -> None:
        self.ref, self._adapter, self._read = adapter.ref, adapter, read
        self.files = adapter.files
        self.made_from, self.ties = adapter.made_from, {}
        parameters = dict(skeleton.named_parameters(remove_duplicate=False))
        buffers = dict(skeleton.named_buffers())
        self._whole = {}
        tensors = {}
        for name in adapter.stored.specs:
            short = _unwrapped(name.removeprefix(PREFIX))
            if short in parameters or short in buffers:
                self._whole[short] = name
            else:
                tensors[name] = adapter.stored.read(name)
        self._layers = _peft_layers(adapter, skeleton, tensors)
        self._layer_of = {
            base: layer
            for layer, module in self._layers.items()
            for name, _ in module.named_parameters(remove_duplicate=False)
            for base in (_unwrapped(f"{layer}.{name}"),)
            if base in parameters
        }
        changed = dict.fromkeys((*self._layer_of, *self._whole))
        missing = [name for name in changed if name not in specs]
        if missing:
            raise CheckpointError(
                f"{self.ref} changes {first_few(missing)}, which its base doesn't hold"
            )
        self._base_specs = specs
        self.specs: dict[str, Spec] = {}
        self.add(changed)
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self._lock = Lock()

    def add(self, names: Iterable[str]) -> None:
        """Add tensors of the base, which stay as they are unless the adapter changes them."""
        for name in names:
            self.specs.setdefault(name, Spec(self._base_specs[name].shape, "float32"))

    def read(self, name: str) -> torch.Tensor:
        layer = self._layer_of.get(name)
        if layer is None:
            return self._base(name)
        with self._lock:
            if self._last[0] != layer:
                self._last = (layer, self._merge(layer))
            return self._last[1][name]

    def _base(self, name: str) -> torch.Tensor:
        """Return a tensor of the base, or what the adapter puts in its place."""
        stored = self._whole.get(name)
        tensor = self._read(name) if stored is None else self._adapter.stored.read(stored)
        return tensor.float()

    def _merge(self, layer: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a layer of peft after the merge, by the base's names."""
        wrapped = self._layers[layer]
        memo: dict[int, Any] = {}
        for name, parameter in wrapped.named_parameters():
            base = _unwrapped(f"{layer}.{name}")
            if base in self._layer_of:
                memo[id(parameter)] = nn.Parameter(self._base(base).clone(), requires_grad=False)
        module: Any = copy.deepcopy(wrapped, memo)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _start_again(module, self._adapter.config)
                if hasattr(module, "unload_and_optionally_merge_module"):
                    merged = module.unload_and_optionally_merge_module(True, False, None)
                else:
                    module.merge(safe_merge=False)
                    merged = module.get_base_layer()
        except (NotImplementedError, AttributeError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{layer} of {self.ref} can't be merged by peft: {_reason(error)}"
            ) from error
        # A merged weight may be a plain attribute, which is in no state dict.
        named = {_unwrapped(f"{layer}.{n}"): t for n, t in merged.state_dict().items()}
        for base in self._layer_of:
            if base not in named and base.rpartition(".")[0] == layer:
                named[base] = getattr(merged, base.rpartition(".")[2])
        return {name: tensor.detach().float() for name, tensor in named.items()}


def _unwrapped(name: str) -> str:
    """Return the name that a tensor has without peft's layers around it.

    >>> _unwrapped("mlp.experts.base_layer.base_layer.down_proj")
    'mlp.experts.down_proj'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _start_again(layer: nn.Module, config: Mapping[str, Any]) -> None:
    """Take the part that an initialisation moved into the adapter out of the base's weight."""
    start = changed_base(config)
    method = next((value for key, value in _RESTARTS.items() if start.lower() == key), None)
    if method is None:
        return
    parts: Iterable[Any] = layer.modules()
    for part in parts:
        if hasattr(part, method) and getattr(part, "lora_A", None):
            halves = [part.lora_A["default"].weight, part.lora_B["default"].weight]
            kept = [half.clone() for half in halves]
            initialise = getattr(part, method)
            initialise("default", start) if method == "pissa_init" else initialise("default")
            part.lora_A["default"].weight.data = kept[0]
            part.lora_B["default"].weight.data = kept[1]


def _peft_layers(
    adapter: PeftAdapter, skeleton: nn.Module, tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Return name of a module -> the layer that peft wraps it in, with the adapter's tensors."""
    try:
        import peft
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
        from peft.utils.save_and_load import set_peft_model_state_dict
    except ImportError:
        raise missing_extra("peft", "hf", f"to merge {adapter.ref}") from None
    start = changed_base(adapter.config)
    if start and start.lower() not in _RESTARTS:
        raise CheckpointError(
            f"{adapter.ref} was started by {start}, which changed its base in a way that can't be "
            "done again",
            hint="save_pretrained(path_initial_model_for_weight_conversion=...) of peft makes a "
            "plain LoRA of it",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: Any = _peft_config(adapter)
            model = peft.PeftModel(skeleton, config)
            result: Any = set_peft_model_state_dict(model, tensors)
    except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"peft can't put {adapter.ref} on {type(skeleton).__name__}: {_reason(error)}"
        ) from error
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    missing = [name for name in result.missing_keys if prefix in name and "default" in name]
    if missing or result.unexpected_keys:
        lacks = first_few([*missing, *result.unexpected_keys])
        raise CheckpointError(
            f"{adapter.ref} isn't an adapter of {type(skeleton).__name__}: {lacks} is in one of "
            "them only"
        )
    layers: dict[str, Any] = {}
    for name, module in model.get_base_model().named_modules():
        is_layer = hasattr(module, "unload_and_optionally_merge_module") or hasattr(
            module, "base_layer"
        )
        if is_layer and not any(name.startswith(f"{outer}.") for outer in layers):
            layers[name] = module
    if not layers:
        raise CheckpointError(
            f"{adapter.ref} is an adapter of kind {config.peft_type.value}, which peft can't merge"
        )
    return layers


def _excluded(config: Any) -> str:
    """Return the pattern of the modules that an adapter excludes or saves whole."""
    given, saved = config.exclude_modules or (), "|".join(config.modules_to_save)
    if not isinstance(given, str):
        given = rf"(.*\.)?({'|'.join(map(re.escape, given))})" if given else "(?!)"
    return rf"({given})|(.*\.)?({saved})(\..*)?"


def _peft_config(adapter: PeftAdapter) -> Any:
    """Return peft's configuration object, with nothing in it that we do ourselves."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    kind = adapter.config.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise CheckpointError(
            f"{adapter.ref} is an adapter of kind {kind}, which peft {peft.__version__} "
            "doesn't have"
        )
    made_by = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if (
        issubclass(made_by, peft.PromptLearningConfig)
        or kind not in PEFT_TYPE_TO_TUNER_MAPPING
        or kind == "XLORA"
    ):
        raise CheckpointError(
            f"{adapter.ref} is an adapter of kind {kind}, which works on inputs and not on weights"
        )
    known = {field.name for field in fields(made_by)}
    settings = {name: value for name, value in adapter.config.items() if name in known}
    unknown = [name for name, value in adapter.config.items() if value and name not in known]
    if unknown:
        raise CheckpointError(
            f"{adapter.ref} asks for {first_few(unknown)}, which {kind} of peft "
            f"{peft.__version__} doesn't have",
            hint="a newer peft may have it",
        )
    config: Any = made_by(**settings)
    config.inference_mode = True
    if getattr(config, "modules_to_save", None) and hasattr(config, "exclude_modules"):
        config.exclude_modules = _excluded(config)
    for name, value in {"modules_to_save": None, "bias": "none"}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if changed_base(adapter.config):
        config.init_lora_weights = False
    return config
