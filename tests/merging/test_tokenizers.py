"""Merges by token: rows follow tokens, and the output is a model with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from weightops.errors import WeightopsError
from weightops.merging.recipe import Recipe
from weightops.merging.vocabulary import Vocabulary

pytest.importorskip("transformers")
TEXT = "the cat sat on the mat"


def tokenizer(kind: str, words: Sequence[str], added: Sequence[str]) -> Any:
    """Return a tokenizer of transformers, trained on a few words, with added tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    made: Any
    if kind == "bpe":
        made = Tokenizer(models.BPE(unk_token=None))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(words, trainer)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        made.train_from_iterator([*words, "abcdefghijklmnopqrstuvwxyz"], trainer)
    else:
        listed = dict.fromkeys([*special, *(w for text in words for w in text.split())])
        ids = {word: i for i, word in enumerate(listed)}
        model = models.WordPiece if kind == "wordpiece" else models.WordLevel
        made = Tokenizer(model(ids, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.decoder = decoders.WordPiece() if kind == "wordpiece" else None
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.add_tokens(list(added), special_tokens=True)
    return fast


def model_folder(folder: Path, seed: int, fast: Any, *, spare: int = 0, tied: bool = False) -> Path:
    """Save a tiny Llama with a tokenizer, and rows to spare."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast) + spare,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        eos_token_id=fast.eos_token_id,
        bos_token_id=fast.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def merged(folder: Path, content: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return Recipe.read(file).merge().save(folder / "out", overwrite=True)


def loaded(folder: Path) -> tuple[Any, Any]:
    """Load a model and its tokenizer; no weight may be missing or left over."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    fast = AutoTokenizer.from_pretrained(folder)
    assert max(fast.get_vocab().values()) < model.config.vocab_size
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    return model.eval(), fast


def mean_by_token(folders: Sequence[Path], out: Any, *, base: int | None = None) -> Any:
    """Return the mean of models, whose rows are taken by token, as a model of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in folders]
    states = [model.state_dict() for model in models]
    mean = AutoModelForCausalLM.from_config(models[0].config)
    mean.resize_token_embeddings(max(out.values()) + 1)
    state = mean.state_dict()
    for name in state:
        if "embed_tokens" not in name and "lm_head" not in name:
            state[name] = torch.stack([s[name] for s in states]).mean(0)
            continue
        for token, number in out.items():
            rows = [
                s[name][v[token]] if token in v else None
                for s, v in zip(states, vocabularies, strict=True)
            ]
            known = [row for row in rows if row is not None]
            if base is not None and rows[base] is not None:
                stand_in = rows[base]
            else:
                stand_in = torch.stack(known).mean(0)
            filled = [stand_in if row is None else row for row in rows]
            state[name][number] = torch.stack(filled).mean(0)
    mean.load_state_dict(state)
    return mean.eval()


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "wordlevel"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_union_is_the_mean_by_token(kind: str, tied: bool, tmp_path: Path) -> None:
    words = [[TEXT, "a dog"], [TEXT, "one fish"], [TEXT, "a dog"]]
    added = [["<pad>", "<im>"], ["<im>", "<pad>", "<tool>"], []]
    folders = [
        model_folder(tmp_path / f"m{i}", i, tokenizer(kind, w, a), spare=i, tied=tied)
        for i, (w, a) in enumerate(zip(words, added, strict=True))
    ]
    content = {"method": "linear", "models": [*map(str, folders)], "tokenizer": "union"}
    model, fast = loaded(merged(tmp_path, content))
    ids = fast.get_vocab()
    assert {"<pad>", "<im>", "<tool>"} <= set(ids)
    start = Vocabulary.read(folders[0])
    assert start is not None
    assert all(ids[token] == i for token, i in start.ids.items())
    expected = mean_by_token(folders, ids)
    sample = torch.tensor([[*fast(TEXT)["input_ids"], ids["<im>"], ids["<tool>"]]])
    with torch.no_grad():
        ours, theirs = model(sample).logits, expected(sample).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert fast.decode(fast(TEXT)["input_ids"]).strip() == TEXT
    assert fast.decode(fast("<tool>", add_special_tokens=False)["input_ids"]) == "<tool>"


def test_rows_of_the_base_stand_in(tmp_path: Path) -> None:
    one = model_folder(tmp_path / "one", 1, tokenizer("wordlevel", [TEXT], ["<a>", "<b>"]))
    two = model_folder(tmp_path / "two", 2, tokenizer("wordlevel", [TEXT], ["<b>"]))
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(one),
        "models": [{"model": str(two), "parameters": {"weight": 1.0}}],
        "tokenizer_source": "base",
        "dtype": "float32",
    }
    model, fast = loaded(merged(tmp_path, content))
    first, second = loaded(one)[0].state_dict(), loaded(two)[0].state_dict()
    ids = Vocabulary.read(two)
    assert ids is not None
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = model.state_dict()[name]
        assert torch.allclose(rows[fast.convert_tokens_to_ids("<b>")], second[name][ids.ids["<b>"]])
        a = fast.convert_tokens_to_ids("<a>")
        assert torch.allclose(rows[a], first[name][a])  # the other model lacks it


def test_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    one = model_folder(tmp_path / "one", 1, tokenizer("bpe", [TEXT], []), spare=5)
    other = tokenizer("bpe", [TEXT, "and a dog"], ["<x>"])
    two = model_folder(tmp_path / "two", 2, other)
    (one / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_k": 3}))
    content = {
        "method": "linear",
        "models": [str(one), str(two)],
        "tokenizer": {"source": str(two), "pad_to_multiple_of": 8},
    }
    out = merged(tmp_path, content)
    model, fast = loaded(out)
    assert fast.get_vocab() == other.get_vocab()
    assert model.config.vocab_size % 8 == 0
    assert model.config.eos_token_id == other.eos_token_id
    known = len(other)
    table = model.get_input_embeddings().weight
    assert torch.allclose(table[known:], table[:known].mean(0), atol=1e-6)
    assert json.loads((out / "generation_config.json").read_text())["top_k"] == 3


def test_tokens_with_sources_of_their_own(tmp_path: Path) -> None:
    one = model_folder(tmp_path / "one", 1, tokenizer("wordlevel", [TEXT], []))
    two = model_folder(tmp_path / "two", 2, tokenizer("wordlevel", [TEXT], ["<x>"]))
    tokens = {
        "<x>": {"source": {"kind": "zero"}},
        "<new>": {"source": {"kind": "model_token", "model": str(two), "token": "cat"}},
        "mat": {"source": str(two), "force": True},
        "sat": {"source": {"kind": "model_token", "model": str(one), "token_id": 3}, "force": True},
    }
    content = {
        "method": "linear",
        "models": [str(one), {"model": str(two), "weight": 3.0}],
        "tokenizer": {"tokens": tokens},
    }
    model, fast = loaded(merged(tmp_path, content))
    rows = model.state_dict()["lm_head.weight"]
    first, second = (loaded(f)[0].state_dict()["lm_head.weight"] for f in (one, two))
    ids, of_two = fast.get_vocab(), loaded(two)[1].get_vocab()
    expected = {
        "<x>": 0.75 * second[of_two["<x>"]],
        "<new>": second[of_two["cat"]],
        "mat": second[of_two["mat"]],
        "sat": first[3],
        "on": 0.25 * first[ids["on"]] + 0.75 * second[of_two["on"]],
    }
    for token, row in expected.items():
        assert torch.allclose(rows[ids[token]], row, atol=1e-6), token


def test_numbers_and_flags_of_mergekits_are_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["a b c d"]
    one = model_folder(tmp_path / "one", 0, tokenizer("words", words, []))
    two = model_folder(tmp_path / "two", 1, tokenizer("words", words, ["<x>"]))
    content: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": str(ref)} for ref in (one, two)],
        "parameters": {"weight": 1},
    }
    states = []
    for number, multiple, yes, no in ((4, 16, True, False), ("4", "16.0", "on", "false")):
        source = {"kind": "model_token", "model": str(one), "token_id": number, "token": None}
        tokens = {"a": {"source": source, "force": yes}, "b": {"source": source, "force": no}}
        content["tokenizer"] = {"tokens": tokens, "pad_to_multiple_of": multiple}
        states.append(loaded(merged(tmp_path, content))[0].state_dict())
    rows = states[0]["model.embed_tokens.weight"]
    assert len(rows) == 16
    assert not torch.equal(rows[3], rows[4])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any("configured differently" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("tokenizer_", "match"),
    [
        ({"tokens": {"<z>": {"source": "ONE"}}}, r"line 9: .*one has no token '<z>'"),
        (
            {"tokens": {"a": {"source": {"kind": "model_token", "model": "ONE", "token": "zz"}}}},
            "line 9: .*one has no token 'zz', from which 'a' takes its row",
        ),
        ({"tokens": {"<z>": {"source": "elsewhere"}}}, "line 9: .*elsewhere, which isn't one of"),
        ({"tokens": {"<z>": {"source": {"kind": "none"}}}}, "line 9: the kind of the token"),
        ({"tokens": {"<z>": {"force": True}}}, "line 9: the token '<z>' has no source"),
        (
            {"source": "nowhere"},
            "line 6: 'nowhere' is not a tokenizer's source: there is no file or folder nowhere",
        ),
        ({"pad_to_multiple_of": 0}, "line 6: pad_to_multiple_of is a whole number"),
        ({"sorce": "union"}, "line 7: there is no key of tokenizer 'sorce'"),
    ],
)
def test_refused_vocabularies(tokenizer_: dict[str, Any], match: str, tmp_path: Path) -> None:
    one = model_folder(tmp_path / "one", 1, tokenizer("wordlevel", [TEXT], []))
    two = model_folder(tmp_path / "two", 2, tokenizer("wordlevel", [TEXT], ["<x>"]))
    text = yaml.safe_dump(
        {
            "method": "linear",
            "models": [str(one), str(two), str(one)],
            "tokenizer": {"source": "union", **tokenizer_}
            if "sorce" not in tokenizer_
            else tokenizer_,
        },
        sort_keys=False,
    ).replace("ONE", str(one))
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(WeightopsError, match=rf"recipe.yaml: {match}"):
        Recipe.read(tmp_path / "recipe.yaml").merge()


def test_differing_vocabularies_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = model_folder(tmp_path / "one", 1, tokenizer("wordlevel", [TEXT], ["<a>", "<b>"]))
    two = model_folder(tmp_path / "two", 2, tokenizer("wordlevel", [TEXT], ["<b>", "<a>"]))
    Recipe((str(one), str(two))).merge()
    assert "differ in 2 tokens, such as '<a>', '<b>'" in caplog.text
    assert "tokenizer: {source: union} merges them by token" in caplog.text
    caplog.clear()
    Recipe((str(one), str(one))).merge()
    assert not caplog.text


def test_tokens_beyond_the_rows_have_none(tmp_path: Path) -> None:
    fast = tokenizer("bpe", [TEXT], ["<a>", "<b>"])
    one = model_folder(tmp_path / "one", 1, fast, spare=-1)  # no row for <b>
    two = model_folder(tmp_path / "two", 2, tokenizer("bpe", [TEXT], ["<a>"]))
    content = {"method": "linear", "models": [str(one), str(two)], "tokenizer": "union"}
    model, out = loaded(merged(tmp_path, content))
    assert "<b>" not in out.get_vocab()
    assert model.config.vocab_size == len(fast) - 1


@pytest.mark.parametrize("odd", [None, "7", -1, 0.5, float("nan"), 2**63, {"a": 1}, True])
@pytest.mark.parametrize("file", ["tokenizer.json", "added_tokens.json"])
def test_ids_that_are_no_numbers(tmp_path: Path, file: str, odd: Any) -> None:
    one, two = (
        model_folder(tmp_path / name, 1, tokenizer("wordlevel", [f"{TEXT} {name}{name}"], []))
        for name in ("one", "two")
    )
    content = json.loads((one / "tokenizer.json").read_text())
    content["model"]["vocab"]["odd"] = odd
    (one / file).write_text(json.dumps(content if file == "tokenizer.json" else {"odd": odd}))
    made = {"models": [str(one), str(two)], "tokenizer": "union"}
    with pytest.raises(WeightopsError, match=rf"{file} is not .*the id of 'odd' is"):
        merged(tmp_path, made)


def test_a_broken_tokenizer_stops_only_merges_by_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = model_folder(tmp_path / "one", 1, tokenizer("wordlevel", [TEXT], []))
    two = model_folder(tmp_path / "two", 2, tokenizer("wordlevel", [TEXT], []))
    (two / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    Recipe((str(one), str(two))).merge()
    assert "the tokenizers aren't compared" in caplog.text
    content = {"models": [str(one), str(two)], "tokenizer": "union"}
    with pytest.raises(WeightopsError, match=r"tokenizer.json is not a tokenizer's file"):
        merged(tmp_path, content)
    (two / "tokenizer.json").unlink()
    (two / "tokenizer_config.json").unlink()
    assert len(loaded(merged(tmp_path, content))[1]) == len(loaded(one)[1])
    assert "has no tokenizer: its tokens are taken to be" in caplog.text
