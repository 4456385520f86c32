"""Find named tensors in an unpickled object: state dicts, alone or wrapped, and whole modules."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from weightops.checkpoints.formats.pickle_objects import (
    Global,
    StandIn,
    Storage,
    StoredTensor,
    short_name,
)
from weightops.errors import CheckpointError
from weightops.support.budget import OBJECT, Budget
from weightops.support.text import first_few

log = logging.getLogger("weightops")

WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net"),
    *("network", "generator", "params_ema", "params", "state_dict_ema", "model_ema"),
    "ema",
)
"""Keys under which training scripts keep the weights, the preferred first."""

_MAX_MODULES = 200_000
"""The most tensors and modules. A file that shares modules again and again names very many."""

_MAX_DEPTH = 200


def named_tensors(
    content: Any, budget: Budget, depth: int = 0
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return the tensors of an object by name, and the names of its other entries.

    Raises:
        CheckpointError: if there are none, if there are two mappings of them, or if one is the
            result of a call that isn't answered.
    """
    mapping = _mapping(content)
    if mapping is not None and depth < _MAX_DEPTH:
        seen: set[int] = set()
        wrapper = _wrapper(mapping, budget)
        if wrapper is not None:
            _check_alone(wrapper, mapping)
            _say_which(wrapper, mapping, budget)
            tensors, skipped = named_tensors(mapping[wrapper], budget, depth + 1)
            return tensors, [*skipped, *(_name(key) for key in mapping if key != wrapper)]
        tensors = _tensors(mapping)
        for key, value in mapping.items():
            _check_result(_name(key), value, seen)
        inner = [_name(key) for key, value in mapping.items() if _holds_weights(value, budget)]
        if tensors and inner:
            raise _two_places(next(iter(tensors)), inner[0])
        if tensors:
            others = [k for k, value in mapping.items() if not isinstance(value, StoredTensor)]
            return _averaged(tensors), [_name(key) for key in others]
    elif _is_module(content):
        return _tensors_of_module(content, budget)
    keys = weight_keys(content, budget)
    raise CheckpointError(
        f"it holds {_described(content)}, not a state dict or a module",
        hint=f"FILE:KEY opens the weights under a key: {first_few(key[:80] for key in keys)}"
        if keys
        else f"tensors are looked for at the top or under {', '.join(WRAPPERS)}",
    )


def _wrapper(mapping: Mapping[Any, Any], budget: Budget) -> str | None:
    """Return the preferred one of the usual keys that hold weights, or None."""
    return next((key for key in WRAPPERS if _holds_weights(mapping.get(key), budget)), None)


def weight_keys(content: Any, budget: Budget) -> list[str]:
    """Return the keys of the dictionaries of weights in an object, the one that is opened first.

    They are those that `at_key` takes; of inner dictionaries, those at most one level down.
    """
    top = _mapping(content)
    if top is None:
        return []
    tensors = _tensors(top)
    if tensors:
        return [end for end in _ENDS if _averaged(tensors, quiet=True) is not tensors]
    chosen = _wrapper(top, budget)
    keys = [] if chosen is None else [chosen]
    for key, value in top.items():
        if key == chosen:
            continue
        if _holds_weights(value, budget):
            keys.append(_name(key))
        elif (inner := _mapping(value)) is not None:
            budget.spend(16 * len(inner))
            for k, item in inner.items():
                if _holds_weights(item, budget):
                    keys.append(_joined(_name(key), ".", _name(k), budget))
    return keys


def at_key(content: Any, key: str, budget: Budget) -> Any:
    """Return the value at a key of an unpickled dictionary, or at keys with dots between them.

    Raises:
        CheckpointError: listing the keys that hold weights, if there is no such key.
    """
    value = content
    remaining = key
    while remaining:
        mapping = _mapping(value) or {}
        names = {_name(name): name for name in mapping}
        found = next((name for name in names if remaining in (name, f"{name}.")), None)
        found = found or next((n for n in names if remaining.startswith(f"{n}.")), None)
        if found is None:
            inner = _below(mapping, remaining)
            if inner:
                return inner
            known = (_name(n)[:80] for n, item in mapping.items() if _holds_weights(item, budget))
            under = first_few(known, 20) or "no key"
            raise CheckpointError(f"it has no key {key!r}", hint=f"weights are under {under}")
        value, remaining = mapping[names[found]], remaining[len(found) + 1 :]
    return value


def _below(mapping: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    """Return the entries whose names begin with a prefix and a dot, without these."""
    names = {_name(key): value for key, value in mapping.items()}
    return {
        name.removeprefix(f"{prefix}."): value
        for name, value in names.items()
        if name.startswith(f"{prefix}.")
    }


_ENDS = ("ema_model", "online_model")
"""The average and the trained weights in a file of ema_pytorch."""


def _averaged(tensors: dict[str, StoredTensor], *, quiet: bool = False) -> dict[str, StoredTensor]:
    """Return the average of a file of ema_pytorch, which holds the trained weights beside it."""
    average, trained = (_below(tensors, end) for end in _ENDS)
    if not average or average.keys() != trained.keys():
        return tensors
    if not quiet:
        log.warning("the average under %s is opened; FILE:%s opens what was trained", *_ENDS)
    return average


def _check_alone(taken: str, mapping: Mapping[Any, Any]) -> None:
    """Refuse tensors beside a dictionary of weights, but for counters, which are one number."""
    for key, value in mapping.items():
        if isinstance(value, StoredTensor) and math.prod(value.shape) > 1:
            raise _two_places(_name(key), taken)


def _two_places(name: str, key: str) -> CheckpointError:
    return CheckpointError(
        f"it holds tensors at the top ({name[:80]}) and under {key[:80]}",
        hint=f"FILE:{key[:80]} opens the weights there; or save only the weights",
    )


def _say_which(taken: str, mapping: Mapping[Any, Any], budget: Budget) -> None:
    """Say which of several dictionaries of weights is opened."""
    weights = [k for k, item in mapping.items() if k != taken and _holds_weights(item, budget)]
    if weights:
        others = first_few(_name(key)[:80] for key in weights)
        log.warning("the weights under %s are opened; FILE:KEY opens others: %s", taken, others)


def _mapping(value: Any) -> Mapping[Any, Any] | None:
    """Return the items of a dict, or of a stand-in for some kind of dict; None for other values."""
    if isinstance(value, StandIn) and not _is_module(value) and value.mapping:
        return value.mapping
    return value if isinstance(value, dict) else None


def _name(key: Any) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, StandIn) and isinstance(key.args, int):
        key = key.args  # a large number
    return short_name(key) if isinstance(key, int) else f"a key that is a {type(key).__name__}"


def _joined(prefix: str, dot: str, name: str, budget: Budget) -> str:
    """Return a name of two parts, each of which may be long and in other names, too."""
    budget.spend(OBJECT + len(prefix) + len(name))
    return f"{prefix}{dot}{name}"


def _tensors(mapping: Mapping[Any, Any]) -> dict[str, StoredTensor]:
    """Return the tensors among the values of a dictionary.

    Raises:
        CheckpointError: if two have one name, as under the keys 1 and "1".
    """
    tensors: dict[str, StoredTensor] = {}
    for key, value in mapping.items():
        if isinstance(value, StoredTensor):
            if _name(key) in tensors:
                raise CheckpointError(
                    f"it holds two tensors under {_name(key)[:200]}",
                    hint="save them under keys that are different texts",
                )
            tensors[_name(key)] = value
    return tensors


def _holds_weights(value: Any, budget: Budget) -> bool:
    mapping = _mapping(value)
    if mapping is None:
        return _is_module(value)
    budget.spend(OBJECT + 16 * len(mapping))
    return any(isinstance(item, StoredTensor) for item in mapping.values()) or any(
        _is_module(mapping.get(key)) or _mapping(mapping.get(key)) for key in WRAPPERS
    )


def _described(content: Any) -> str:
    mapping = _mapping(content)
    if mapping is not None:
        return f"a mapping with keys {', '.join(_name(key)[:80] for key in list(mapping)[:5])}"
    if isinstance(content, (StandIn, Global)):
        return f"what {content.name[:200]} would make"
    return f"a {'Tensor' if isinstance(content, StoredTensor) else type(content).__name__}"


# -------------------------------------------------------------------------- modules


class _Member(NamedTuple):
    """A parameter, buffer or child of a module.

    Attributes:
        name: its name in the module.
        value: the tensor or module.
        persistent: whether the state dict of the module has it.
    """

    name: str
    value: Any
    persistent: bool


def _is_module(value: Any) -> bool:
    if not isinstance(value, StandIn) or not isinstance(value.state, dict):
        return False
    return isinstance(value.state.get("_modules"), dict) or value.name.startswith("__torch__")


def _tensors_of_module(root: StandIn, budget: Budget) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return tensors under the names that `nn.Module.state_dict` gives, and the other names."""
    tensors: dict[str, StoredTensor] = {}
    skipped: list[str] = []
    pending = [("", root, 0)]
    seen: set[int] = set()
    for _ in range(_MAX_MODULES):
        if not pending:
            break
        prefix, module, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"its modules are nested more than {_MAX_DEPTH} deep")
        children = []
        for key, value, persistent in _members(module, budget):
            budget.spend(16)
            if value is None:
                continue
            name = _joined(prefix, "", key, budget)
            if isinstance(value, StandIn) and _is_module(value):
                children.append((f"{name}.", value, depth + 1))
            elif isinstance(value, StoredTensor) and persistent:
                if name in tensors:
                    raise CheckpointError(f"it holds two tensors under {name[:200]}")
                tensors[name] = value
            else:
                _check_result(name, value, seen, in_module=True)
                skipped.append(name)
        pending += reversed(children)
    if pending or len(tensors) > _MAX_MODULES:
        raise CheckpointError(f"its modules name more than {_MAX_MODULES:,} tensors")
    if not tensors:
        raise CheckpointError(f"it holds a module {root.name[:200]} without tensors")
    return tensors, skipped


def _members(module: StandIn, budget: Budget) -> Iterator[_Member]:
    if module.name.startswith("__torch__"):  # TorchScript keeps all attributes together
        for name, value in module.state.items():
            if isinstance(value, (StoredTensor, StandIn)):
                yield _Member(_name(name), value, True)
        return
    listed = module.state.get("_non_persistent_buffers_set")
    listed = listed if isinstance(listed, list) else []
    budget.spend(16 * len(listed))
    temporary = {name for name in listed if isinstance(name, str)}
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in (_mapping(module.state.get(kind)) or {}).items():
            yield _Member(_name(name), value, kind != "_buffers" or name not in temporary)


def _check_result(name: str, value: Any, seen: set[int], *, in_module: bool = False) -> None:
    """Refuse the result of an unanswered call on tensors: to skip the value would lose weights.

    Args:
        name: the name of the value.
        value: the value.
        seen: the ids of objects that hold no tensors.
        in_module: refuse a value of a module, too, whose state holds tensors.

    Raises:
        CheckpointError: naming the call.
    """
    if isinstance(value, StandIn) and _depends_on_tensors(value if in_module else value.args, seen):
        hint = "save it as a plain tensor, which dequantize() makes of a quantised one"
        if "distributed" in value.name:
            hint = "it is one process's part: save what full_tensor() gathers from all of them"
        raise CheckpointError(
            f"{name[:200]} is what {value.name[:200]} makes of stored numbers", hint=hint
        )


def _depends_on_tensors(value: Any, seen: set[int]) -> bool:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, (StoredTensor, Storage)):
            return True
        if isinstance(item, (list, tuple, dict, StandIn)) and id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, StandIn):
                pending += [item.args, item.state, item.items, item.mapping]
            else:
                pending += item.values() if isinstance(item, dict) else item
    return False
