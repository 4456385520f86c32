"""lo-fi against its baselines, with averages on the way."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import split

import pytest
import torch
from helpers.lofi_jobs import equal, opened, torchrun
from helpers.texts import letter_model, write_texts

from weightops import config_for, open_checkpoint
from weightops.cli.main import run
from weightops.errors import OptionError
from weightops.tasks.table import find_task
from weightops.training.lofi_baselines import compare_with_baselines

FEW = """
from dataclasses import replace
from weightops import TASKS
from weightops.cli import main

digits = TASKS["digits"]

class Few:
    def __init__(self, split):
        self.images = digits.load(split)
        self.labels = self.images.labels[:20]
    def __len__(self):
        return 20
    def __getitem__(self, index):
        return self.images[index]

TASKS.register("few", replace(digits, name="few", load=Few))
main.main()
"""


@pytest.mark.usefixtures("one_thread")
def test_compare_and_averages_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "few.py").write_text(FEW)
    out = tmp_path / "run"
    options = split("--compare --task few --batch-size 8 --steps 4 --average-every 2 --json")
    [agent] = torchrun(1, 2, tmp_path / "few.py", "lofi", *options, "--node-size", "1", "-o", out)
    printed = agent.communicate(timeout=600)
    assert agent.returncode == 0, printed
    result = json.loads(printed[0])
    assert result == json.loads((out / "comparison.json").read_text())
    models = result["models"]
    trained = ["base", "baseline", "node0 alone", "node1 alone"]
    assert list(models) == [*trained, "average", "EMA of node0", "ensemble"]
    *nodes, merged, ema = opened(out, "node0", "node1", "merged", "node0/ema")
    assert equal(*nodes)  # the last step averaged
    assert equal(nodes[0], merged)
    assert models["average"] == models["node0 alone"] == models["node1 alone"]
    assert models["ensemble"]["under_shift"] == models["average"]["under_shift"]
    assert 0 < models["base"]["in_distribution"] < 1
    assert not equal(ema, nodes[0])
    assert all(cost["communication_seconds"] > 0 for cost in result["cost"].values())


@torch.no_grad()
def ensemble_perplexity(folders: list[Path], text: str) -> float:
    """Return the perplexity of the mean of logits, in blocks of 64 letters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folders[0])(text)["input_ids"]
    blocks = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    kinds = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders
    ]
    mean = torch.stack([kind(input_ids=blocks).logits for kind in kinds]).mean(0)
    chosen = mean.log_softmax(-1)[:, :-1].gather(2, blocks[:, 1:, None])
    return float((-chosen.double().mean()).exp())


@pytest.mark.usefixtures("one_thread")
def test_a_language_model_is_compared_on_its_text_and_under_shift(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    texts = write_texts(tmp_path)
    model = letter_model(tmp_path / "lm", [texts["code"], texts["prose"]], steps=60)
    out = tmp_path / "run"
    asked = split("lofi --compare --nodes 2 --steps 12 --batch-size 16 --lr 1e-3 --device cpu")
    named = ["--text", str(texts["code"]), "--shifted", str(texts["prose"])]
    assert run([*asked, *named, "--model", str(model), "-o", str(out)]) == 0
    models = json.loads((out / "comparison.json").read_text())["models"]
    assert list(models) == [
        *("base", "baseline", "node0 alone", "node1 alone"),
        *("average", "EMA of node0", "ensemble"),
    ]
    perplexity = {name: row["in_distribution"] for name, row in models.items()}
    learned = [perplexity[n] for n in ("baseline", "node0 alone", "average", "ensemble")]
    assert max(learned) < 0.97 * perplexity["base"]
    saved = {n: open_checkpoint(out / n).save(tmp_path / n) for n in ("node0", "node1", "merged")}
    for split_of, name in (("in_distribution", "code"), ("under_shift", "prose")):
        text = find_task(str(texts[name])).text("test")  # type: ignore[attr-defined]
        for row, folders in (
            ("average", [saved["merged"]]),
            ("ensemble", [saved["node0"], saved["node1"]]),
        ):
            expected = ensemble_perplexity(folders, text)
            assert models[row][split_of] == pytest.approx(expected, rel=1e-4)
    half = find_task(str(texts["code"])).text("train")  # type: ignore[attr-defined]
    record = json.loads((out / "baseline" / "training.json").read_text())
    assert "the text" in record["source"]
    assert 0 < len(half) < 0.6 * texts["code"].stat().st_size


def test_refusals(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    texts = write_texts(tmp_path)
    model = letter_model(tmp_path / "lm", [texts["code"]], steps=1)
    out, training = tmp_path / "run", config_for(model, steps=1)
    how = {"model": model, "training": training, "nodes": 2, "device": "cpu"}
    with pytest.raises(OptionError, match="mnist has images"):
        compare_with_baselines(str(texts["code"]), out, shifted="mnist", **how)
    with pytest.raises(OptionError, match="scored under corruptions"):
        compare_with_baselines("mnist", out, shifted=str(texts["code"]), **how)
    named = ["--text", str(texts["code"]), "--model", str(model), "-o", str(out), "--nodes", "2"]
    assert run(["lofi", *named, "--shifted", str(texts["prose"])]) == 2
    assert not out.exists()
