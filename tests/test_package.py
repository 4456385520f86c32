"""The package: its surface, its cost of import, its declared dependencies, its layout."""

from __future__ import annotations

import ast
import configparser
import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import weightops
from weightops import errors

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "weightops").rglob("*.py"))
ERRORS = {name for name, thing in vars(errors).items() if isinstance(thing, type)}
SURFACE = ERRORS | {
    *("Checkpoint", "Task", "TaskVector", "ImageModel", "Recipe"),
    *("open_checkpoint", "average", "interpolate", "merge", "compare", "evaluate"),
    *("collect", "pack", "localize", "verify", "Verification"),
    *("compare_accuracy", "mean_change", "Change"),
    *("finetune", "fit", "lofi", "TrainingConfig", "config_for", "SearchOptions"),
    *("Learner", "ModuleLearner", "Node", "connected"),
    *("patch", "negate", "add", "analogy", "soup", "rank", "run_experiment"),
    *("METHODS", "TASKS", "FORMATS", "EVALUATORS", "Method", "Format", "Evaluator"),
    *("method", "evaluator", "register_task", "register_format"),
}


def test_surface() -> None:
    assert set(weightops.__all__) == SURFACE
    assert weightops.__all__ == sorted(SURFACE)
    for name in SURFACE:
        assert getattr(weightops, name).__doc__
    assert re.fullmatch(r"\d+\.\d+\.\d+", weightops.__version__)


def test_the_tree_of_errors_is_drawn() -> None:
    drawn = re.findall(r"(\w+Error) ", errors.__doc__ or "")
    assert set(drawn) == ERRORS - {"WeightopsError"}


def modules_after(code: str) -> set[str]:
    """Run code in a process of its own; return the modules that it imported."""
    listed = f"{code}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", listed]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_imports_are_light() -> None:
    heavy = {"open_clip", "datasets", "torchvision", "matplotlib", "timm", "huggingface_hub"}
    assert not modules_after("from weightops import TaskVector, Checkpoint, average") & heavy
    assert "torch" not in modules_after("import weightops")


@pytest.mark.parametrize("arguments", [["--help"], ["tasks"], ["patch", "--help"], ["--version"]])
def test_the_command_line_answers_without_torch(arguments: list[str]) -> None:
    assert "torch" not in modules_after(f"from weightops.cli.main import run; run({arguments})")


def test_the_embedded_model_is_small() -> None:
    folder = ROOT / "weightops" / "clip"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6e6
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "merges.txt.gz",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    }


def imported(path: Path) -> set[str]:
    """Return the top-level names of all packages that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"weightops"}


def declared(section: str, *names: str) -> set[str]:
    """Return the distributions that options of setup.cfg list, as their canonical names."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = [line for name in names for line in config[section][name].split("\n") if line.strip()]
    found = (re.match(r"[\w.-]+", line.strip()) for line in lines)
    return {match[0].lower().replace("_", "-") for match in found if match}


def test_imported_packages_are_declared() -> None:
    known = {name.lower().replace("_", "-") for name in declared("options", "install_requires")}
    known |= declared("options.extras_require", "plot", "hf", "align", "demo")
    known |= declared("options.extras_require", "tensorboard", "wandb")
    owners = packages_distributions()
    for path in SOURCES:
        for name in imported(path):
            distributions = {d.lower().replace("_", "-") for d in owners.get(name, [name])}
            assert distributions & known, f"{path.relative_to(ROOT)} imports {name}"


def test_files_and_functions_fit() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is None:
                assert length(node) <= 50, (path, node.name)
            elif isinstance(node, ast.FunctionDef):
                assert length(node) - length(node.body[0]) <= 50, (path, node.name)


def length(node: ast.stmt) -> int:
    """Return the number of lines of a statement, of a function without its signature."""
    first = node.body[0].lineno if isinstance(node, ast.FunctionDef) else node.lineno
    return (node.end_lineno or first) - first + 1


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    beginnings = ("What ", "How ", "The same", "As ", "Its ", "It ", "All ", "With ", "TODO")
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                docstring = ast.get_docstring(node) or ""
                assert not docstring.startswith(beginnings), (path, docstring.partition("\n")[0])
