"""Train a small GPT-2 on text that ships with Python, and edit it: negate, add, analogy, lo-fi.

    pip install '.[hf,plot]' && python benchmarks/language.py

The model has a byte-level BPE tokenizer of 1,024 tokens, made on the spot, and learns three kinds
of text: prose (the reference behind Python's ``help()``), code (the standard library) and tables
(the code pages of ``encodings``). Edits learn, are chosen and are tested on parts that it hasn't
seen, with three seeds. It takes minutes of one core. Results go to results/language.json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from weightops import SearchOptions, add, analogy, config_for, negate
from weightops.training.lofi_baselines import compare_with_baselines

RESULTS = Path(__file__).parent / "results" / "language.json"
LIBRARY = Path(json.__file__).parent.parent
STRETCH, LEARNED, EDITED = 6_000, 48, 6
"""Characters of a stretch, and stretches of each kind for the model to learn and for the edits."""
LENGTH, BATCH = 128, 16
CLAIMS: dict[str, Callable[[dict[str, float]], bool]] = {
    "a negated vector raises the target's perplexity by 5 %": lambda r: r["negated target"] > 1.05,
    "... and the control's by 2 % at most": lambda r: r["negated control"] < 1.02,
    "... by more than a random vector does": lambda r: r["negated target"] > r["random target"],
    "gradient ascent ruins the control": lambda r: r["ascent control"] > 2,
    "an addition keeps 90 % of both experts": lambda r: r["added"] > 0.9,
    "an analogy beats the style, the text and their sum": lambda r: r["analogy"] < r["rival"],
    "lo-fi is within 2 % of communicating": lambda r: r["lo-fi"] < 1.02 * r["communicating"],
}
"""Each claim with its criterion."""


def write_texts(folder: Path) -> dict[str, Path]:
    """Write a text of each kind for the edits, and return its path; ``learned.txt`` is beside."""
    modules = sorted(LIBRARY.glob("*.py"), key=lambda path: path.stat().st_size)[-90:]
    pages = sorted((LIBRARY / "encodings").glob("cp*.py"))
    kinds = {
        "prose": "\n".join(topics.topics[name] for name in sorted(topics.topics)),
        "code": "\n".join(path.read_text(encoding="utf-8") for path in modules[::3]),
        "tables": "\n".join(path.read_text(encoding="utf-8") for path in pages),
    }
    learned, paths = [], {name: folder / f"{name}.txt" for name in kinds}
    for name, text in kinds.items():
        starts = range(0, min(len(text), (LEARNED + EDITED) * STRETCH), STRETCH)
        stretches = [text[start : start + STRETCH] for start in starts]
        learned += [part for i, part in enumerate(stretches) if i % 9 != 4]
        paths[name].write_text("".join(stretches[4::9]), encoding="utf-8")
    for name in ("prose", "code"):
        paths[f"loud {name}"] = folder / f"loud {name}.txt"
        loud = paths[name].read_text(encoding="utf-8").upper()
        paths[f"loud {name}"].write_text(loud, encoding="utf-8")
    (folder / "learned.txt").write_text("\n".join(learned), encoding="utf-8")
    return paths


def pretrain(folder: Path, text: Path, steps: int) -> float:
    """Train a tokenizer and a GPT-2 of three layers from scratch; return the last losses' mean."""
    bytes_to_tokens = ByteLevelBPETokenizer()
    bytes_to_tokens.train([str(text)], vocab_size=1024, show_progress=False)
    ids = bytes_to_tokens.encode(text.read_text(encoding="utf-8")).ids
    blocks = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 96, "n_positions": LENGTH, "vocab_size": 1024}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, **no_dropout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        batch = blocks[torch.randint(len(blocks), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval().save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_to_tokens._tokenizer)
    tokenizer.save_pretrained(folder)
    return statistics.mean(losses[-50:])


def perplexities(summary: dict[str, Any], task: str) -> dict[str, float]:
    """Return model -> perplexity on a text."""
    scores = summary["tasks"][task]
    return {name: row["perplexity"] for name, row in scores.items() if isinstance(row, dict)}


def measure(model: Path, texts: dict[str, Path], folder: Path, training: Any) -> Iterator[Any]:
    """Yield names with numbers, of all experiments with one seed."""
    named = {name: str(path) for name, path in texts.items()}
    tenths = SearchOptions(tuple(i / 10 for i in range(11)))
    how: dict[str, Any] = {"model": model, "training": training, "search": tenths}
    negated = negate(named["code"], folder / "n", control=named["prose"], baselines=True, **how)
    target, control = (perplexities(negated, f"{name}.txt") for name in ("code", "prose"))
    yield "negation's alpha", negated["alpha"]
    for row, label in (("edited", "negated"), ("random", "random"), ("ascent", "ascent")):
        yield f"{label} target", target[row] / target["base"]
        yield f"{label} control", control[row] / control["base"]
    added = add([named["code"], named["tables"]], folder / "a", **how)
    yield "added", added["mean"]["normalized"]
    yield "addition's alpha", added["alpha"]
    asked = [named[name] for name in ("prose", "loud prose", "code", "loud code")]
    made = perplexities(analogy(*asked, folder / "c", supervised=True, **how), "loud code.txt")
    yield "analogy", made["edited"]
    yield "rival", min(made[name] for name in ("only B", "only C", "C + B"))
    for row, label in (("base", "before"), ("one alpha", "one alpha"), ("finetuned", "supervised")):
        yield f"analogy, {label}", made[row]
    how = {"model": model, "training": training, "nodes": 4, "shifted": named["prose"]}
    compared = compare_with_baselines(named["code"], folder / "lofi", **how)
    assert compared is not None
    rows = {"base": "before", "baseline": "communicating", "node0 alone": "one node"}
    rows |= {"average": "lo-fi", "EMA of node0": "EMA", "ensemble": "ensemble"}
    for row, label in rows.items():
        yield label, compared["models"][row]["in_distribution"]
        yield f"{label}, shifted", compared["models"][row]["under_shift"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of the model's training")
    parser.add_argument("--edit-steps", type=int, default=40, help="steps of each fine-tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        texts = write_texts(root)
        loss = pretrain(root / "model", root / "learned.txt", given.steps)
        print(f"trained: perplexity {math.exp(loss):.2f} after {time.monotonic() - began:.0f} s")
        recipe = {"steps": given.edit_steps, "batch_size": BATCH, "lr": 5e-4}
        seeds = []
        for seed in range(given.seeds):
            training = config_for(root / "model", seed=seed, **recipe)
            folder = root / f"seed {seed}"
            folder.mkdir()
            seeds.append(dict(measure(root / "model", texts, folder, training)))
            print(f"seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    spread = {
        name: {
            "mean": statistics.mean(row[name] for row in seeds),
            "min": min(row[name] for row in seeds),
            "max": max(row[name] for row in seeds),
        }
        for name in seeds[0]
    }
    held = {claim: sum(map(holds, seeds)) for claim, holds in CLAIMS.items()}
    for name, row in spread.items():
        print(f"{name:28} {row['mean']:8.3f} ({row['min']:.3f} to {row['max']:.3f})")
    for claim, count in held.items():
        print(f"{claim}: in {count} of {len(seeds)} seeds")
    result = {
        "options": {name: getattr(given, name) for name in ("steps", "edit_steps", "seeds")},
        "recipe": recipe,
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began),
        "pretrained perplexity": math.exp(loss),
        "claims": {claim: {"held": count, "of": len(seeds)} for claim, count in held.items()},
        "spread": spread,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
