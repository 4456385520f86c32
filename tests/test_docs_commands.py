"""The commands and examples of the documentation: they run, on tiny models and few images."""

from __future__ import annotations

import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.pages import (
    EXAMPLES,
    PAGES,
    RECIPES,
    ROOT,
    TRAINING,
    Provider,
    blocks,
    commands,
    restored,
    small_tasks,
)
from helpers.threads import one_torch_thread

from weightops import EVALUATORS, METHODS, TASKS, Recipe, open_checkpoint
from weightops.checkpoints.opening import FORMATS
from weightops.cli.main import VERBS, run

ELSEWHERE = (
    r"pip install .*",
    r"python -m pytest",
    r"python benchmarks/\w+\.py",
    r"torchrun .* -m weightops .*",
    r"weightops push .*",
    r"weightops explore .*",
    r"weightops .*--push .*",
    r"weightops .*\b(open_clip|timm|clip-benchmark)[:/].*",
)
"""Commands that need the network, several machines, hours or a person: options are checked."""

CHEAP = {
    "patch": [*TRAINING, "--alphas", "0,0.25,0.5", "--max-supported-drop", "0.9"],
    "negate": [*TRAINING, "--alphas", "0,0.5,1", "--control-threshold", "0.1"],
    "add": ["--steps", "12", *TRAINING[2:], "--alphas", "0,0.2,0.4"],
    "analogy": ["--steps", "12", *TRAINING[2:], "--alphas", "0,0.3,0.6"],
    "finetune": TRAINING,
    "lofi": TRAINING,
    "experiment": TRAINING,
    "rank": ["--steps", "3", "--device", "cpu"],
    "soup": ["--device", "cpu"],
    "evaluate": ["--device", "cpu"],
}
"""Verb -> options that are added to its commands where these don't have them."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread: on few images, several would mostly wait for each other."""
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Provider:
    return Provider(tmp_path_factory.mktemp("named"))


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tasks(monkeypatch)


RAN: set[str] = set()
"""Commands that ran and depend on no files of a page: one page's run is enough."""


def is_elsewhere(command: list[str]) -> bool:
    return any(re.fullmatch(pattern, " ".join(command)) for pattern in ELSEWHERE)


def cheaply(command: list[str]) -> list[str]:
    """Return the arguments of a weightops command, with cheap settings, and patterns expanded."""
    verb, *rest = command[1:]
    given = {*rest} & {"--vector", "--finetuned", "merge", "--dry-run"}
    settings = CHEAP.get(verb, [])
    pairs = list(zip(settings[::2], settings[1::2], strict=True))
    if given & {"merge"}:
        pairs = []
    if given & {"--vector", "--finetuned"}:
        pairs = [pair for pair in pairs if pair[0] not in ("--steps", "--batch-size")]
    if {*rest} & {"entropy", "loss"}:  # a search by gradient, which tries no alphas
        pairs = [pair for pair in pairs if pair[0] != "--alphas"]
    if "--score" in rest:  # a program, which takes seconds for each alpha
        pairs = [(name, "0,1" if name == "--alphas" else value) for name, value in pairs]
    added = [word for pair in pairs if pair[0] not in rest for word in pair]
    if verb == "experiment" and not rest:
        added = []
    expanded = []
    for word in rest:
        matching = sorted(map(str, Path().glob(word))) if "*" in word and "." not in word else []
        expanded += matching or [word]
    return [verb, *expanded, *added]


def options_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the options that the help of a command's verb names."""
    verb = words[:2] if words[:2] == ["lofi", "merge"] else words[:1]
    assert run([*verb, "--help"]) == 0, verb
    known = set(re.findall(r"(?<!\w)--?[a-z][\w-]*", capsys.readouterr().out))
    if verb == ["merge"]:
        names = {name for method in METHODS.values() for name in method.options}
        known |= {f"--{name.replace('_', '-')}" for name in names}
    return known


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_options_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    spans = re.findall(
        r"`(weightops [^`]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    )
    spoken = [span.split() for span in spans]
    for command in [*commands(page), *spoken]:
        if "weightops" in command[:8] and "pip" not in command:
            words = command[command.index("weightops") + 1 :]
            if not words[0].startswith("-"):
                used = {w.partition("=")[0] for w in words if re.match(r"--?[a-z]", w)}
                assert used <= options_of(words, capsys), command


OF_OTHERS = {
    *("--cuda", "--lazy-unpickle", "--low-cpu-memory", "--out-shard-size", "--random-seed"),
    *("--master-addr", "--max-restarts", "--rdzv-backend", "--limit"),
}
"""Options of mergekit, of torchrun and of the method that a page adds."""


def test_options_that_are_mentioned_exist(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = [[verb] for verb in VERBS] + [["lofi", "merge"]]
    known = set().union(*(options_of(verb, capsys) for verb in verbs))
    for page, text in PAGES.items():
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        assert mentioned - OF_OTHERS <= known | {"--nnodes", "--nproc-per-node"}, page


def test_the_readme_lists_the_verbs() -> None:
    page = PAGES["README.md"]
    cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    listed = {verb for cell in cells for verb in re.findall(r"`(\w+)`", cell)}
    assert listed == {*VERBS}
    assert f"any of {len(METHODS)} methods" in page


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_run(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    provider: Provider,
    few_images: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        text = " ".join(command)
        if is_elsewhere(command):
            for script in re.findall(r"benchmarks/\w+\.py", text):
                assert (ROOT / script).is_file(), text
            continue
        assert command[0] == "weightops", text
        if text in RAN:
            continue
        named = provider.provide(text, tmp_path)
        code = run(cheaply(command))
        out, err = capsys.readouterr()
        assert code == 0, f"{text}\n{err}"
        if not named:
            RAN.add(text)
        if "--print-recipe" in command:
            shown = blocks(page, "yaml")
            assert yaml.safe_load(out) in map(yaml.safe_load, shown), text
        if command == ["weightops", "experiment"]:
            for name in blocks(page, "text")[-1].split():
                assert f"{name} " in out


def test_merge_methods_page_is_generated(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--markdown"]) == 0
    _, title, methods = PAGES["docs/merge_methods.md"].partition("## ")
    assert title + methods == capsys.readouterr().out


# ------------------------------------------------------------------------------ examples

RECIPE_BLOCKS = [
    pytest.param(block, id=f"{page} {i}")
    for page in PAGES
    for i, block in enumerate(blocks(page, "yaml"))
]


def _merge(recipe: Path, provider: Provider) -> None:
    provider.provide(recipe.read_text(encoding="utf-8"), recipe.parent)
    merged = Recipe.read(recipe).merge()
    merged.save(recipe.parent / "merged")
    assert len(open_checkpoint(recipe.parent / "merged")) == len(merged)


@pytest.mark.parametrize("block", RECIPE_BLOCKS)
def test_recipes_of_pages_merge(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: Provider
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.yaml").write_text(block, encoding="utf-8")
    _merge(tmp_path / "block.yaml", provider)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_merge(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: Provider
) -> None:
    monkeypatch.chdir(tmp_path)
    copied = tmp_path / recipe.name
    copied.write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
    _merge(copied, provider)


SCRIPTS = {
    "clip_task_vectors": ["hf-clip", "hf-cars", "hf-signs", "out", "0.3"],
    "patch_failures": ["my-clip", "failures", "out", "shapes", "--steps", "3"],
    "merge_language_models": ["llm", "llm-math", "llm-code", "out"],
    "judge": ["sample.txt", "llm"],
    "train_lofi": ["embedded", "mnist", "out", "--steps", "3", "--device", "cpu"],
    "own_method": ["pre", "a", "b", "out"],
    "own_task": ["embedded"],
    "own_format": ["arrays.npz", "out.safetensors"],
    "own_evaluator": ["embedded", "shapes"],
}
"""Script -> arguments that it is run with."""


def test_every_script_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run(
    script: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    provider: Provider,
    few_images: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = SCRIPTS[script]
    provider.provide(" ".join(arguments), tmp_path)
    path = str(EXAMPLES / f"{script}.py")
    if script == "train_lofi":  # torchrun says which node a process is
        for key, value in _alone().items():
            monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    with restored(METHODS, TASKS, FORMATS, EVALUATORS):
        runpy.run_path(path, run_name="__main__")
    assert capsys.readouterr().out
    for output in ("out", "out.safetensors", "out/merged"):
        if output in arguments or (output == "out/merged" and script == "train_lofi"):
            assert (tmp_path / output).exists()


def _alone() -> dict[str, str]:
    """Return the environment of a job of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def test_the_job_for_slurm_is_sound() -> None:
    job = EXAMPLES / "train_lofi.sbatch"
    subprocess.run(["bash", "-n", job], check=True)
    assert (EXAMPLES / "train_lofi.py").name in job.read_text()
