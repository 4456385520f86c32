"""The command line as people use and misuse it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightops as package
from weightops import TaskVector, cli, open_checkpoint
from weightops.cli.main import VERBS, _message, run


def weightops(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    listed = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in listed
        code, out, _ = weightops(capsys, verb, "--help")
        assert code == 0
        assert out.startswith("Usage: weightops ")
        assert "\\b" not in out


def test_vector_apply_inspect(
    capsys: pytest.CaptureFixture[str],
    saved: tuple[Path, Path],
    net: nn.Module,
    tuned: nn.Module,
    tmp_path: Path,
) -> None:
    pre, ft = saved
    code, out, _ = weightops(capsys, "vector", pre, ft, "-o", tmp_path / "v.safetensors", "--json")
    assert code == 0
    assert json.loads(out)["tensors"] == 9
    code, _, _ = weightops(
        capsys,
        "apply",
        tmp_path / "v.safetensors",
        "--base",
        pre,
        "--alpha",
        "0.5",
        "-o",
        tmp_path / "e.safetensors",
    )
    assert code == 0
    assert torch.allclose(
        open_checkpoint(tmp_path / "e.safetensors")["scale"], (net.scale + tuned.scale) / 2
    )
    code, out, _ = weightops(capsys, "inspect", tmp_path / "e.safetensors", "--json")
    facts = json.loads(out)
    assert facts["ties"] == {"out.weight": "embed.weight"}
    assert [term["coefficient"] for term in facts["made_from"]["terms"]] == [1.0, 0.5]
    code, out, _ = weightops(capsys, "inspect", tmp_path / "e.safetensors")
    assert "= embed.weight" in out
    assert "    weight: 0.5" in out


def test_merge_and_methods(
    capsys: pytest.CaptureFixture[str],
    saved: tuple[Path, Path],
    net: nn.Module,
    tuned: nn.Module,
    tmp_path: Path,
) -> None:
    pre, ft = saved
    code, _, err = weightops(
        capsys, "merge", pre, ft, "-o", tmp_path / "mean.safetensors", "--weights", "1,3"
    )
    assert code == 0, err
    assert torch.allclose(
        open_checkpoint(tmp_path / "mean.safetensors")["scale"],
        0.25 * net.scale + 0.75 * tuned.scale,
    )
    ties = ["merge", ft, ft, "--method", "ties", "--base", pre, "-o", tmp_path / "t.safetensors"]
    code, out, _ = weightops(capsys, *ties, "--density", "1.0", "--json")
    assert code == 0
    assert json.loads(out)["terms"][1]["options"] == {
        "density": 1.0,
        "normalize": "weights",
        "rescale": "none",
        "scope": "tensor",
        "count": "all",
    }
    assert torch.allclose(open_checkpoint(tmp_path / "t.safetensors")["scale"], tuned.scale)
    for extra, code, message in (
        (["--densty", "1"], 2, "did you mean density"),
        (["--density", "much"], 2, "is float, not 'much'"),
        (["--density"], 2, "needs a value"),
        (["--normalize", "mean"], 2, "not 'mean'"),
        (["--density", "2"], 2, "density is a fraction"),
    ):
        got, _, err = weightops(capsys, *ties, *extra, "--overwrite")
        assert (got, message in err) == (code, True), err
    _, out, _ = weightops(capsys, "methods")
    assert "tsv_m" in out
    _, out, _ = weightops(capsys, "methods", "ties")
    assert "2306.01708" in out
    _, out, _ = weightops(capsys, "methods", "--json")
    assert {m["name"] for m in json.loads(out)} >= {"ties", "slerp"}


def test_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = weightops(capsys, "tasks", "--json")
    assert json.loads(out)["mnist"]["sizes"]["test"] == 1000
    _, out, _ = weightops(capsys, "tasks", "--classes")
    assert "concentric circles" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["patch", "--task", "mnits"], 2, "did you mean mnist"),
        (["patch"], 2, "Missing option '--task'"),
        (["pach"], 2, "did you mean patch"),
        (["patch", "--task", "mnist", "--seed", "-1"], 2, "seed"),
        (["patch", "--task", "mnist", "--lr", "-1"], 2, "lr"),
        (["patch", "--task", "mnist", "--alphas", "1:0:-0.25"], 2, "rising range"),
        (["patch", "--task", "mnist", "--alphas", "nan"], 2, "neither numbers"),
        (
            ["patch", "--task", "mnist", "--finetuned", "x", "--steps", "3"],
            2,
            "nothing is fine-tuned",
        ),
        (["evaluate", "--tasks", ""], 2, "at least one task"),
        (["evaluate", "--tasks", "digits", "--device", "foo"], 2, "no device 'foo'"),
        (["inspect", "{odd}"], 0, ""),
        (["evaluate", "{delta}"], 1, "holds a task vector, not weights"),
        (["patch", "--task", "mnist", "--alphas", "a:b"], 2, "neither numbers"),
        (
            ["patch", "--task", "mnist", "--model", "nowhere", "--dry-run"],
            1,
            "no file or folder nowhere",
        ),
        (["inspect", "{text}"], 1, "is not a checkpoint"),
        (["vector", "{a}", "{b}"], 1, "don't match"),
        (["vector", "{a}", "{a}", "-o", "{a}"], 1, "exists"),
        (["apply", "{a}", "--base", "{a}", "-o", "{new}"], 1, "holds weights, not a task vector"),
        (["evaluate", "{a}", "--tasks", "digits"], 1, "doesn't say of what model"),
        (
            ["apply", "x", "--base", "y", "--alpha", "1", "--alpha", "2", "-o", "{new}"],
            2,
            "1 vector and 2 alphas",
        ),
        (["inspect", "{here}/nowhere"], 1, "there is no file or folder"),
        (["inspect", "{cut}"], 1, "is cut short: its header says"),
        (["inspect", "{zip}"], 1, "a zip archive that is cut short"),
        (
            ["vector", "{a}", "{a}", "-o", "{here}", "--overwrite"],
            1,
            "is a folder, and the output is a file",
        ),
        (["vector", "{a}", "{a}", "-o", "x.pt"], 2, "--out is a .safetensors file"),
        (["merge", "{a}", "{a}", "-o", "{here}/m", "--push", "name"], 2, "give ORG/NAME"),
        (["merge", "{a}", "{a}", "-o", "{here}/m", "--push", "org/name"], 2, "nobody is logged in"),
        (["lofi", "merge", "{a}", "{a}", "-o", "{here}/m"], 1, "is given twice"),
        (
            ["lofi", "--task", "digits", "--nodes", "2", "--node-size", "2", "-o", "{here}/m"],
            2,
            "--node-size for torchrun",
        ),
    ],
)
def test_misuse_is_told_in_a_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    places = {
        name: str(tmp_path / f"{name}.safetensors")
        for name in ("text", "a", "b", "new", "odd", "delta")
    }
    (tmp_path / "here").mkdir()
    places |= {
        "here": str(tmp_path / "here"),
        "cut": str(tmp_path / "cut"),
        "zip": str(tmp_path / "zip"),
    }
    save_file({"w": torch.zeros(2)}, places["cut"])
    torch.save({"w": torch.zeros(2)}, places["zip"])
    for name in ("cut", "zip"):
        os.truncate(places[name], 40)
    save_file({"w": torch.zeros(2)}, places["odd"], {"weightops": "junk"})
    TaskVector({"w": torch.zeros(2)}, {"w": torch.ones(2)}).save(places["delta"])
    Path(places["text"]).write_text("this is not a checkpoint")
    save_file({"w": torch.zeros(2)}, places["a"])
    save_file({"w": torch.zeros(3)}, places["b"])
    got, out, err = weightops(capsys, *(argument.format(**places) for argument in arguments))
    assert got == code
    assert message in err
    assert bool(out) == (code == 0)
    assert "Traceback" not in err
    assert not Path(places["new"]).exists()


def test_evaluate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = weightops(
        capsys,
        "evaluate",
        "--tasks",
        "digits",
        "--split",
        "validation",
        "-o",
        tmp_path / "r",
        "--json",
    )
    assert code == 0
    [row] = json.loads(out)
    assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= row.keys()
    assert json.loads((tmp_path / "r" / "000_digits_validation.json").read_text()) == row


def test_env_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = weightops(capsys, "env", "--json")
    assert code == 0
    assert {"weightops", "torch", "python", "devices", "threads", "cache"} <= json.loads(out).keys()
    code, out, _ = weightops(capsys, "--version")
    assert (code, out.strip()) == (0, f"weightops, version {package.__version__}")


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        code, out, _ = weightops(capsys, "completion", shell)
        assert code == 0
        assert "_WEIGHTOPS_COMPLETE" in out


def test_module_and_debug() -> None:
    command = [sys.executable, "-m", "weightops", "inspect", "nowhere"]
    plain, debug = (
        subprocess.run([*command, *more], capture_output=True, text=True)
        for more in ([], ["--debug"])
    )
    assert plain.returncode == 1
    first, *hints = plain.stderr.splitlines()
    assert first.startswith("weightops: there is no file or folder nowhere")
    assert all(line.startswith("hint: ") for line in hints)
    assert "Traceback" in debug.stderr


def test_every_verb_is_listed() -> None:
    stems = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__", "main"}
    modules = {stem: import_module(f"weightops.cli.{stem}") for stem in stems}
    verbs = {
        stem
        for stem, module in modules.items()
        for name in (stem, "command")
        if isinstance(getattr(module, name, None), click.Command)
    }
    assert verbs == set(VERBS)
    contract = (Path(__file__).parents[2] / "setup.cfg").read_text()
    assert set(re.findall(r"^    weightops\.cli\.(\w+)$", contract, re.MULTILINE)) == verbs


@pytest.mark.parametrize(
    ("number", "default"),
    [(signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)],
)
def test_an_interrupt_is_told_as_one(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    default: Any,
) -> None:
    def native() -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ValueError("what native code makes of a pending exception") from None

    monkeypatch.setattr("weightops.cli.tasks.tasks.callback", lambda **_: native())
    before = signal.signal(number, default)
    try:
        code, _, err = weightops(capsys, "tasks")
        assert signal.getsignal(number) == default
    finally:
        signal.signal(number, before)
    assert code == 1
    assert err.startswith("weightops: interrupted;")


def test_quiet_whatever_was_imported_before(tmp_path: Path) -> None:
    script = (
        "import time, tqdm; from weightops.cli.printing import quieten; quieten();\n"
        "from weightops.support import progress; progress.EVERY = 0.1\n"
        "for _ in tqdm.tqdm(range(3)): time.sleep(0.2)\n"
        "with progress.job('a job', 3) as whole:\n"
        "    for _ in progress.tracked(range(3), 'a part'): time.sleep(0.2); whole.done(1)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr == ""


def test_out_of_memory_says_what_was_asked_for() -> None:
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert "1,152,921,504.61 GB was asked for" in _message(caught.value)
    assert "more was asked for" in _message(MemoryError())
