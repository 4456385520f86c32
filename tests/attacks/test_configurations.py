"""Recipes and configurations with wrong values: one error that names the file, never a bare one."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import weightops
from weightops import Recipe, open_checkpoint
from weightops.checkpoints.libraries.config_checks import check_config
from weightops.errors import CheckpointError, RecipeError, WeightopsError

ODD: list[Any] = [
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf")),
    *("", "x", "1e-5", "../..", "hf-hub:a/b", "a\nb", "\x1b[31m", [], {}, [0], ["x"], [[]], [{}]),
    *({"a": 1}, {"*": 0.5}, {"each": [1]}, {"each": 3}, {1: 2}, {"value": 1}, [{"filter": "x"}]),
]
"""Values that some key doesn't expect."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in nested mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


def changed(content: Any, generator: random.Random) -> Any:
    """Return a copy in which one to three values are replaced, removed, renamed or repeated."""
    content = copy.deepcopy(content)
    for _ in range(generator.randint(1, 3)):
        known = list(places(content))
        if not known:
            break
        *above, last = generator.choice(known)
        parent = content
        for key in above:
            parent = parent[key]
        kind = generator.randrange(8)
        if kind == 0:
            del parent[last]
        elif kind == 1 and isinstance(parent, dict):
            parent[generator.choice(["model", "weight", "parameters", "x", 3])] = parent.pop(last)
        elif kind == 2 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        else:
            parent[last] = copy.deepcopy(generator.choice(ODD))
    return content


RECIPES: dict[str, Any] = {
    "ours": {
        "method": "ties",
        "base": "BASE",
        "models": ["A", {"model": "B", "weight": {"l.0*": 0.5}}],
        "alpha": [0.5, 1.0],
        "options": {"density": {"*.w": 0.5}},
        "seed": 3,
        "dtype": "bfloat16",
    },
    "ours in slices": {
        "slices": [
            {"models": [{"model": "A", "layers": [0, 1]}]},
            {
                "method": "slerp",
                "options": {"t": 0.3},
                "models": [{"model": m, "layers": [0, 2]} for m in "AB"],
            },
        ]
    },
    "mergekit's": {
        "merge_method": "dare_ties",
        "base_model": "BASE",
        "models": [
            {"model": "A", "parameters": {"weight": 0.5, "density": [0.1, 0.9]}},
            {"model": "B", "parameters": {"weight": [{"filter": "w", "value": 1}, {"value": 2}]}},
        ],
        "parameters": {"normalize": True, "lambda": 0.5},
        "dtype": "float32",
    },
    "mergekit's in slices": {
        "merge_method": "linear",
        "slices": [
            {"sources": [{"model": "A", "layer_range": [0, 1], "parameters": {"weight": 1}}]},
            {"sources": [{"model": "B", "layer_range": [1, 2], "parameters": {"weight": 1}}]},
        ],
    },
}


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("A", "B", "BASE"):
        tensors = {f"l.{i}.w": torch.full((2, 2), float(len(name) + i)) for i in range(2)}
        save_file(tensors, tmp_path / name)
    generator, merged, refused = random.Random(kind), 0, 0
    for i in range(600):
        content = changed(RECIPES[kind], generator)
        try:
            text = yaml.safe_dump(content, sort_keys=False)
        except (yaml.YAMLError, ValueError):
            continue
        Path("r.yaml").write_text(text)
        try:
            Recipe.read("r.yaml").merge().state_dict()
            merged += 1
        except WeightopsError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{i}: {type(error).__name__}: {error} of\n{text}") from error
    assert merged
    assert refused


YAML = {
    "aliases of aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
        "repeats values by aliases too often",
    ),
    "an alias in its own value": ("models: &a [*a]", "holds a value that holds itself"),
    "nesting": ("models: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
    "deep nesting": ("models: " + "[" * 5000 + "]" * 5000, "is not valid YAML|more than 50 deep"),
    "nesting by aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 80)),
        "nested more than 50 deep",
    ),
    "a key twice": (
        "method: ties\nmodels: [a]\nmethod: slerp",
        "repeats the key 'method' in line 3",
    ),
    "an inner key twice": (
        "models: [{model: a, weight: 1, weight: 2}]",
        "repeats the key 'weight'",
    ),
    "a date that can't be": ("models: [2024-99-99]", "is not valid YAML"),
    "an object": ("models: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    "two documents": ("models: [a]\n---\nmodels: [b]", "one at most has no name"),
    "a large number": ("models: [a]\nseed: " + "9" * 5000, "has a number of 5000 characters"),
    "much text": ("# " + "x" * 5_000_000, "more than 4,000,000 characters"),
}


@pytest.mark.parametrize("lie", YAML)
def test_yaml(tmp_path: Path, lie: str) -> None:
    text, message = YAML[lie]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=rf"r\.yaml.* ({message})"):
        Recipe.read(tmp_path / "r.yaml")


def test_aliases_are_allowed(tmp_path: Path) -> None:
    text = "models: [{model: a, weight: &w 0.5}, {model: b, weight: *w}]"
    (tmp_path / "r.yaml").write_text(text)
    assert Recipe.read(tmp_path / "r.yaml").weights == (0.5, 0.5)


# ------------------------------------------------------------------- configurations


def open_clip_folder(folder: Path) -> Path:
    shutil.copytree(Path(weightops.__file__).parent / "clip", folder)
    return folder / "open_clip_config.json"


def transformers_folder(folder: Path) -> Path:
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    return folder / "config.json"


def timm_folder(folder: Path) -> Path:
    folder.mkdir()
    config = {
        "architecture": "test_vit",
        "num_classes": 3,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5]},
        "model_args": {"img_size": 32},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    return folder / "config.json"


FOLDERS = {"open_clip": open_clip_folder, "transformers": transformers_folder, "timm": timm_folder}


@pytest.mark.parametrize("library", FOLDERS)
def test_configurations(tmp_path: Path, library: str) -> None:
    path = FOLDERS[library](tmp_path / "model")
    content = json.loads(path.read_text())
    generator, built = random.Random(library), 0
    for _ in range(60):
        mutant = changed(content, generator)
        path.write_text(json.dumps(mutant))
        for part in ("model", "preprocess", "tokenizer"):
            try:
                getattr(open_checkpoint(path.parent), part)()
                built += 1
            except WeightopsError:
                continue
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error} of {mutant}") from error
    assert built or library == "transformers"


CODE: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "text_cfg.hf_model_name": (
        "open_clip",
        lambda c: c["model_cfg"]["text_cfg"].update(hf_model_name="somebody/model"),
    ),
    "vision_cfg.timm_model_name": (
        "open_clip",
        lambda c: c["model_cfg"]["vision_cfg"].update(timm_model_name="hf-hub:somebody/model"),
    ),
    "trust_remote_code": ("transformers", lambda c: c.update(trust_remote_code=True)),
    "attn_implementation": (
        "transformers",
        lambda c: c.update(attn_implementation="somebody/kernel"),
    ),
    "text_config.trust_remote_code": (
        "transformers",
        lambda c: c.update(text_config={"trust_remote_code": True}),
    ),
    "architecture": ("timm", lambda c: c.update(architecture="local-dir:/elsewhere")),
    "code_repo": ("transformers", lambda c: c.update(code_repo={"name": "somebody/code"})),
    "custom_generate": ("transformers", lambda c: c.update(custom_generate=["somebody/x"])),
    "backbone_config.backbone": (
        "transformers",
        lambda c: c.update(backbone_config={"backbone": "hf-hub:somebody/model"}),
    ),
    "model_args.pretrained_cfg_overlay": (
        "timm",
        lambda c: c["model_args"].update(pretrained_cfg_overlay={"file": "/elsewhere"}),
    ),
    "model_args.checkpoint_path": (
        "timm",
        lambda c: c["model_args"].update(checkpoint_path="/elsewhere"),
    ),
}
"""Key -> the library, and a change by which it would lead to code or files of somebody else."""


@pytest.mark.parametrize("key", CODE)
def test_keys_that_lead_to_code_are_named(tmp_path: Path, key: str) -> None:
    library, change = CODE[key]
    path = FOLDERS[library](tmp_path / "model")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"{path.name} sets (model_cfg\.)?{key}.* "):
        open_checkpoint(path.parent).model()


HARMLESS = {
    "label2id": {"remote control": 0, "trust": 1},
    "label_descriptions": {"remote": "a remote control", "width": "how wide it is"},
    "conv_kernel_size": [3, 3],
    "use_kernels": False,
    "hash_code_len": 9,
    "trust_remote_code": False,
    "custom_text": True,
    "_name_or_path": "/home/somebody/model",
}


@pytest.mark.parametrize("key", HARMLESS)
def test_keys_that_only_sound_alike_are_allowed(tmp_path: Path, key: str) -> None:
    path = FOLDERS["transformers"](tmp_path / "model")
    config = {**json.loads(path.read_text()), key: HARMLESS[key]}
    path.write_text(json.dumps(config))
    check_config(config, path, allowed=frozenset())
    open_checkpoint(path.parent).known_architecture().build()


def test_configurations_that_the_libraries_come_with_are_allowed() -> None:
    import open_clip
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        text = config["text_cfg"].get("hf_model_name")
        allowed = frozenset({text} if text else ())
        check_config({"model_cfg": config}, Path(name), allowed=allowed)
    for name in ("bert", "clip", "llama", "vit", "whisper", "t5", "jamba", "swinv2", "wav2vec2"):
        config = CONFIG_MAPPING[name]().to_dict()
        check_config(json.loads(json.dumps(config)), Path(name), allowed=frozenset())
