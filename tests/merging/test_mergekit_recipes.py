"""What recipes of mergekit's say beyond models and weights: names, adapters, templates, parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from weightops import open_checkpoint
from weightops.errors import WeightopsError
from weightops.merging.chat_templates import CHAT_TEMPLATES
from weightops.merging.merge import merge
from weightops.merging.recipe import Recipe

pytest.importorskip("transformers")


def read(folder: Path, text: str) -> Recipe:
    (folder / "recipe.yml").write_text(text.replace("DIR", str(folder)))
    return Recipe.read(folder / "recipe.yml")


@pytest.fixture
def llamas(tmp_path: Path) -> Path:
    """A folder with tiny Llamas a and b, and lora, an adapter of a."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    wrapped = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "a"),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    wrapped.save_pretrained(tmp_path / "lora")
    return tmp_path


def test_an_adapter_behind_a_plus(llamas: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    whole = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llamas / "a"), llamas / "lora"
    ).merge_and_unload()
    expected = merge([str(llamas / "b"), open_checkpoint(whole)], weights=[1, 3])
    for entry in (
        "DIR/a+DIR/lora",
        "{model: {path: DIR/a}, lora: {path: DIR/lora}}",
        "{path: DIR/a, lora: DIR/lora}",
    ):
        text = (
            "merge_method: linear\nmodels:\n- {model: DIR/b, parameters: {weight: 1}}\n"
            f"- {{model: {entry}, parameters: {{weight: 3}}}}\n"
        )
        recipe = read(llamas, text)
        assert recipe.models[1] == f"{llamas}/a+{llamas}/lora"
        merged = recipe.merge()
        assert all(torch.allclose(merged[n], expected[n], atol=1e-6) for n in merged)
    stacked = read(
        llamas,
        "merge_method: passthrough\nslices:\n"
        "- sources: [{model: DIR/b, layer_range: [0, 2]}]\n"
        "- sources: [{model: DIR/a+DIR/lora, layer_range: [1, 3]}]\n",
    ).merge()
    name = "model.layers.{}.self_attn.q_proj.weight"
    whole_ = open_checkpoint(whole)
    assert torch.allclose(stacked[name.format(3)], whole_[name.format(2)], atol=1e-6)


DOCUMENTS = """
models: [{model: second}, {model: first}]
merge_method: slerp
base_model: first
parameters: {t: 0.25}
---
name: second
models: [{model: DIR/b, parameters: {weight: 0.5}}]
base_model: first
merge_method: task_arithmetic
---
name: first
models: [{model: DIR/a, parameters: {weight: 1}}, {model: DIR/b, parameters: {weight: 3}}]
merge_method: linear
"""


def test_documents_that_name_each_other(llamas: Path) -> None:
    recipe = read(llamas, DOCUMENTS)
    a, b = str(llamas / "a"), str(llamas / "b")
    first = merge([a, b], weights=[1, 3])
    second = merge([b], "task_arithmetic", base=first, weights=[0.5])
    expected = merge([first, second], "slerp", t=0.25, parallel=0.9995)
    for same in (recipe, Recipe.of(recipe.to_dict())):
        merged = same.merge()
        assert all(torch.allclose(merged[n], expected[n], atol=1e-6) for n in merged)
    recipe.merge().save(llamas / "out")
    assert all(torch.allclose(open_checkpoint(llamas / "out")[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (DOCUMENTS.replace("base_model: first\nmerge", "base_model: second\nmerge", 1), "circle"),
        (
            DOCUMENTS.replace("DIR/a, p", "second, p"),
            "line 9: recipes that name each other in a circle: first -> second -> first",
        ),
        (DOCUMENTS.replace("name: first", "name: second"), "two recipes have the name second"),
        (DOCUMENTS.replace("name: first\n", ""), "one at most has no name"),
        (DOCUMENTS.replace("DIR/a", "DIR/c"), r"line 13: there is no file or folder .*/c"),
        (
            "merge_method: passthrough\nmodels:\n- model: DIR/b+DIR/a\n",
            "line 3: .*/a behind \\+ holds weights, not an adapter",
        ),
        (
            "merge_method: passthrough\nslices:\n- sources:\n  - {layer_range: [0, 9], model: DIR/a}",  # noqa: E501
            r"line 4: .*/a has no layer 3, 4, 5 and 3 more: model.layers has 3",
        ),
        (
            "merge_method: passthrough\nmodels: [{model: DIR/a}]\nchat_template: '{{ messages'",
            "line 3: the chat template is not Jinja",
        ),
        (
            "merge_method: passthrough\nmodels: [{model: DIR/a}]\nchat_template: chatlm",
            "line 3: 'chatlm' is no chat template\nhint: known: auto, alpaca, chatml",
        ),
        (
            "merge_method: passthrough\nmodels:\n- model: DIR/a\n- model: DIR/b",
            "line 1: passthrough takes one model",
        ),
        (
            "merge_method: passthrough\nmodules:\n  vision_tower: {models: [{model: DIR/a}]}",
            "line 3: .*/a has no part vision_tower",
        ),
        ("merge_method: ties\nbase_model: x\nmodels:\n- y", "an entry of models is .y., and must"),
        ("merge_method: linear\nmodels: [{model: 3}]", "line 2: model is 3, and must be text"),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: 3",
            "parameters is 3, and must be",
        ),
    ],
)
def test_refused_recipes_name_the_line(text: str, match: str, llamas: Path) -> None:
    with pytest.raises(WeightopsError, match=rf"recipe.yml: (?s:.)*{match}"):
        read(llamas, text).merge()


def test_an_adapter_of_another_base(llamas: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(llamas / "wide")
    text = "merge_method: passthrough\nmodels:\n- model: DIR/wide+DIR/lora\n"
    with pytest.raises(WeightopsError, match=r"recipe.yml: line 3: .*don't match"):
        read(llamas, text).merge()


def test_what_has_no_effect_is_said_once(llamas: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = """
merge_method: model_stock
base_model: DIR/a
select_topk: 0.1
models:
- {model: DIR/a}
- {model: DIR/b, dtype: float16, parameters: {weight: 1, filter_wise: true}}
- model: DIR/a+DIR/lora
parameters: {normalize: true, filter_wise: false, smooth: 1, int8_mask: true}
merge_kind: x
"""
    recipe = read(llamas, text)
    assert sorted(caplog.messages) == [
        "line 10: merge_kind at the top level has no effect",
        "line 4: select_topk at the top level has no effect; under parameters: it would",
        f"line 7: dtype at {llamas}/b has no effect; at the top level it would",
        f"line 7: filter_wise of {llamas}/b has no effect; under parameters: of the whole recipe it would",  # noqa: E501
        f"line 7: weight of {llamas}/b has no effect in model_stock",
        "line 9: normalize has no effect in model_stock",
        "line 9: smooth has no effect in model_stock",
    ]
    models = [str(llamas / "b"), recipe.models[1]]
    assert recipe.models == tuple(models)


def test_a_filter_that_matches_nothing(llamas: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (
        "merge_method: slerp\nbase_model: DIR/a\nmodels: [{model: DIR/a}, {model: DIR/b}]\n"
        "parameters: {t: [{filter: nosuch, value: [0, 1]}, {filter: '[x]', value: 1}, {value: 0.3}]}"  # noqa: E501
    )
    merged = read(llamas, text).merge()
    plain = merge([str(llamas / n) for n in "ab"], "slerp", t=0.3, parallel=0.9995)
    assert all(torch.equal(merged[name], plain[name]) for name in plain)
    assert "no tensor matches the filter nosuch: it has no effect" in caplog.text
    assert merged.recipe is not None
    assert merged.recipe["options"] == {"t": 0.3, "parallel": 0.9995}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_chat_templates_by_name(name: str, llamas: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    fast.chat_template = "{{ 'old' }}"
    fast.save_pretrained(llamas / "a")
    text = f"merge_method: passthrough\nmodels: [{{model: DIR/a}}]\nchat_template: {name}\n"
    out = read(llamas, text).merge().save(llamas / "out")
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    said = AutoTokenizer.from_pretrained(out).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert said == EXPECTED[name]


EXPECTED = {
    "alpaca": "Be brief.\n\n### Instruction:\nOne?\n\n### Response:\nTwo.\n\n"
    "### Instruction:\nThree?\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
    "<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]One?\n[|assistant|]Two.[|endofturn|]\n"
    "[|user|]Three?\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nTwo.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nThree?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nOne? [/INST] Two.</s> [INST] Three? [/INST]",
}


def test_the_chat_template_of_most_models(llamas: Path) -> None:
    for name, template in (("a", "{{ 'one' }}"), ("b", "{{ 'two' }}")):
        (llamas / name / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": template, "model_max_length": 9})
        )
    text = """
merge_method: linear
parameters: {weight: 1}
models: [{model: DIR/a}, {model: DIR/b}, {model: DIR/b+DIR/lora}]
chat_template: auto
"""
    out = read(llamas, text).merge().save(llamas / "out")
    assert (out / "chat_template.jinja").read_text() == "{{ 'two' }}"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"model_max_length": 9}


def vlm(folder: Path) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=64, num_hidden_layers=3, **sizes)
    vision = CLIPVisionConfig(num_hidden_layers=4, image_size=28, patch_size=14, **sizes)
    config = LlavaConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=63
    )
    Llava(config).save_pretrained(folder)
    return Llava


SLICES = "[{sources: [{model: DIR/m, layer_range: [0, 2]}]}, {sources: [{model: DIR/m, layer_range: [1, 3]}]}]"  # noqa: E501
MODULES = f"""{{text_decoder: {{slices: {SLICES}}}, multi_modal_projector: {{models: [{{model: DIR/m}}]}},
 vision_tower: {{slices: [{{sources: [{{model: DIR/m, layer_range: [2, 4]}}]}}, {{sources: [{{model: DIR/m, layer_range: [3, 4]}}]}}]}}}}"""  # noqa: E501


@pytest.mark.parametrize(
    ("key", "text", "vision"), [("slices", SLICES, 4), ("modules", MODULES, 3)]
)
def test_the_tower_that_is_meant_is_stacked(
    key: str, text: str, vision: int, tmp_path: Path
) -> None:
    kind = vlm(tmp_path / "m")
    recipe = read(tmp_path, f"merge_method: passthrough\n{key}: {text}\n")
    assert Recipe.of(recipe.to_dict()) == recipe
    out = recipe.merge().save(tmp_path / "out")
    model, told = kind.from_pretrained(out, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(model.model.language_model.layers) == 4
    assert model.config.vision_config.num_hidden_layers == vision
    start, made = (kind.from_pretrained(folder).state_dict() for folder in (tmp_path / "m", out))
    name = "model.language_model.layers.{}.mlp.up_proj.weight"
    for new, old in enumerate((0, 1, 1, 2)):
        assert torch.equal(made[name.format(new)], start[name.format(old)])
    vision_name = next(n for n in start if "vision" in n and "layers.3.mlp.fc1.weight" in n)
    last = vision_name.replace("layers.3", f"layers.{vision - 1}")
    assert torch.equal(made[last], start[vision_name])


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=4, num_heads=2
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    decoder = "[{sources: [{model: DIR/m, layer_range: [1, 4]}]}]"
    text = f"{{encoder: {{slices: {SLICES}}}, decoder: {{slices: {decoder}}}}}"
    out = (
        read(tmp_path, f"merge_method: passthrough\nmodules: {text}\n")
        .merge()
        .save(tmp_path / "out")
    )
    model, told = T5ForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (len(model.encoder.block), len(model.decoder.block)) == (4, 3)


def test_numbers_of_layers_in_lists(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        mlp_only_layers=[1],
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "m")
    out = (
        read(tmp_path, f"merge_method: passthrough\nslices: {SLICES}\n")
        .merge()
        .save(tmp_path / "o")
    )
    model, told = Qwen3MoeForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.mlp_only_layers == [1, 2]
