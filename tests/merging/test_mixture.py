"""Mixtures of experts made of dense models, from recipes as people write them for mergekit-moe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from weightops import open_checkpoint
from weightops.errors import WeightopsError
from weightops.merging.recipe import Recipe

pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
YAML = """\
base_model: DIR/base
gate_mode: GATE
experts:
- source_model: DIR/a
  positive_prompts: ["w1 w2 w3", "w4"]
  negative_prompts: ["w9 w8"]
- source_model: DIR/b
  positive_prompts: ["w7 w5", "w2"]
- source_model: DIR/base
  positive_prompts: ["w6"]
"""
SHARED = """\
shared_experts:
- source_model: DIR/a
  positive_prompts: ["w3 w3"]
  residual_scale: 0.5
"""


def make(folder: Path, kind: str = "llama", **changes: Any) -> None:
    """Save three models of a kind, base, a and b, with a tokenizer of the words w0 to w20."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(21))]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    for seed, name in enumerate(("base", "a", "b")):
        config = transformers.AutoConfig.for_model(kind, **SIZES, **changes)
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny Llamas; other is wider, and biased has biases."""
    import transformers

    folder = tmp_path_factory.mktemp("llamas")
    make(folder)
    for name, kind, changes in (
        ("other", "llama", {"intermediate_size": 32}),
        ("qwen", "qwen2", {}),
        ("biased", "llama", {"attention_bias": True}),
    ):
        config = transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def read(folder: Path, text: str, gate: str = "cheap_embed") -> Recipe:
    text = text.replace("DIR", str(folder)).replace("GATE", gate)
    (folder / "moe.yml").write_text(text)
    return Recipe.read(folder / "moe.yml")


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "changes", "shared", "name"),
    [
        ("llama", {"rms_norm_eps": 0.01}, False, "mixtral"),
        ("llama", {"tie_word_embeddings": True, "rope_theta": 500.0}, False, "mixtral"),
        ("mistral", {"sliding_window": 64}, False, "mixtral"),
        ("llama", {}, True, "qwen2_moe"),
        ("qwen2", {"tie_word_embeddings": True}, True, "qwen2_moe"),
        ("qwen3", {"head_dim": 8}, False, "qwen3_moe"),
    ],
)
def test_dense_models_become_experts(
    tmp_path: Path, kind: str, changes: dict[str, Any], shared: bool, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    make(tmp_path, kind, **changes)
    read(tmp_path, YAML + SHARED * shared).merge().save(tmp_path / "out")
    model = loaded(tmp_path / "out")
    dense = {
        n: AutoModelForCausalLM.from_pretrained(tmp_path / n).eval() for n in ("base", "a", "b")
    }
    assert model.config.model_type == name
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        found = model(ids).logits
        expected = by_hand(model, dense, ids, shared)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def by_hand(model: Any, dense: dict[str, Any], ids: torch.Tensor, shared: bool) -> torch.Tensor:
    """Compute what the mixture is to give: the base, with the two best experts in each layer."""
    base, experts = dense["base"], [dense["a"], dense["b"], dense["base"]]
    for i, layer in enumerate(base.model.layers):
        moe = model.model.layers[i].mlp

        def mixed(x: torch.Tensor, i: int = i, moe: Any = moe) -> torch.Tensor:
            probabilities = F.softmax(x @ moe.gate.weight.T, dim=-1)
            best, chosen = probabilities.topk(2, dim=-1)
            best = best / best.sum(-1, keepdim=True)
            every = torch.stack([e.model.layers[i].mlp.plain(x) for e in experts], dim=-2)
            picked = every.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
            out = (picked * best[..., None]).sum(-2)
            if shared:
                gate = torch.sigmoid(x @ moe.shared_expert_gate.weight.T)
                out = out + gate * 0.5 * dense["a"].model.layers[i].mlp.plain(x)
            return out

        for one in {id(e): e for e in (*experts, dense["a"])}.values():
            one.model.layers[i].mlp.plain = one.model.layers[i].mlp.forward
        layer.mlp.forward = mixed
    logits: torch.Tensor = base(ids).logits
    return logits


def router(recipe: Recipe) -> torch.Tensor:
    merged = recipe.merge()
    names = [n for n in merged if n.endswith("block_sparse_moe.gate.weight")]
    return torch.stack([merged[n] for n in names])


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def test_routers_of_embeddings(llamas: Path) -> None:
    table = open_checkpoint(llamas / "base")["model.embed_tokens.weight"]

    def rows(*words: int) -> torch.Tensor:  # w0 has the id 3; each prompt begins with <s>
        return unit(sum(table[1 if w < 0 else w + 3] for w in words))

    expected = torch.stack(
        [unit(rows(-1, 1, 2, 3, -1, 4) - rows(-1, 9, 8)), rows(-1, 7, 5, -1, 2), rows(-1, 6)]
    )
    found = router(read(llamas, YAML))
    assert all(torch.allclose(layer, expected, atol=1e-6) for layer in found)


def test_routers_of_hidden_states(llamas: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llamas / "base", dtype=torch.bfloat16)

    @torch.no_grad()
    def state(*prompts: list[int]) -> torch.Tensor:
        runs = [
            model(torch.tensor([[1, *(w + 3 for w in words)]]), output_hidden_states=True)
            for words in prompts
        ]
        last = [torch.stack([h[0, -1].float() for h in run.hidden_states[:-1]]) for run in runs]
        return torch.stack(last).mean(0)

    expected = torch.stack(
        [unit(state([1, 2, 3], [4]) - state([9, 8])), unit(state([7, 5], [2])), unit(state([6]))],
        dim=1,
    )
    assert torch.allclose(router(read(llamas, YAML, "hidden")), expected, atol=1e-5)
    assert torch.get_default_dtype() == torch.float32


def test_routers_by_chance_are_the_seeds(llamas: Path) -> None:
    recipe = read(llamas, YAML, "random")
    first = router(recipe)
    assert torch.equal(first, router(Recipe.of(recipe.to_dict())))
    assert not torch.equal(first, router(Recipe.of({**recipe.to_dict(), "seed": 1})))
    assert first.std().item() == pytest.approx(1, abs=0.2)
    even = router(read(llamas, YAML, "uniform_random"))
    assert even.abs().max().item() == pytest.approx(0.25, abs=0.02)  # 1 / sqrt(16)


def test_dtype_and_prompts_that_are_alike(llamas: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = YAML + "dtype: bfloat16\nshard: 3\n"
    merged = read(llamas, text, "random").merge()
    assert {spec.dtype for spec in merged.specs.values()} == {torch.bfloat16}
    assert "line 12: shard at the top level has no effect" in caplog.text
    assert "so alike" not in caplog.text
    read(llamas, text.replace('"w7 w5", "w2"', '"w6 w6"')).merge()
    assert "so alike in the layers 0, 1, 2" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("GATE", "hiden", "line 2: there is no gate mode 'hiden'"),
        ("experts:\n", "experts_per_token: 4\nexperts:\n", "line 3: experts_per_token is 4, and"),
        ("DIR/b\n", "DIR/c\n", "line 7: there is no file or folder .*/c"),
        ('  positive_prompts: ["w6"]\n', "", "line 9: .*base has no positive_prompts"),
        ('["w6"]', "w6", "line 10: positive_prompts is 'w6', and must be a list of texts"),
        ("DIR/b\n", "DIR/other\n", "line 7: .* don't match"),
        ("DIR/b\n", "DIR/qwen\n", "line 3: models of the types 'llama', 'qwen2' with no shared"),
        (
            "experts:\n",
            "architecture: deepseek\nexperts:\n",
            "no architecture of mixtures 'deepseek'",
        ),
        ("experts:\n", "architecture: qwen\nexperts:\n", "no shared expert become no mixture"),
        ("source_model: DIR/b", "model: DIR/b", "line 7: an expert names no model"),
        ("base_model: DIR/base\n", "", "needs base_model"),
        ("source_model: DIR/b", "noise_scale: 0.1\n  source_model: DIR/b", "noise_scale"),
        ("DIR/base\ngate", "DIR/biased\ngate", "no place for tensors of .*biased: .*bias"),
    ],
)
def test_what_cannot_be_is_refused(llamas: Path, old: str, new: str, match: str) -> None:
    text = YAML.replace(old, new)
    if "biased" in new:
        text = re.sub(r"DIR/\w+", "DIR/biased", text).replace("GATE", "random")
    with pytest.raises(WeightopsError, match=match):
        read(llamas, text).merge()


def test_keys_and_text_as_people_write_them(llamas: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = read(llamas, YAML + SHARED).merge()
    text = YAML.replace("experts:", "merge_method: moe\nexperts_per_token: '2'\nexperts:", 1)
    written = read(llamas, text + SHARED.replace("0.5", "' 0.5'")).merge()
    assert all(torch.equal(written[name], plain[name]) for name in plain)
    assert "line 3: merge_method at the top level has no effect" in caplog.messages
    read(llamas, YAML.replace('["w6"]', '[""]'), "random").merge()


def test_experts_of_other_vocabularies(llamas: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llamas / "a")
    plain = read(llamas, YAML).merge()
    model.resize_token_embeddings(SIZES["vocab_size"] + 3)
    model.save_pretrained(tmp_path / "longer")
    merged = read(llamas, YAML.replace("DIR/a", str(tmp_path / "longer"))).merge()
    assert all(torch.equal(merged[name], plain[name]) for name in plain)
    loaded(merged.save(tmp_path / "out"))


def test_a_recipe_of_our_own(llamas: Path) -> None:
    recipe = read(llamas, YAML, "random")
    content = recipe.to_dict()
    assert content["base"] == str(llamas / "base")
    assert [e["model"] for e in content["mixture"]["experts"]] == list(recipe.models)
    with pytest.raises(WeightopsError, match="models doesn't go with mixture"):
        Recipe.of({**content, "models": ["a"]})
    with pytest.raises(WeightopsError, match="a mixture needs base"):
        Recipe.of({"mixture": content["mixture"]})
