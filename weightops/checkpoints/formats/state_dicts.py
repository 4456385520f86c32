"""From what a pickle holds to named tensors: state dicts, alone or in wrappers, and whole modules of whatever class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from weightops.checkpoints.formats.pickle_objects import Global, StandIn, Storage, StoredTensor
from weightops.errors import CheckpointError

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts keep the weights."""

_MOST = 200_000
"""Tensors and modules that a file may name: one that names a module in two ways, again and again, names very many."""

_DEEP = 200


def named_tensors(content: Any, depth: int = 0) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of an object by name, and what else lies beside them.

    Raises:
        CheckpointError: if there are none, more than one mapping of them, or one is what a call would make that isn't answered.
    """
    mapping = _mapping(content)
    if mapping is not None and depth < _DEEP:
        for key in WRAPPERS:
            if _holds_weights(mapping.get(key)):
                tensors, beside = named_tensors(mapping[key], depth + 1)
                return tensors, [*beside, *(_name(other) for other in mapping if other != key)]
        tensors = {
            _name(key): value for key, value in mapping.items() if isinstance(value, StoredTensor)
        }
        for key, value in mapping.items():
            _check_made(_name(key), value)
        inner = [_name(key) for key, value in mapping.items() if _holds_weights(value)]
        if tensors and inner:
            raise CheckpointError(
                f"it holds tensors at the top ({next(iter(tensors))[:80]}) and under {inner[0][:80]}: save those alone that are the weights"
            )
        if tensors:
            return tensors, [
                _name(key) for key, value in mapping.items() if not isinstance(value, StoredTensor)
            ]
    elif _is_module(content):
        return _module(content)
    raise CheckpointError(
        f"it holds {_described(content)}, not a state dict or a module; its tensors are looked for at the top or "
        f"under {', '.join(WRAPPERS)}"
    )


def _mapping(value: Any) -> Mapping[Any, Any] | None:
    """The items of a dict, or of a stand-in for some kind of dict."""
    if isinstance(value, StandIn) and not _is_module(value) and value.mapping:
        return value.mapping
    return value if isinstance(value, dict) else None


def _name(key: Any) -> str:
    return str(key) if isinstance(key, (str, int)) else f"a key that is a {type(key).__name__}"


def _holds_weights(value: Any) -> bool:
    mapping = _mapping(value)
    if mapping is None:
        return _is_module(value)
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


def _is_module(value: Any) -> bool:
    if not isinstance(value, StandIn) or not isinstance(value.state, dict):
        return False
    return isinstance(value.state.get("_modules"), dict) or value.name.startswith("__torch__")


def _module(root: StandIn) -> tuple[dict[str, StoredTensor], list[str]]:
    """Names as `nn.Module.state_dict` gives them."""
    tensors: dict[str, StoredTensor] = {}
    passed_over: list[str] = []
    pending = [("", root, 0)]
    for _ in range(_MOST):
        if not pending:
            break
        prefix, module, depth = pending.pop()
        if depth > _DEEP:
            raise CheckpointError(f"its modules lie in each other more than {_DEEP} deep")
        children = []
        for name, value, persistent in _attributes(module):
            if isinstance(value, StandIn) and _is_module(value):
                children.append((f"{prefix}{name}.", value, depth + 1))
            elif isinstance(value, StoredTensor) and persistent:
                tensors[prefix + name] = value
            elif value is not None:
                _check_made(prefix + name, value, inside=True)
                passed_over.append(prefix + name)
        pending += reversed(children)
    if pending or len(tensors) > _MOST:
        raise CheckpointError(f"its modules name more than {_MOST:,} tensors")
    if not tensors:
        raise CheckpointError(f"it holds a module {root.name[:200]} without tensors")
    return tensors, passed_over


def _attributes(module: StandIn) -> Iterator[tuple[str, Any, bool]]:
    """Parameters, buffers and children of a module: name, value, and whether a state dict would have it."""
    if module.name.startswith("__torch__"):  # TorchScript keeps all attributes together
        for name, value in module.state.items():
            if isinstance(value, (StoredTensor, StandIn)):
                yield _name(name), value, True
        return
    temporary = module.state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers", "_modules"):
        members = _mapping(module.state.get(kind)) or {}
        for name, value in members.items():
            yield (
                _name(name),
                value,
                kind != "_buffers" or not isinstance(temporary, list) or name not in temporary,
            )


def _check_made(name: str, value: Any, *, inside: bool = False) -> None:
    """Refuse what a call would make of tensors, and ``inside`` a module what holds any: to leave it out would lose weights.

    Raises:
        CheckpointError: naming the call.
    """
    if isinstance(value, StandIn) and _depends_on_tensors(value if inside else value.args):
        raise CheckpointError(
            f"{name[:200]} is what {value.name[:200]} makes of stored numbers; save it as a plain tensor"
        )


def _depends_on_tensors(value: Any) -> bool:
    pending, seen = [value], set()
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
