"""Programs that score language models: one of one's own, and lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.texts import letter_model, write_texts

from weightops import TaskVector, config_for, finetune, open_checkpoint
from weightops.cli.main import run
from weightops.errors import MissingExtraError
from weightops.evaluation import harness

JUDGE = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[-1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[-1])
for task in sys.argv[1:-1]:
    tokens = tokenizer(Path(task).read_text()[:9000], return_tensors="pt").input_ids[0]
    blocks = tokens[: len(tokens) // 60 * 60].view(-1, 60)
    with torch.no_grad():
        logits = model(input_ids=blocks).logits[:, :-1].log_softmax(-1)
    values = logits.gather(2, blocks[:, 1:, None]).mean((1, 2))
    for i, value in enumerate(values.tolist()):
        print(json.dumps({"task": Path(task).stem, "item": i, "value": value}))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, a model that has learned two of them, and one that has learned a third as well."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("judged")
    texts = write_texts(root)
    letter_model(root / "lm", [texts["code"], texts["prose"]], steps=60)
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "lm")
    tokenizer.eos_token = "?!"  # which the harness needs
    tokenizer.save_pretrained(root / "lm")
    config = config_for(root / "lm", steps=60, batch_size=16, lr=2e-3)
    finetune(root / "lm", str(texts["tables"]), config, out=root / "tuned", device="cpu")
    (root / "judge.py").write_text(JUDGE)
    return root


def log_likelihoods(root: Path, alpha: float, text: str) -> torch.Tensor:
    """Return those of a text's blocks under an edit, in this process."""
    tau = TaskVector(root / "lm", root / "tuned")
    model: Any = tau.apply(root / "lm", alpha).model()
    ids = open_checkpoint(root / "lm").known_architecture().tokens
    tokens = ids((root / f"{text}.txt").read_text()[:9000])
    blocks = tokens[: len(tokens) // 60 * 60].view(-1, 60)
    with torch.no_grad():
        logits = model(input_ids=blocks).logits[:, :-1].double().log_softmax(-1)
    return logits.gather(2, blocks[:, 1:, None]).mean((1, 2))


def test_the_chosen_alpha_is_a_grids_within_noise(root: Path, tmp_path: Path) -> None:
    texts = [str(root / f"{name}.txt") for name in ("tables", "prose")]
    score = " ".join([sys.executable, str(root / "judge.py"), *texts])
    line = "patch --task tables --supported prose --rule mean --alphas 0.3,0.6,1 -q"
    models = ["--model", str(root / "lm"), "--finetuned", str(root / "tuned")]
    assert run([*line.split(), "--score", score, *models, "-o", str(tmp_path / "out")]) == 0
    chosen = json.loads((tmp_path / "out" / "summary.json").read_text())["alpha"]
    # The whole grid, on all items of both halves.
    means = {}
    for alpha in (0.0, 0.3, 0.6, 1.0):
        values = [log_likelihoods(root, alpha, text) for text in ("tables", "prose")]
        count = min(map(len, values))
        means[alpha] = (values[0][:count] + values[1][:count]) / 2
    best = max(means, key=lambda a: means[a].mean().item())
    lost = means[best] - means[chosen]
    assert 0 < chosen < 1
    assert lost.mean() <= 2 * lost.std() / math.sqrt(len(lost)) + 1e-9


def sums(folder: Path) -> Path:
    """Write a task of lm-evaluation-harness on local data."""
    rows = [
        {"q": f"{i:5d} |", "choices": [f" {i * i % 997:5d}", " return"], "answer": 0}
        for i in range(40)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder / 'data.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    return folder / "sums.yaml"


def test_a_local_task_of_the_harness(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    task, other = sums(tmp_path), tmp_path / "others.yaml"
    other.write_text(task.read_text().replace("task: sums", "task: others"))
    line = "patch --task sums --supported others --alphas 1 -q"
    models = ["--model", str(root / "lm"), "--finetuned", str(root / "tuned")]
    given = ["--score", f"lm_eval:{task},{other}", *models]
    assert run([*line.split(), *given, "-o", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    scores = summary["tasks"]["sums"]
    assert scores["base"]["score"] < scores["patched"]["score"] <= 1
    assert scores["patched"]["n"] + 0 < 40


def test_the_harness_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"lm_eval is needed to score sums") as raised:
        list(harness.lines("sums", "model"))
    assert raised.value.hint == "pip install 'weightops[lm_eval]'"
