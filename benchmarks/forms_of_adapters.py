"""The rows of `benchmarks/forms.py` that are adapters, by kind.

Each row writes two adapters of one base. The columns: the adapter opens beside its base, and is the
right change of its weights; its vector, applied, gives the right weights; the merge of the two is
the mean of both models; the model that it gives computes the right outputs; the merge is saved; and
transformers loads it, with nothing missing or left over. Right is what peft's `merge_and_unload`
gives, and for files without a configuration the formula of their kind.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from weightops import TaskVector, merge

State = dict[str, torch.Tensor]
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2}
TWO = ["q_proj", "down_proj"]


@cache
def llama() -> Any:
    """Return a small language model."""
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


@cache
def mixtral() -> Any:
    """Return a small language model with packed experts."""
    import transformers

    torch.manual_seed(0)
    experts = {"num_local_experts": 3, "num_key_value_heads": 1}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **experts)).eval()


@cache
def clip_text() -> Any:
    """Return a small text encoder of Stable Diffusion."""
    import transformers

    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES, **tokens)).eval()


class Row(NamedTuple):
    """A kind of adapter.

    Attributes:
        name: its name in the table.
        base: returns the model that it is made on.
        write: writes an adapter of a seed for the model to a path; returns the right weights.
    """

    name: str
    base: Callable[[], Any]
    write: Callable[[Any, int, Path], State]


def by_peft(kind: str, **settings: Any) -> Callable[[Any, int, Path], State]:
    """Return a writer of an adapter of peft with random values."""

    def write(base: Any, seed: int, path: Path) -> State:
        import peft

        changes_weights = kind != "PromptTuningConfig"
        given = {"target_modules": TWO, **settings} if changes_weights else settings
        torch.manual_seed(0)
        model: Any = peft.get_peft_model(copy.deepcopy(base), getattr(peft, kind)(**given))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(path)
        if not changes_weights:
            return dict(base.state_dict())
        loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), path)
        merged: State = loaded.merge_and_unload().state_dict()
        return merged

    return write


Made = tuple[State, torch.Tensor]


def lora(shape: tuple[int, ...], ends: tuple[str, str] = ("lora_down", "lora_up")) -> Made:
    """Return the factors of a LoRA of rank 2, and its delta."""
    down, up = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
    return {f"{ends[0]}.weight": down, f"{ends[1]}.weight": up}, up @ down


def scaled(made: Made) -> Made:
    """Return factors of rank 2 with an alpha of 3."""
    return {**made[0], "alpha": torch.tensor(3.0)}, 1.5 * made[1]


def loha(shape: tuple[int, ...]) -> Made:
    """Return the factors of a LoHa of rank 2, and its delta."""
    (one, first), (two, second) = lora(shape), lora(shape)
    factors = {"w1_a": one["lora_up.weight"], "w1_b": one["lora_down.weight"]}
    factors |= {"w2_a": two["lora_up.weight"], "w2_b": two["lora_down.weight"]}
    return {f"hada_{name}": factor for name, factor in factors.items()}, first * second


def lokr(shape: tuple[int, ...]) -> Made:
    """Return the factors of a LoKr, and its delta."""
    left, right = torch.randn(4, 4), torch.randn(shape[0] // 4, shape[1] // 4)
    return {"lokr_w1": left, "lokr_w2": right}, torch.kron(left, right)


def bare(
    name: Callable[[str], str], make: Callable[[tuple[int, ...]], Made], *, dora: bool = False
) -> Callable[[Any, int, Path], State]:
    """Return a writer of a file of factors without a configuration."""

    def write(base: Any, seed: int, path: Path) -> State:
        torch.manual_seed(seed)
        state, factors = {n: t.clone() for n, t in base.state_dict().items()}, {}
        for weight in [n for n in state if n.endswith(("q_proj.weight", "fc1.weight"))]:
            made, delta = make(tuple(state[weight].shape))
            edited = state[weight] + 0.1 * delta
            begin = name(weight.removesuffix(".weight"))
            one = ("up.weight", "B.weight", "w1_a", "lokr_w1")
            made[next(end for end in made if end.endswith(one))] *= 0.1
            if dora:
                norms = torch.rand(len(edited), 1)
                made["dora_scale"] = norms
                edited = edited * norms / edited.square().sum(1, keepdim=True).sqrt()
            factors |= {f"{begin}.{end}": factor for end, factor in made.items()}
            state[weight] = edited
        path.mkdir()
        save_file(factors, path / "pytorch_lora_weights.safetensors")
        return state

    return write


def mlx(base: Any, seed: int, path: Path) -> State:
    """Write an adapter of mlx-lm; return what its layers compute with."""
    torch.manual_seed(seed)
    state, factors = {n: t.clone() for n, t in base.state_dict().items()}, {}
    for name in [n for n in state if n.endswith("q_proj.weight")]:
        a, b = torch.randn(state[name].shape[1], 2), torch.randn(2, state[name].shape[0])
        module = name.removesuffix(".weight")
        factors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        state[name] += 0.5 * (a @ b).T
    path.mkdir()
    save_file(factors, path / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 0.5}}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return state


def under_peft(base: Any, seed: int, path: Path) -> State:
    """Write the whole state of a model that peft wraps."""
    import peft

    torch.manual_seed(seed)
    settings = peft.IA3Config(target_modules=TWO, feedforward_modules=["down_proj"])
    model: Any = peft.get_peft_model(copy.deepcopy(base), settings)
    torch.save(model.state_dict(), path)
    return dict(base.state_dict())


def kohya(module: str) -> str:
    """Return kohya's name of a module of a text encoder."""
    return "lora_te_text_model_" + module.removeprefix("text_model.").replace(".", "_")


def diffusers(module: str) -> str:
    """Return diffusers' name of a module of a text encoder."""
    return f"text_encoder.{module}"


def rows() -> Iterator[Row]:
    """Yield the kinds."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "LoRA": ("LoraConfig", {"r": 2}),
        "LoRA of embeddings": ("LoraConfig", {"r": 2, "target_modules": ["embed_tokens"]}),
        "LoRA, ranks and alphas by pattern": (
            "LoraConfig",
            {"r": 2, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
        ),
        "LoRA with biases": ("LoraConfig", {"r": 2, "bias": "all"}),
        "rsLoRA": ("LoraConfig", {"r": 2, "use_rslora": True}),
        "DoRA": ("LoraConfig", {"r": 2, "use_dora": True}),
        "PiSSA": ("LoraConfig", {"r": 2, "init_lora_weights": "pissa"}),
        "OLoRA": ("LoraConfig", {"r": 2, "init_lora_weights": "olora"}),
        "modules_to_save": ("LoraConfig", {"r": 2, "modules_to_save": ["lm_head"]}),
        "trainable tokens": (
            "LoraConfig",
            {"r": 2, "trainable_token_indices": {"embed_tokens": [1, 4]}},
        ),
        "AdaLoRA": ("AdaLoraConfig", {"init_r": 4, "total_step": 10}),
        "LoHa": ("LoHaConfig", {"r": 2}),
        "LoKr": ("LoKrConfig", {"r": 2}),
        "VeRA": ("VeraConfig", {"r": 2, "target_modules": ["q_proj", "v_proj"]}),
        "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
        "OFT": ("OFTConfig", {"oft_block_size": 4}),
        "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
        "HRA": ("HRAConfig", {"r": 2}),
        "MiSS": ("MissConfig", {"r": 2}),
        "FourierFT": ("FourierFTConfig", {"n_frequency": 20}),
        "C3A": ("C3AConfig", {"block_size": 8}),
        "RandLoRA": ("RandLoraConfig", {"r": 2}),
        "SHiRA": ("ShiraConfig", {"r": 2}),
        "layer norms": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
        "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}),
    }
    for name, (kind, settings) in kinds.items():
        yield Row(f"adapter of peft: {name}", llama, by_peft(kind, **settings))
    packed = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    experts = by_peft("LoraConfig", r=2, target_modules=["q_proj"], target_parameters=packed)
    yield Row("adapter of peft: target_parameters", mixtral, experts)
    yield Row("adapter of mlx-lm", llama, mlx)
    yield Row("state of a model under peft", llama, under_peft)
    files = {
        "kohya": bare(kohya, lambda shape: scaled(lora(shape))),
        "kohya with DoRA": bare(kohya, lora, dora=True),
        "LyCORIS: LoHa": bare(kohya, lambda shape: scaled(loha(shape))),
        "LyCORIS: LoKr": bare(kohya, lokr),
        "diffusers, as peft's": bare(diffusers, lambda shape: lora(shape, ("lora_A", "lora_B"))),
        "diffusers, `lora.down`": bare(
            diffusers, lambda shape: lora(shape, ("lora.down", "lora.up"))
        ),
        "peft's, without the configuration": bare(
            lambda module: f"base_model.model.{module}",
            lambda shape: lora(shape, ("lora_A", "lora_B")),
        ),
    }
    for name, write in files.items():
        yield Row(f"file of factors: {name}", clip_text, write)


def is_near(got: State, wanted: State) -> bool:
    """Return whether weights are equal up to rounding in float32."""
    return got.keys() == wanted.keys() and all(
        float((got[name] - tensor).abs().max()) <= 2e-6 * max(1.0, float(tensor.abs().max()))
        for name, tensor in wanted.items()
        if tensor.is_floating_point()
    )


def loaded(row: Row, folder: Path) -> Any:
    """Return a saved model in transformers."""
    model, told = type(row.base()).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def steps(row: Row, folder: Path) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Yield the steps of a row by column; each returns whether it is right."""
    base, pre = row.base(), folder / "base"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.save_pretrained(pre)
        written = [row.write(base, seed, folder / f"a{seed}") for seed in (1, 2)]
    a, b = folder / "a1", folder / "a2"
    mean = {name: (tensor + written[1][name]) / 2 for name, tensor in written[0].items()}
    out = folder / "out"

    def outputs(module: Any, state: State) -> bool:
        wanted = copy.deepcopy(base)
        wanted.load_state_dict(state)
        tokens = torch.arange(6)[None]
        with torch.no_grad():
            return torch.allclose(module(tokens)[0], wanted(tokens)[0], atol=1e-4)

    yield "opens", lambda: TaskVector(pre, a).norm() > 0
    yield "vector", lambda: is_near(TaskVector(base, a).apply(base).state_dict(), written[0])
    both = partial(merge, [a, b], base=pre)
    yield "merge", lambda: is_near(TaskVector(pre, both()).apply(base).state_dict(), mean)
    yield "model()", lambda: outputs(TaskVector(pre, a).apply(pre).model(), written[0])
    yield "saves", lambda: both().save(out).exists()
    yield "loads", lambda: is_near(loaded(row, out).state_dict(), mean)
