"""A seeded fuzzer: a damaged file opens or is refused with a `WeightopsError`, and nothing else."""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.bytewise import archive, mapping, module, stream, tar, tensor
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from weightops import TaskVector
from weightops.checkpoints.checkpoint import Checkpoint
from weightops.checkpoints.opening import open_ref
from weightops.errors import WeightopsError
from weightops.tasks.archives import read_archives

MUTANTS = 10_000
STATE = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.ones(3).half(),
    "n": torch.tensor(3),
}
INTERESTING = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**60,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def _safetensors(folder: Path) -> Path:
    save_file(
        STATE,
        folder / "x",
        metadata={"format": "pt", "weightops": '{"space": "weights"}', "b.weight": "a.weight"},
    )
    return folder / "x"


def _index(folder: Path) -> Path:
    save_file({n: t for n, t in STATE.items() if n != "n"}, folder / "one.safetensors")
    save_file({"n": STATE["n"]}, folder / "two.safetensors")
    weight_map = {name: "two.safetensors" if name == "n" else "one.safetensors" for name in STATE}
    (folder / "x").write_text(
        json.dumps({"metadata": {"total_size": 38}, "weight_map": weight_map})
    )
    return folder / "x"


def _saved(folder: Path, *, new: bool) -> Path:
    torch.save(STATE, folder / "x", _use_new_zipfile_serialization=new)
    return folder / "x"


def _script(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 3), torch.ones(1, 2)), str(folder / "x"))
    return folder / "x"


def _adapter(folder: Path) -> Path:
    pairs = {
        "base_model.model.a.lora_A.weight": torch.ones(2, 3),
        "base_model.model.a.lora_B.weight": torch.ones(4, 2),
    }
    save_file(pairs, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"b": 3},
        "alpha_pattern": {"^a": 2.5},
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter_config.json"


def _distributed(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"w": torch.ones(2, 3), "v": torch.ones(2).half()}, checkpoint_id=str(folder / "dcp")
        )
    return folder / "dcp" / ".metadata"


def _pictures(folder: Path) -> Path:
    picture, file = io.BytesIO(), folder / "x"
    Image.new("RGB", (8, 8), (9, 90, 200)).save(picture, "PNG")
    with tarfile.open(file, "w") as tar_file:
        for name, content in (
            ("a.png", picture.getvalue()),
            ("a.cls", b"1"),
            ("b.png", picture.getvalue()),
            ("b.cls", b"0"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar_file.addfile(info, io.BytesIO(content))
    return file


def read_pictures(path: Path) -> None:
    """Read everything in an archive of pictures that a task needs."""
    images = read_archives([path], 2)
    assert len(images.labels) == len(images)
    assert all(images[i].mode == "RGB" for i in range(len(images)))


def _compressed(how: str) -> Callable[[Path], Path]:
    return lambda folder: TaskVector(STATE, {n: t + 1 for n, t in STATE.items()}).save(
        folder / "x", compress=how
    )


FORMS: dict[str, tuple[int, Callable[[Path], Path]]] = {
    "safetensors": (1500, _safetensors),
    "index": (1000, _index),
    "zip": (1500, lambda folder: _saved(folder, new=True)),
    "stream": (1500, lambda folder: _saved(folder, new=False)),
    "small zip": (1000, lambda folder: archive(folder / "x", mapping(w=tensor()))),
    "module": (1000, lambda folder: archive(folder / "x", module("a.B", w=tensor()))),
    "small stream": (1000, lambda folder: stream(folder / "x", module("a.B", w=tensor()))),
    "tar": (1000, lambda folder: tar(folder / "x", mapping(w=b"K\x07Q"))),
    "script": (500, _script),
    "adapter": (500, _adapter),
    "distributed": (500, _distributed),
    "int8": (250, _compressed("int8")),
    "sparse": (250, _compressed("sparse:0.5")),
    "low rank": (250, _compressed("lowrank:1")),
    "pictures": (1000, _pictures),
}
"""Kind of file -> the number of its mutants, and a function that writes a sound one."""


def mutate(data: bytes, random: random.Random) -> bytes:
    """Return data with one to four changes.

    A byte, bit or number is replaced; a piece is removed, repeated, copied elsewhere or inserted;
    or the end is cut off.
    """
    mutant = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(mutant)) if mutant else 0
        length = random.choice((1, 2, 4, 8, 64))
        piece = bytes(mutant[at : at + length])
        other = random.randrange(len(mutant)) if mutant else 0
        kind = random.randrange(9)
        if kind <= 1 and mutant:
            mutant[at] = random.randrange(256)
        elif kind == 2 and mutant:
            mutant[at] ^= 1 << random.randrange(8)
        elif kind == 3:
            width = random.choice((1, 2, 4, 8))
            mutant[at : at + width] = (random.choice(INTERESTING) % 256**width).to_bytes(
                width, "little"
            )
        elif kind == 4:
            del mutant[at : at + length]
        elif kind == 5:
            mutant[at:at] = piece * random.choice((1, 2, 100))
        elif kind == 6:
            mutant[other : other + length] = piece
        elif kind == 7:
            mutant[at:at] = bytes(
                [random.choice(b'()[]{}tRbo\x81\x92.0Qcie012uas,"9-\x85\x86\x94hq')]
            )
        elif random.random() < 0.3:
            del mutant[at:]
    return bytes(mutant)


@pytest.fixture(autouse=True)
def bounds() -> Iterator[None]:
    """Allow one gigabyte more than is in use, and ten seconds for each mutant."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("a mutant takes more than ten seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limits[1]))
    handler = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def consume(checkpoint: Checkpoint) -> None:
    """Read everything that a user may read from an opened file."""
    [source] = checkpoint.form.sources
    for name in source.specs:
        assert tuple(source.read(name).shape) == source.specs[name].shape
    assert len(source.fingerprint) == 16
    assert all(isinstance(item, str) for item in source.skipped)
    if source.space == "weights":
        assert checkpoint.state_dict().keys() == source.specs.keys()


def _header(path: Path, content: bytes) -> Path:
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(32))
    return path


INSIDE: dict[str, tuple[int, bytes, Callable[[Path, bytes], Path]]] = {
    "a pickle in a zip": (2000, mapping(w=tensor(), v=tensor(shape=(8,), stride=(1,))), archive),
    "a module in a zip": (2000, module("a.B", w=tensor()), archive),
    "a pickle in a stream": (1000, mapping(w=tensor()), stream),
    "a pickle in a tar": (1000, mapping(w=b"K\x07Q", v=b"K\x07Q"), tar),
    "a header": (
        1000,
        json.dumps({"w": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}).encode(),
        _header,
    ),
}
"""Kind of content -> the number of its mutants, the content, and a writer of its container."""


def test_there_are_ten_thousand() -> None:
    assert sum(count for count, *_ in (*FORMS.values(), *INSIDE.values())) >= MUTANTS


def use(path: Path) -> None:
    """Open a file and read everything in it."""
    consume(open_ref(path))


def fuzz(
    label: str,
    count: int,
    data: bytes,
    write: Callable[[bytes], Path],
    use: Callable[[Path], None] = use,
) -> None:
    """Use ``count`` mutants of ``data``; some of them must open, and some must be refused."""
    draws, opened = random.Random(label), 0
    use(write(data))
    for i in range(count):
        path = write(mutate(data, draws))
        signal.alarm(10)
        try:
            use(path)
            opened += 1
        except WeightopsError:
            continue
        except BaseException as error:
            raise AssertionError(f"mutant {i} of {label}: {error!r}") from error
    assert 0 < opened < count


@pytest.mark.parametrize("form", FORMS)
def test_mutants(form: str, tmp_path: Path) -> None:
    count, make = FORMS[form]
    path = make(tmp_path)

    def write(data: bytes) -> Path:
        path.unlink()
        path.write_bytes(data)
        return path

    fuzz(form, count, path.read_bytes(), write, read_pictures if form == "pictures" else use)


@pytest.mark.parametrize("form", INSIDE)
def test_mutants_inside_a_sound_container(form: str, tmp_path: Path) -> None:
    count, content, wrap = INSIDE[form]

    def write(data: bytes) -> Path:
        (tmp_path / "x").unlink(missing_ok=True)
        return wrap(tmp_path / "x", data)

    fuzz(form, count, content, write)
