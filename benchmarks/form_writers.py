"""Write tiny models in each form of checkpoint, and load what is saved in its own library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers.tiny_transformers import MODELS, TinyModel
from huggingface_hub import PyTorchModelHubMixin, save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from weightops import open_checkpoint

State = dict[str, torch.Tensor]
Writer = Callable[[int, Path], tuple[str, State]]
"""Writes a model of a seed to a path, and returns the ref and the tensors in it."""


class Net(nn.Module):
    """A model with tied weights and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.hidden = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight


def net(seed: int) -> Net:
    """Return a model with random weights."""
    torch.manual_seed(seed)
    return Net().eval()


def torch_file(content: Callable[[Net], Any], key: str = "", **options: Any) -> Writer:
    """Return a writer of a file of ``torch.save``."""

    def write(seed: int, path: Path) -> tuple[str, State]:
        module = net(seed)
        torch.save(content(module), path, **options)
        return f"{path}{key}", module.state_dict()

    return write


def prefixed(prefix: str, **others: torch.Tensor) -> Callable[[Net], State]:
    """Return a function that gives a model's state with a prefix, and counters beside it."""
    return lambda m: {**others, **{prefix + n: t for n, t in m.state_dict().items()}}


def script(seed: int, path: Path) -> tuple[str, State]:
    """Write a TorchScript archive."""
    module = net(seed)
    inner = torch.jit.trace(nn.Sequential(module.hidden, module.norm), torch.randn(2, 5))
    torch.jit.save(inner, str(path))
    return str(path), inner.state_dict()


def untied(module: nn.Module) -> State:
    """Return a model's tensors, each with memory of its own."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def plain_safetensors(seed: int, path: Path) -> tuple[str, State]:
    """Write a safetensors file."""
    save_file(untied(net(seed)), path)
    return str(path), net(seed).state_dict()


def hub_shards(limit: str) -> Writer:
    """Return a writer of what huggingface_hub's save_torch_state_dict writes."""

    def write(seed: int, path: Path) -> tuple[str, State]:
        path.mkdir()
        save_torch_state_dict(net(seed).state_dict(), path, max_shard_size=limit)
        return str(path), net(seed).state_dict()

    return write


def bin_shards(seed: int, path: Path) -> tuple[str, State]:
    """Write `.bin` shards with an index."""
    path.mkdir()
    state = untied(net(seed))
    listed = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(listed.values()):
        torch.save({n: t for n, t in state.items() if listed[n] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    return str(path), net(seed).state_dict()


def distributed(seed: int, path: Path, **options: Any) -> tuple[str, State]:
    """Write a distributed checkpoint of torch."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    state = untied(net(seed))
    given: dict[str, Any] = {"checkpoint_id": str(path)}
    if options:
        given = {"storage_writer": HuggingFaceStorageWriter(str(path), **options)}
    dcp.save(state, no_dist=True, **given)
    return str(path), net(seed).state_dict()


def lone_shards(missing: int) -> Writer:
    """Return a writer of two shards without their index, of which some are missing."""

    def write(seed: int, path: Path) -> tuple[str, State]:
        path.mkdir()
        state = untied(net(seed))
        for i in range(2 - missing):
            half = {name: state[name] for name in list(state)[i::2]}
            save_file(half, path / f"model-{i + 1:05}-of-00002.safetensors")
        return str(path), net(seed).state_dict()

    return write


def slices(name: str) -> Writer:
    """Return a writer of a model that two processes have a part of every matrix of."""

    def write(seed: int, path: Path) -> tuple[str, State]:
        state = net(seed).state_dict()
        for i in range(2):
            (path / name.format(i)).parent.mkdir(parents=True, exist_ok=True)
            torch.save(
                {n: t.chunk(2)[i] if t.dim() > 1 else t for n, t in state.items()},
                path / name.format(i),
            )
        return str(path / name.format(0)), state

    return write


def under_key_of_script(seed: int, path: Path) -> tuple[str, State]:
    """Write a distributed checkpoint of a script's state, the optimizer's among it."""
    import torch.distributed.checkpoint as dcp

    module = net(seed)
    moments = {name: {"exp_avg": torch.ones(3)} for name, _ in module.named_parameters()}
    state = {"app": {"model": untied(module), "optim": {"state": moments}}}
    dcp.save(state, checkpoint_id=str(path), no_dist=True)
    return str(path), module.state_dict()


def averaged(module: Net) -> State:
    """Return the state of torch's AveragedModel."""
    average = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    return average.state_dict()


def both_ends(module: Net) -> State:
    """Return what ema_pytorch saves: the average, and the trained weights."""
    other = {n: t + 1 for n, t in module.state_dict().items()}
    counters = {"initted": torch.tensor(True), "step": torch.tensor(3)}
    ends = (("ema_model.", module.state_dict()), ("online_model.", other))
    return counters | {prefix + n: t for prefix, state in ends for n, t in state.items()}


def open_clip_folder(seed: int, path: Path) -> tuple[str, State]:
    """Write an open_clip directory."""
    base = open_checkpoint("embedded")
    state = {n: t + 0.01 * seed if t.is_floating_point() else t for n, t in base.items()}
    base.save(path)
    save_file(state, path / "open_clip_model.safetensors")
    return str(path), state


def load_open_clip(path: Path) -> Any:
    """Load a directory in open_clip."""
    import open_clip

    return open_clip.create_model(f"local-dir:{path}")


def timm_folder(seed: int, path: Path) -> tuple[str, State]:
    """Write a folder of timm."""
    import timm

    torch.manual_seed(seed)
    model = timm.create_model("test_vit", num_classes=3)
    timm.models.save_for_hf(model, path, safe_serialization=True)
    return str(path), model.state_dict()


def load_timm(path: Path) -> Any:
    """Load a folder in timm."""
    import timm

    return timm.create_model(f"local-dir:{path}", pretrained=True)


def filled(wrap: Callable[[Any], Any] = lambda module: module) -> Callable[[Path], Any]:
    """Return a function that fills a model in a wrapper from a saved folder; ties are kept once."""

    def load(path: Path) -> Any:
        module = wrap(net(0))
        told = module.load_state_dict(load_file(path / "model.safetensors"), strict=False)
        assert not told.unexpected_keys
        assert all(name.endswith("head.weight") for name in told.missing_keys)
        return module

    return load


def load_script(path: Path) -> Any:
    """Fill the part of a model that `script` writes."""
    module = nn.Sequential(net(0).hidden, net(0).norm)
    module.load_state_dict(load_file(path / "model.safetensors"))
    return module


def of_diffusers(build: Callable[[], Any]) -> tuple[Writer, Callable[[Path], Any]]:
    """Return a writer of models or pipelines of diffusers, and their loader."""

    def tensors(made: Any) -> State:
        parts = getattr(made, "components", {"": made})
        modules = {n: part for n, part in parts.items() if isinstance(part, nn.Module)}
        return {f"{n}.{k}": t for n, part in modules.items() for k, t in part.state_dict().items()}

    def write(seed: int, path: Path) -> tuple[str, State]:
        torch.manual_seed(seed)
        made = build()
        made.save_pretrained(path)
        return str(path), tensors(made)

    def load(path: Path) -> Any:
        return tensors(type(build()).from_pretrained(path))

    return write, load


def unet() -> Any:
    """Return a tiny denoiser of diffusers."""
    import diffusers

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2}
    return diffusers.UNet2DModel(sample_size=8, **blocks, **sizes)


def pipeline() -> Any:
    """Return a tiny pipeline of two models and a scheduler."""
    import diffusers

    coder = diffusers.VQModel(block_out_channels=(4,), norm_num_groups=2)
    return diffusers.LDMPipeline(coder, unet(), diffusers.DDIMScheduler())


def sentences(seed: int, path: Path) -> tuple[str, State]:
    """Write a model of sentence-transformers with a projection."""
    from sentence_transformers import SentenceTransformer, models

    MODELS["bert"].build(seed).bert.save_pretrained(path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (path / "bert" / "vocab.txt").write_text("\n".join(words))
    transformer = models.Transformer(str(path / "bert"))
    model = SentenceTransformer(
        modules=[transformer, models.Pooling(16), models.Dense(16, 8)], device="cpu"
    )
    model.save_pretrained(str(path / "model"))
    return str(path / "model"), model.state_dict()


def load_sentences(path: Path) -> Any:
    """Load a model of sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu")


class Mixed(nn.Module, PyTorchModelHubMixin):
    """A model of the Hub's mixin."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)


def mixed(seed: int, path: Path) -> tuple[str, State]:
    """Write a model of the Hub's mixin."""
    torch.manual_seed(seed)
    model = Mixed(width=3)
    model.save_pretrained(path)
    return str(path), model.state_dict()


def gguf(seed: int, path: Path) -> tuple[str, State]:
    """Write the header of a GGUF file."""
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    return str(path), {}


def exported(seed: int, path: Path) -> tuple[str, State]:
    """Write a program of torch.export."""
    module = nn.Sequential(nn.Linear(5, 5))
    torch.export.save(torch.export.export(module, (torch.ones(2, 5),)), f"{path}.pt2")
    return f"{path}.pt2", module.state_dict()


def of_transformers(tiny: TinyModel, rename: Callable[[State, Any], State] | None = None) -> Writer:
    """Return a writer of a folder of transformers; the second model's file may have other names."""

    def write(seed: int, path: Path) -> tuple[str, State]:
        model = tiny.build(seed)
        model.save_pretrained(path)
        if rename and seed:
            file = path / "model.safetensors"
            save_file(rename(load_file(file), model), file, metadata={"format": "pt"})
        return str(path), model.state_dict()

    return write


def loader(tiny: TinyModel) -> Callable[[Path], Any]:
    """Return a function that loads a folder in transformers, with nothing missing or left over."""

    def load(path: Path) -> Any:
        import transformers

        kind = getattr(transformers, tiny.kind)
        model, told = kind.from_pretrained(path, output_loading_info=True)
        assert not any(told.values()), told
        return model.eval()

    return load


def gamma(state: State, _: Any) -> State:
    """Return BERT's tensors under the names of its first files."""
    return {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in state.items()}


def in_memory(_: State, model: Any) -> State:
    """Return a model's tensors under their names in memory."""
    return untied(model)


def twice(state: State, _: Any) -> State:
    """Return a tied model's tensors with a second copy of the head."""
    return {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}
