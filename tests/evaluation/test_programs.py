"""Scores of any program: the same search, constraint, held-out choice and resume."""

from __future__ import annotations

import json
import shlex
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.transformers_folders import saved, small_gpt2

from weightops import SearchOptions, negate, open_checkpoint, patch, rank
from weightops.cli.main import run
from weightops.errors import NonfiniteError, OptionError, TaskError
from weightops.evaluation.programs import Candidate
from weightops.tasks.table import find_task

JUDGE = """
import json, struct, sys
from pathlib import Path
folder = Path(sys.argv[-1])
with open(folder / "model.safetensors", "rb") as stream:
    length = struct.unpack("<Q", stream.read(8))[0]
    header = json.loads(stream.read(length))
    start, _ = header["transformer.ln_f.bias"]["data_offsets"]
    stream.seek(8 + length + start)
    w = struct.unpack("<f", stream.read(4))[0]
assert (folder / "config.json").is_file()
with open(Path(__file__).with_name("calls"), "a") as calls:
    calls.write("%g\\n" % w)
print("loading", w, file=sys.stderr)
for i in range(60):
    print(json.dumps({"task": "new", "item": f"n{i}", "value": 1 - (w - 0.6 - i % 7 / 70) ** 2}))
    print(json.dumps({"task": "old", "item": i, "value": 3 - w * w * (1 + i % 3 / 10)}))
    split = "test" if i < 9 else "validation"
    print(json.dumps({"task": "split", "item": i, "value": w, "split": split}))
"""


def best(task: str, alphas: list[float], split: str = "validation") -> dict[float, float]:
    """Alpha -> mean value of a half, computed here from the judge's formulas."""
    names = [f"n{i}" if task == "new" else f"{i}" for i in range(60)]
    halves = [sha256(f"{task}\0{name}".encode()).digest()[0] % 2 for name in names]
    kept = [i for i in range(60) if halves[i] == (split == "test")]
    return {
        a: sum(
            1 - (a - 0.6 - i % 7 / 70) ** 2 if task == "new" else 3 - a * a * (1 + i % 3 / 10)
            for i in kept
        )
        / len(kept)
        for a in alphas
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same with one changed bias, and a program that judges this bias."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("programs")
    model = small_gpt2()
    saved(model, root / "base")
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 1.0
    saved(model, root / "tuned")
    (root / "judge.py").write_text(JUDGE)
    return root


@pytest.fixture
def program(root: Path) -> str:
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(root / 'judge.py'))}"


def calls(root: Path) -> list[float]:
    return [float(line) for line in (root / "calls").read_text().split()]


ALPHAS = [i / 10 for i in range(11)]


def test_patch_picks_what_the_grid_picks(root: Path, program: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = "patch --task new --supported old --max-supported-drop 0.25 --alphas 0:1:0.1 -q"
    models = ["--model", str(root / "base"), "--finetuned", str(root / "tuned")]
    assert run([*line.split(), "--score", program, *models, "-o", str(out)]) == 0
    new, old = best("new", ALPHAS), best("old", ALPHAS)
    allowed = [a for a in ALPHAS if old[a] >= old[0.0] - 0.25 - 0.02]  # and 95 % sure of it
    summary = json.loads((out / "summary.json").read_text())
    assert summary["alpha"] == max(allowed, key=lambda a: new[a]) == 0.4
    assert summary["tasks"]["new"]["patched"]["score"] == pytest.approx(
        best("new", [0.4], "test")[0.4], abs=1e-6
    )
    rows = [json.loads(row) for row in (out / "results.jsonl").read_text().splitlines()]
    whole = max(row["metrics"]["n"] for row in rows if row["dataset"] == "new")
    sweep = {
        row["alpha"]: row["metrics"]["score"]
        for row in rows
        if (row["weights"], row["dataset"], row["metrics"]["n"]) == ("sweep", "new", whole)
    }
    assert sweep == {a: pytest.approx(new[a], abs=1e-6) for a in sweep}
    edited = open_checkpoint(out)
    assert edited["transformer.ln_f.bias"][0].item() == pytest.approx(0.4)
    assert (out / "report.html").is_file()
    card = (out / "README.md").read_text()
    assert "The items come from" in card
    assert "judge.py" in card
    said = yaml.safe_load((out / "run.yaml").read_text())
    assert said["task"] == ["score=python judge.py:new"]  # without folders of this machine


def test_each_edit_is_scored_once_and_a_resumed_run_reads_the_scores(
    root: Path, program: str, tmp_path: Path
) -> None:
    (root / "calls").unlink(missing_ok=True)
    how: dict[str, Any] = {
        "model": root / "base",
        "supported": f"score={program}:old",
        "finetuned": root / "tuned",
        "search": SearchOptions((0.25, 0.5), "grid"),
        "rule": "mean",
    }

    def stop(measured: Any) -> None:
        if measured.alpha == 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patch(f"score={program}:new", tmp_path / "out", on_measured=stop, **how)
    assert sorted(calls(root)) == [0.0, 0.25, 0.5]
    summary = patch(f"score={program}:new", tmp_path / "out", resume=True, **how)
    assert sorted(calls(root)) == [0.0, 0.25, 0.5, 1.0]  # the fine-tuned model is new
    assert not list(tmp_path.glob(".out*"))
    assert summary["alpha"] == 0.25


def test_negation_with_baselines(root: Path, program: str, tmp_path: Path) -> None:
    summary = negate(
        f"score={program}:new",
        tmp_path / "out",
        model=root / "base",
        control=f"score={program}:old",
        control_threshold=0.9,
        finetuned=root / "tuned",
        search=SearchOptions((0.25, 0.5)),
        baselines=True,
    )
    assert summary["alpha"] == -0.5
    assert "no gradient" in summary["baselines"]["ascent"]["why"]


def test_soup_add_and_select(root: Path, program: str, tmp_path: Path, capsys: Any) -> None:
    score = ["--score", program, "-q"]
    models = [str(root / name) for name in ("base", "tuned")]
    assert run(["soup", *models, "--tasks", "new", *score, "-o", str(tmp_path / "soup")]) == 0
    soup = json.loads((tmp_path / "soup" / "summary.json").read_text())
    assert [step["accepted"] for step in soup["steps"]] == [True, True]
    vectors = ["--finetuned", models[1], "--finetuned", models[1], "--model", models[0]]
    assert run(["add", "--tasks", "new,old", *score, *vectors, "-o", str(tmp_path / "add")]) == 0
    capsys.readouterr()
    given = ["--target", "new", "--model", models[0], *score, "--json"]
    assert run(["select", *models, *given]) == 0
    assert json.loads(capsys.readouterr().out)["order"] == ["tuned", "base"]
    outcome = rank({"a": models[0], "b": models[1]}, f"score={program}:new", model=models[0])
    assert outcome.more["order"] == ["b", "a"]
    gain = best("new", [0.0, 0.3])
    assert outcome.rows[0][1] == pytest.approx(gain[0.3] - gain[0.0], abs=1e-6)


def test_splits_of_the_program(root: Path, program: str) -> None:
    candidate = Candidate.open(root / "base", torch.device("cpu"))
    task = find_task(f"score={program}:split")
    assert len(candidate.values(task, "test")) == 9
    assert len(candidate.values(task, "validation")) == 51


PRINTER = """
import json, sys
def line(**given):
    print(json.dumps({'task': 'new', 'item': 7, 'value': 1, **given}))
"""


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("print('loading')", "line 1 of what .* prints isn't JSON: 'loading'"),
        ("print('{}')", "has no task, item, value"),
        ("pass", "prints no scores"),
        ("sys.exit(3)", "failed with exit code 3"),
        ("line(value='high')", "has the value 'high', which is no number"),
        ("line(); line()", "prints two scores of the item 7 of new"),
        ("line(task='other')", "there is no task 'new'"),
        ("line(split='train')", "has the split 'train'"),
        ("line(split='test')", "scores no item of new for validation"),
        ("line(item=[1])", r"names task and item by 'new' and \[1\]"),
    ],
)
def test_what_programs_get_wrong(root: Path, tmp_path: Path, lines: str, sentence: str) -> None:
    (tmp_path / "judge.py").write_text(PRINTER + lines)
    task = find_task(f"score={sys.executable} {tmp_path / 'judge.py'}:new")
    candidate = Candidate.open(root / "base", torch.device("cpu"))
    with pytest.raises(TaskError, match=sentence):
        [candidate.values(task, split) for split in ("validation", "test")]


def test_other_items_and_no_numbers(root: Path, tmp_path: Path, program: str) -> None:
    candidate = Candidate.open(root / "base", torch.device("cpu"))
    (tmp_path / "judge.py").write_text(
        "import json, os, sys\nn = len(os.listdir(os.path.dirname(__file__)))\n"
        "for i in range(20 + n):\n    print(json.dumps({'task': 'new', 'item': i, 'value': 1}))\n"
    )
    task = find_task(f"score={sys.executable} {tmp_path / 'judge.py'}:new")
    candidate.values(task, "test")
    (tmp_path / "more").touch()
    candidate.edited = open_checkpoint(root / "tuned")
    with pytest.raises(
        TaskError, match="scores other items of new than it did of another edit: 21"
    ):
        candidate.values(task, "test")
    (tmp_path / "nan.py").write_text('print(\'{"task": "new", "item": 1, "value": NaN}\')')
    with pytest.raises(NonfiniteError, match="1 items of new with NaN"):
        candidate.values(find_task(f"score={sys.executable} {tmp_path / 'nan.py'}:new"), "test")


def test_refusals(root: Path, program: str, tmp_path: Path, capsys: Any) -> None:
    new, old = (f"score={program}:{name}" for name in ("new", "old"))
    how = {"model": root / "base", "finetuned": root / "tuned"}
    with pytest.raises(OptionError, match="is scored by a program, and can't be learned from"):
        patch(new, tmp_path / "out", model=root / "base", supported=old)
    with pytest.raises(OptionError, match="is scored by a program, and shapes has images"):
        patch(new, tmp_path / "out", supported="shapes", **how)
    with pytest.raises(OptionError, match="no use for batch statistics"):
        patch(new, tmp_path / "out", supported=old, batchnorm="base", **how)
    with pytest.raises(TaskError, match="doesn't name a program and its task"):
        find_task("score=:new")
    with pytest.raises(TaskError, match="can't be run: No such file"):
        patch(
            "score=/no/such/judge:new",
            tmp_path / "out",
            supported="score=/no/such/judge:old",
            **how,
        )
    line = ["patch", "--task", "new", "--supported", "old", "--score", program]
    assert run([*line, "--skip-unreadable", "--model", str(root / "base")]) == 2
    assert "a program reads its own data" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))
