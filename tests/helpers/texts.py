"""Texts of two kinds, and a small language model that reads letters and has learned both a bit."""

from __future__ import annotations

import argparse
import inspect
import json
import random
from pathlib import Path

import torch
from helpers.transformers_folders import save_letters

LETTERS = [chr(i) for i in range(32, 127)] + ["\n", "?!"]


def write_texts(folder: Path) -> dict[str, Path]:
    """Write texts of code, of prose and of numbers from Python's own modules."""
    draw = random.Random(0)
    prose = " ".join(line for m in (argparse, json) for line in (m.__doc__ or "").split())
    words = prose.split()
    texts = {
        "code": inspect.getsource(random) + inspect.getsource(json.decoder),
        "prose": "\n".join(" ".join(draw.choices(words, k=12)) for _ in range(500)),
        "tables": "\n".join(f"{i:5d} | {i * i % 997:6d} | {i % 7}" for i in range(1400)),
        "shouts": "\n".join(" ".join(draw.choices(words, k=12)).upper() for _ in range(500)),
    }
    paths = {name: folder / f"{name}.txt" for name in texts}
    for name, path in paths.items():
        path.write_text(texts[name].encode("ascii", "ignore").decode(), encoding="utf-8")
    return paths


def letter_model(folder: Path, texts: list[Path], steps: int = 150) -> Path:
    """Write a GPT-2 of one token a letter, trained on texts for some steps."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 48, "n_positions": 64}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=len(LETTERS), **sizes, **dropout, **ends)
    model = GPT2LMHeadModel(config)
    ids = {letter: i for i, letter in enumerate(LETTERS)}
    tokens = torch.tensor([ids[c] for path in texts for c in path.read_text(encoding="utf-8")])
    blocks = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = blocks[torch.randint(len(blocks), (16,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    save_letters(folder, ids, "?!")
    return folder
