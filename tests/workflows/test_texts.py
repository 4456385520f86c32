"""Edits of language models for texts: the same workflows, with perplexity as the score."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.texts import letter_model, write_texts

from weightops import (
    SearchOptions,
    TaskVector,
    add,
    analogy,
    config_for,
    evaluate,
    negate,
    open_checkpoint,
    patch,
    rank,
    soup,
)
from weightops.cli.main import run
from weightops.errors import CheckpointError, OptionError, TaskError
from weightops.search.session import EditSession
from weightops.search.strategies import ALPHAS
from weightops.tasks.table import find_task
from weightops.workflows.negate import Negation

STEPS = {"steps": 30, "batch_size": 16, "lr": 1e-3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, a language model that has learned two of them, and a vector of one."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("texts")
    texts = write_texts(root)
    letter_model(root / "lm", [texts["code"], texts["prose"]])
    task = find_task(str(texts["code"]))
    session = EditSession(root / "lm", [task], config=config_for(root / "lm", **STEPS))
    session.learn(task).save(root / "code.safetensors")
    return root


@pytest.fixture
def options(root: Path) -> dict[str, Any]:
    search = SearchOptions((0.25, 0.5, 0.75, 1.0))
    training = config_for(root / "lm", **STEPS)
    return {
        "model": root / "lm",
        "device": "cpu",
        "precision": "float32",
        "search": search,
        "training": training,
    }


def parts(text: str) -> dict[str, str]:
    """Return the splits of a text, by another way: of its lines."""
    lines, found, place = text.splitlines(keepends=True), {0: "", 1: "", 2: "", 3: ""}, 0
    stretch = 0
    for line in lines:
        found[stretch % 4] += line
        place += len(line)
        while stretch < 39 and place >= max((stretch + 1) * len(text) // 40, 1):
            stretch += 1
    return {"train": "", "validation": found[2], "test": found[3]}


@torch.no_grad()
def perplexity_of(model: Any, text: str) -> float:
    """Return the perplexity of a text in blocks of 64 letters, as transformers computes it."""
    tokens = open_checkpoint(model).architecture.tokens(text)  # type: ignore[union-attr]
    blocks = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return math.exp(float(module(input_ids=blocks, labels=blocks).loss))


def test_negation_keeps_the_control(root: Path, options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    texts = {name: root / f"{name}.txt" for name in ("code", "prose")}
    asked = {"control": str(texts["prose"]), "baselines": True, **options}
    result = negate(str(texts["code"]), out, **asked)
    scores = result["tasks"]
    target, control = scores["code.txt"], scores["prose.txt"]
    assert result["alpha"] < 0
    assert {"base", "finetuned", "edited", "random", "ascent"} <= target.keys()
    assert target["edited"]["perplexity"] > 1.03 * target["base"]["perplexity"]
    assert control["edited"]["perplexity"] < 1.02 * control["base"]["perplexity"]
    assert target["ascent"]["perplexity"] > 10 * target["base"]["perplexity"]
    for name, path in texts.items():
        test = parts(path.read_text(encoding="utf-8"))["test"]
        told = scores[f"{name}.txt"]["edited"]["perplexity"]
        assert told == pytest.approx(perplexity_of(out, test), rel=1e-4)
    assert "2 % above the base's" in result["why"]
    assert result["options"] == {"control_threshold": 0.98}
    assert result["chosen_on"] == "the validation splits of code.txt, prose.txt"
    low, high = result["intervals"]["code.txt"]["change"]
    change = target["edited"]["perplexity"] / target["base"]["perplexity"] - 1
    assert low < change < high
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"validation", "test"}
    card = (out / "README.md").read_text()
    assert "text-generation" in card
    assert "AutoModelForCausalLM" in card
    assert {"frontier.png", "report.html", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    again = negate(str(texts["code"]), out, resume=True, **asked)
    assert again["tasks"] == json.loads((out / "summary.json").read_text())["tasks"]


def test_the_race_chooses_like_the_grid(root: Path, options: dict[str, Any]) -> None:
    target, control = (find_task(str(root / f"{name}.txt")) for name in ("code", "prose"))
    session = EditSession(root / "lm", [target, control], device="cpu", precision="float32")
    vector = session.vector(root / "code.safetensors")
    chosen, measured = {}, {}
    for strategy in ("grid", "race"):
        searched = {**options, "search": SearchOptions(ALPHAS, strategy)}
        workflow = Negation.from_call(target, control=control, finetuned=vector, **searched)
        before = session.samples_measured
        trial = session.trial({"code": vector}, workflow.goal)
        (chosen[strategy],), _ = workflow.choose(trial)
        measured[strategy] = session.samples_measured - before
    assert abs(chosen["race"] - chosen["grid"]) < 0.051
    assert measured["race"] < 0.7 * measured["grid"]


def test_an_analogy_beats_its_parts(root: Path, options: dict[str, Any], tmp_path: Path) -> None:
    code = (root / "code.txt").read_text(encoding="utf-8")
    (tmp_path / "loud code.txt").write_text(code.upper(), encoding="utf-8")
    names = [root / "prose.txt", root / "shouts.txt", root / "code.txt", tmp_path / "loud code.txt"]
    result = analogy(*map(str, names), tmp_path / "out", supervised=True, **options)
    scores = {k: v for k, v in result["tasks"]["loud code.txt"].items() if isinstance(v, dict)}
    told = {name: score["perplexity"] for name, score in scores.items()}
    assert told["edited"] < 0.9 * min(told["only B"], told["only C"], told["C + B"])
    assert told["finetuned"] < told["edited"] < told["base"]


def test_an_addition_of_texts(root: Path, options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = [str(root / f"{name}.txt") for name in ("code", "tables", "prose")]
    result = add(names, out, pairs=True, each=True, objective="worst", **options)
    tasks = result["tasks"]
    shares = {n: t["finetuned"]["perplexity"] / t["edited"]["perplexity"] for n, t in tasks.items()}
    assert result["normalized"] == pytest.approx(shares)
    mean = math.prod(t["edited"]["perplexity"] for t in tasks.values()) ** (1 / 3)
    assert result["mean"]["perplexity"] == pytest.approx(mean)
    assert len(result["subsets"]) == 3
    assert (out / "perplexity.png").exists()
    table = tasks["tables.txt"]
    assert table["finetuned"]["perplexity"] < table["base"]["perplexity"]
    add(names, out, overwrite=True, **options)  # its own pictures are no strangers


@pytest.mark.parametrize("strategy", ["joint", "sequential", "parallel"])
def test_a_patch_of_texts(
    root: Path, options: dict[str, Any], tmp_path: Path, strategy: str
) -> None:
    names = [str(root / f"{name}.txt") for name in ("shouts", "tables")]
    supported = str(root / "prose.txt")
    result = patch(
        names,
        tmp_path / "out",
        supported=supported,
        max_supported_drop=0.1,
        strategy=strategy,  # type: ignore[arg-type]
        **options,
    )
    tables = result["tasks"]["tables.txt"]
    assert tables["patched"]["perplexity"] < tables["base"]["perplexity"]
    prose = result["tasks"]["prose.txt"]
    assert prose["patched"]["perplexity"] < 1.1 * prose["base"]["perplexity"]
    assert "10 % above" in result["why"]


def test_a_soup_of_language_models(root: Path, tmp_path: Path) -> None:
    vector = TaskVector.load(root / "code.safetensors")
    better = vector.apply(root / "lm", 1.0).save(tmp_path / "better")
    worse = vector.apply(root / "lm", -2.0).save(tmp_path / "worse")
    models = [root / "lm", worse, better]
    result = soup(models, tmp_path / "out", tasks=str(root / "code.txt"), device="cpu")
    steps = {step["model"]: step["accepted"] for step in result["steps"]}
    assert next(iter(steps)) == "better"
    assert not steps["worse"]
    assert "perplexity strictly fell" in result["why"]


def test_refusals(root: Path, options: dict[str, Any], tmp_path: Path) -> None:
    code, prose, out = str(root / "code.txt"), str(root / "prose.txt"), tmp_path / "out"
    with pytest.raises(OptionError, match="is a text, and shapes"):
        negate(code, out, **options)
    with pytest.raises(OptionError, match="is a text, and shapes has images"):
        negate(code, out, control="shapes", **options)
    with pytest.raises(CheckpointError, match="not a language model"):
        negate(code, out, control=prose, device="cpu")
    with pytest.raises(CheckpointError, match="image and text encoders"):
        negate("mnist", out, control="shapes", **options)
    (tmp_path / "short.txt").write_text("a few words only")
    with pytest.raises(TaskError, match=r"short\.txt has \d tokens for"):
        negate(code, out, control=str(tmp_path / "short.txt"), **options)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="can't be read as a text of UTF-8"):
        negate(code, out, control=str(tmp_path / "bytes.txt"), **options)
    with pytest.raises(TaskError, match="can't be read"):
        negate(code, out, control=str(tmp_path / "missing.txt"), **options)
    with pytest.raises(OptionError, match="batch normalisation"):
        negate(code, out, control=prose, batchnorm="base", **options)
    searched = {**options, "search": SearchOptions(strategy="entropy")}
    with pytest.raises(OptionError, match="takes tasks of images"):
        add([code, prose], out, **searched)
    linear = {**options, "training": config_for(root / "lm", linearized=True)}
    with pytest.raises(OptionError, match="isn't linearised"):
        negate(code, out, control=prose, **linear)
    with pytest.raises(TaskError, match="neutral: changes how images are read"):
        find_task(f"neutral:{code}")
    with pytest.raises(TaskError, match="evaluators score images"):
        evaluate(root / "lm", code)
    with pytest.raises(OptionError, match="vectors are ranked for images"):
        rank([root / "code.safetensors"], code, model=root / "lm", device="cpu")
    assert not out.exists()


def test_a_model_that_reads_ahead_is_refused(root: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=97,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(root / "lm").save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="reads the tokens that it predicts"):
        EditSession(tmp_path / "bert", [find_task(str(root / "code.txt"))], device="cpu")


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["--target", str(root / "code.txt"), "--control", str(root / "prose.txt")]
    model = ["--model", str(root / "lm"), "--device", "cpu"]
    alphas = ["--alphas", "0.25,0.5", "--finetuned", str(root / "code.safetensors")]
    assert run(["negate", *texts, *model, *alphas, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tasks"] == {"code.txt": "target", "prose.txt": "control"}
    assert 500 < plan["evaluated_samples"] < 5000
    assert run(["negate", *texts, *model, *alphas, "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "validation perplexity" in printed
    assert "test perplexity" in printed
    assert "%" not in printed.split("test perplexity")[1]
