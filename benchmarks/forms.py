"""Try each form of checkpoint on tiny models, and print a table of what works.

    python benchmarks/forms.py

Each row writes two models in one form. The columns: the folder or file opens with the right values;
the vector of the two, applied with 1, gives the second to the bit; their merge is their mean;
`.model()` builds a model with the right outputs; the merge is saved; and what is saved gives the
mean in the library that the form is of. "refused" is a `WeightopsError`; a blank means that the
form has no such step. Rows of quantised weights differ in their codes. Those of adapters are in
`forms_of_adapters.py`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import forms_of_adapters
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from weightops import TaskVector, merge, open_checkpoint
from weightops.errors import WeightopsError

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.tiny_transformers import MODELS, TinyModel

State = dict[str, torch.Tensor]
COLUMNS = ("opens", "vector", "merge", "model()", "saves", "loads")


class Form(NamedTuple):
    """A form of checkpoint.

    Attributes:
        name: its name in the table.
        write: writes a model of a seed to a path, and returns the ref and the tensors in it.
        load: loads a saved folder in the library of the form; None if there is none.
        kind: the model of transformers that the form is of.
    """

    name: str
    write: Callable[[int, Path], tuple[str, State]]
    load: Callable[[Path], Any] | None = None
    kind: TinyModel | None = None


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


def torch_file(
    content: Callable[[Net], Any], key: str = "", **options: Any
) -> Callable[[int, Path], tuple[str, State]]:
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


def hub_shards(limit: str) -> Callable[[int, Path], tuple[str, State]]:
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


def component(seed: int, path: Path) -> tuple[str, State]:
    """Write a folder as diffusers has it for one component."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    save_file(untied(net(seed)), path / "diffusion_pytorch_model.safetensors")
    return str(path), net(seed).state_dict()


def load_component(path: Path) -> Any:
    """Load the tensors under the names that diffusers looks for."""
    assert (path / "config.json").is_file()
    module = net(0)
    module.load_state_dict(load_file(path / "diffusion_pytorch_model.safetensors"), strict=False)
    return module


def of_transformers(
    tiny: TinyModel, rename: Callable[[State, Any], State] | None = None
) -> Callable[[int, Path], tuple[str, State]]:
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


def quantised(
    codes: str, dtype: torch.dtype, scale: str
) -> Callable[[int, Path], tuple[str, State]]:
    """Return a writer of a quantised layer."""

    def write(seed: int, path: Path) -> tuple[str, State]:
        torch.manual_seed(seed)
        numbers = torch.randint(0, 100, (8, 8))
        state = {codes: numbers.to(dtype), scale: torch.ones(8, 1), "norm.weight": torch.ones(8)}
        save_file(state, path)
        return str(path), state

    return write


def gamma(state: State, _: Any) -> State:
    """Return BERT's tensors under the names of its first files."""
    return {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in state.items()}


def in_memory(_: State, model: Any) -> State:
    """Return a model's tensors under their names in memory."""
    return untied(model)


def twice(state: State, _: Any) -> State:
    """Return a tied model's tensors with a second copy of the head."""
    return {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}


def forms() -> Iterator[Form]:
    """Yield the rows."""
    yield Form("safetensors file", plain_safetensors)
    yield Form("safetensors of huggingface_hub, tied", hub_shards("1GB"))
    yield Form("safetensors shards, alias in the index", hub_shards("0.1KB"))
    yield Form("`.bin` shards with an index", bin_shards)
    yield Form("torch file", torch_file(lambda m: m.state_dict()))
    yield Form(
        "torch file before 1.6",
        torch_file(lambda m: m.state_dict(), _use_new_zipfile_serialization=False),
    )
    for key in ("state_dict", "model", "model_state_dict", "module", "params_ema", "net"):
        wrapped = torch_file(lambda m, key=key: {key: m.state_dict(), "step": 3})
        yield Form(f"torch file, under `{key}`", wrapped)
    chosen = torch_file(lambda m: {"model": net(9).state_dict(), "ema": m.state_dict()}, ":ema")
    yield Form("`FILE:KEY`", chosen)
    yield Form("pickled module", torch_file(lambda m: m))
    yield Form("TorchScript", script)
    yield Form("prefix of DDP", torch_file(prefixed("module.")))
    yield Form("prefix of torch.compile", torch_file(prefixed("_orig_mod.")))
    yield Form("AveragedModel (EMA, SWA)", torch_file(averaged))
    yield Form("ema_pytorch", torch_file(both_ends))
    yield Form("distributed checkpoint (DCP)", distributed)
    yield Form("DCP's safetensors, whole", lambda s, p: distributed(s, p, save_distributed=False))
    yield Form("DCP's safetensors, parts", lambda s, p: distributed(s, p, save_distributed=True))
    yield Form("open_clip directory", open_clip_folder, load_open_clip)
    yield Form("timm folder", timm_folder, load_timm)
    yield Form("diffusers component", component, load_component)
    for name, tiny in MODELS.items():
        yield Form(f"transformers: {name}", of_transformers(tiny), loader(tiny), tiny)
    others = {
        "bert, one with gamma": ("bert", gamma),
        "mixtral, one packed": ("mixtral", in_memory),
        "vit, one in memory's names": ("vit", in_memory),
        "llama, one head stored twice": ("llama", twice),
    }
    for name, (kind, rename) in others.items():
        tiny = MODELS[kind]
        yield Form(f"transformers: {name}", of_transformers(tiny, rename), loader(tiny), tiny)
    yield Form("quantised: MLX", quantised("l.weight", torch.uint32, "l.scales"))
    yield Form("quantised: bitsandbytes", quantised("l.weight", torch.uint8, "l.weight.absmax"))
    yield Form("quantised: GPTQ", quantised("l.qweight", torch.int32, "l.scales"))
    yield Form("quantised: fp8", quantised("l.weight", torch.float8_e4m3fn, "l.weight_scale"))


def mean(states: list[State]) -> State:
    """Return the mean of the floating-point tensors, and the others of the first."""
    first, second = states
    return {
        n: (t.double() + second[n].double()).div(2).to(t.dtype) if t.is_floating_point() else t
        for n, t in first.items()
    }


def same(a: Mapping[str, torch.Tensor], b: State) -> bool:
    """Return whether each tensor of a mapping is one of a state's, whatever its name."""
    values = list(b.values())
    return all(
        any(x.shape == y.shape and torch.allclose(x.float(), y.float(), atol=1e-5) for y in values)
        for x in a.values()
        if x.is_floating_point() and x.numel()
    )


def steps(form: Form, folder: Path) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Yield the steps of a form by column; each returns whether it is right."""
    written = [form.write(seed, folder / f"model{seed}") for seed in (0, 1)]
    (a, first), (b, second) = written
    expected, out = mean([first, second]), folder / "out"
    yield "opens", lambda: holds(form, open_checkpoint(a), first)
    yield "vector", lambda: gives_second(a, b)
    yield "merge", lambda: holds(form, merge([a, b]), expected)
    if form.load:
        yield "model()", lambda: computes(form, open_checkpoint(b).model(), second)
    yield "saves", lambda: merge([a, b]).save(out).exists()
    if form.load is not None:
        load = form.load
        yield "loads", lambda: computes(form, load(out), expected)


def filled(tiny: TinyModel, state: State) -> Any:
    """Return a model of transformers with a state."""
    module = tiny.build(0)
    module.load_state_dict(state)
    return module


def holds(form: Form, checkpoint: Any, state: State) -> bool:
    """Return whether a checkpoint holds a state, perhaps under other names."""
    if form.kind is not None:
        return TaskVector(checkpoint, filled(form.kind, state)).norm() < 1e-4
    return same(checkpoint, state)


def gives_second(a: str, b: str) -> bool:
    """Return whether the vector from one to another model gives this other one to the bit."""
    base, other = open_checkpoint(a), open_checkpoint(b)
    edited = TaskVector(base, other).apply(base)
    if edited.keys() != other.keys():
        return TaskVector(edited, other).norm() == 0
    return all(torch.equal(edited[name], other[name]) for name in edited)


def computes(form: Form, module: Any, state: State) -> bool:
    """Return whether a module has a state's tensors, and so its outputs."""
    if form.kind is None:
        return same({n: t for n, t in module.state_dict().items() if n in state}, state)
    outputs = form.kind.outputs
    return torch.allclose(outputs(module), outputs(filled(form.kind, state)), atol=1e-4)


def row(name: str, steps: Callable[[Path], Iterator[tuple[str, Callable[[], bool]]]]) -> list[str]:
    """Return the cells of a form, of which each step gives one."""
    cells = dict.fromkeys(COLUMNS, "")
    with tempfile.TemporaryDirectory() as folder:
        for column, step in steps(Path(folder)):
            try:
                cells[column] = "yes" if step() else "WRONG"
            except WeightopsError:
                cells[column] = "refused"
            except Exception as error:
                after = cells["saves"] == "refused"
                cells[column] = "" if after else f"FAILED: {type(error).__name__} {error}"
    return [name, *cells.values()]


def main() -> None:
    """Print the table."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    print(f"| form | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for form in forms():
        print(f"| {' | '.join(row(form.name, partial(steps, form)))} |", flush=True)
    for kind in forms_of_adapters.rows():
        cells = row(kind.name, partial(forms_of_adapters.steps, kind))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
