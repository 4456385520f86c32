"""Try each form of checkpoint on tiny models, and print a table of what works.

    pip install diffusers==0.42.1 sentence-transformers==6.2.0   # or their rows are left out
    python benchmarks/forms.py

Each row writes two models in one form. The columns: the folder or file opens with the right values;
the vector of the two, applied with 1, gives the second to the bit; their merge is their mean;
`.model()` builds a model with the right outputs; the merge is saved; and what is saved gives the
mean in the library that the form is of, which for tensors alone is a module of torch. "refused" is
a `WeightopsError`; a blank means that there is nothing to load. Rows of quantised weights differ in
their codes. Those of adapters are in `forms_of_adapters.py`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import forms_of_adapters
import torch
from torch import nn

from weightops import TaskVector, merge, open_checkpoint
from weightops.errors import WeightopsError

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import form_codes
import form_writers as forms_of
from form_writers import State, Writer, filled, net, prefixed, torch_file
from helpers.tiny_transformers import MODELS, TinyModel

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
    write: Writer
    load: Callable[[Path], Any] | None = None
    kind: TinyModel | None = None


def files() -> Iterator[Form]:
    """Yield the forms of files and folders of tensors alone."""
    load = filled()
    yield Form("safetensors file", forms_of.plain_safetensors, load)
    yield Form("safetensors of huggingface_hub, tied", forms_of.hub_shards("1GB"), load)
    yield Form("safetensors shards, alias in the index", forms_of.hub_shards("0.1KB"), load)
    yield Form("`.bin` shards with an index", forms_of.bin_shards, load)
    yield Form("torch file", torch_file(lambda m: m.state_dict()), load)
    old = torch_file(lambda m: m.state_dict(), _use_new_zipfile_serialization=False)
    yield Form("torch file before 1.6", old, load)
    for key in ("state_dict", "model", "model_state_dict", "module", "params_ema", "net", "ema"):
        wrapped = torch_file(lambda m, key=key: {key: m.state_dict(), "step": 3})
        yield Form(f"torch file, under `{key}`", wrapped, load)
    chosen = torch_file(lambda m: {"model": net(9).state_dict(), "ema": m.state_dict()}, ":ema")
    yield Form("`FILE:KEY`", chosen, load)
    yield Form("pickled module", torch_file(lambda m: m), load)
    yield Form("TorchScript", forms_of.script, forms_of.load_script)
    yield Form("prefix of DDP", torch_file(prefixed("module.")), filled(nn.DataParallel))
    compiled: Any = torch.compile
    yield Form("prefix of torch.compile", torch_file(prefixed("_orig_mod.")), filled(compiled))
    average = torch.optim.swa_utils.AveragedModel
    yield Form("AveragedModel (EMA, SWA)", torch_file(forms_of.averaged), filled(average))
    yield Form("ema_pytorch", torch_file(forms_of.both_ends), load)
    yield Form("distributed checkpoint (DCP)", forms_of.distributed, load)
    for name, parts in {"whole": False, "parts": True}.items():
        write = partial(forms_of.distributed, save_distributed=parts)
        yield Form(f"DCP's safetensors, {name}", write, load)
    yield Form("distributed checkpoint, `app.model`", forms_of.under_key_of_script, load)
    yield Form("two shards without an index", forms_of.lone_shards(0), load)
    yield Form("one shard of two", forms_of.lone_shards(1))
    yield Form("Meta's slices (`consolidated.00.pth`)", forms_of.slices("consolidated.0{}.pth"))
    slices = forms_of.slices("mp_rank_0{}/model_optim_rng.pt")
    yield Form("Megatron's slices (`mp_rank_00`)", slices)
    yield Form("GGUF", forms_of.gguf)
    yield Form("program of torch.export (`.pt2`)", forms_of.exported)


def models() -> Iterator[Form]:
    """Yield the folders of libraries of models."""
    yield Form("open_clip directory", forms_of.open_clip_folder, forms_of.load_open_clip)
    yield Form("timm folder", forms_of.timm_folder, forms_of.load_timm)
    yield Form("PyTorchModelHubMixin", forms_of.mixed, forms_of.Mixed.from_pretrained)
    if importlib.util.find_spec("diffusers"):
        yield Form("diffusers component", *forms_of.of_diffusers(forms_of.unet))
        yield Form("diffusers pipeline", *forms_of.of_diffusers(forms_of.pipeline))
    if importlib.util.find_spec("sentence_transformers"):
        with_dense = "sentence-transformers with a projection"
        yield Form(with_dense, forms_of.sentences, forms_of.load_sentences)
    for name, tiny in MODELS.items():
        loads = forms_of.loader(tiny)
        yield Form(f"transformers: {name}", forms_of.of_transformers(tiny), loads, tiny)
    others = {
        "bert, one with gamma": ("bert", forms_of.gamma),
        "mixtral, one packed": ("mixtral", forms_of.in_memory),
        "vit, one in memory's names": ("vit", forms_of.in_memory),
        "llama, one head stored twice": ("llama", forms_of.twice),
    }
    for name, (kind, rename) in others.items():
        tiny = MODELS[kind]
        write, loads = forms_of.of_transformers(tiny, rename), forms_of.loader(tiny)
        yield Form(f"transformers: {name}", write, loads, tiny)


def codes() -> Iterator[Form]:
    """Yield quantised weights, as they are and as numbers."""
    for name, stored in {
        "MLX": ("l.weight", torch.uint32, "l.scales"),
        "bitsandbytes": ("l.weight", torch.uint8, "l.weight.absmax"),
        "GPTQ": ("l.qweight", torch.int32, "l.scales"),
        "fp8": ("l.weight", torch.float8_e4m3fn, "l.weight_scale"),
        "MXFP4": ("l.weight_blocks", torch.uint8, "l.weight_scales"),
        "torchao": ("l._weight_qdata", torch.int8, "l._weight_scale"),
        "quanto": ("l.weight._data", torch.int8, "l.weight._scale"),
        "HQQ": ("l.W_q", torch.uint8, "l.scale"),
    }.items():
        yield Form(f"quantised: {name}", form_codes.quantised(*stored))
    yield Form("`dequantized:` NVFP4 beside fp8", form_codes.of_two_layouts)
    for name, make in {
        "bitsandbytes in 8 bits": form_codes.int8,
        "fp8": form_codes.float8,
        "MXFP4": form_codes.mxfp4,
        "GPTQ": form_codes.gptq,
    }.items():
        yield Form(f"`dequantized:` {name}", form_codes.dequantised(make), form_codes.load_layer)


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
    yield "model()", lambda: computes(form, open_checkpoint(b).model(), second)
    yield "saves", lambda: merge([a, b]).save(out).exists()
    if form.load is not None:
        load = form.load
        yield "loads", lambda: computes(form, load(out), expected)


def with_state(tiny: TinyModel, state: State) -> Any:
    """Return a model of transformers with a state."""
    module = tiny.build(0)
    module.load_state_dict(state)
    return module


def holds(form: Form, checkpoint: Any, state: State) -> bool:
    """Return whether a checkpoint holds a state, perhaps under other names."""
    if form.kind is not None:
        return TaskVector(checkpoint, with_state(form.kind, state)).norm() < 1e-4
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
        made = module if isinstance(module, Mapping) else module.state_dict()
        return bool(made) and same(made, state)
    outputs = form.kind.outputs
    return torch.allclose(outputs(module), outputs(with_state(form.kind, state)), atol=1e-4)


def row(name: str, steps: Callable[[Path], Iterator[tuple[str, Callable[[], bool]]]]) -> list[str]:
    """Return the cells of a form, of which each step gives one."""
    cells = dict.fromkeys(COLUMNS, "")
    with tempfile.TemporaryDirectory() as folder:
        for column, step in steps(Path(folder)):
            try:
                with redirect_stdout(sys.stderr):
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
    for form in (*files(), *models(), *codes()):
        print(f"| {' | '.join(row(form.name, partial(steps, form)))} |", flush=True)
    for kind in forms_of_adapters.rows():
        cells = row(kind.name, partial(forms_of_adapters.steps, kind))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
