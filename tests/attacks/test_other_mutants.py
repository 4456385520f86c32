"""Damaged configurations, tokenizers, tensors of adapters and pictures; see `test_mutants`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_configurations import FOLDERS
from test_mutants import FORMS, bounds, fuzz, use

from weightops import open_checkpoint
from weightops.errors import WeightopsError
from weightops.tasks.pictures import read_image

__all__ = ["bounds"]

Use = Callable[[Path], None]


def adapter_tensors(folder: Path) -> Path:
    """Write an adapter, and return the file of its tensors."""
    FORMS["adapter"][1](folder)
    return folder / "adapter_model.safetensors"


def tokenizer(folder: Path) -> Path:
    """Write a small tokenizer beside a configuration of transformers, and return its file."""
    config = FOLDERS["transformers"](folder / "model")
    merges = {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "ab": 2, "<e>": 3},
        "merges": [["a", "b"]],
        "unk_token": "<e>",
    }
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": 3, "content": "<e>", "special": True, "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False}
        ],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "model": merges,
    }
    path = config.parent / "tokenizer.json"
    path.write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<e>"}
    (path.parent / "tokenizer_config.json").write_text(
        json.dumps({**settings, "model_max_length": 8})
    )
    return path


def tokenizer_config(folder: Path) -> Path:
    """Return the settings of such a tokenizer."""
    return tokenizer(folder).parent / "tokenizer_config.json"


def processor_config(folder: Path) -> Path:
    """Write the settings of a processor of images beside a configuration of transformers."""
    path = FOLDERS["transformers"](folder / "model").parent / "preprocessor_config.json"
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    path.write_text(json.dumps(settings))
    return path


def merges(folder: Path) -> Path:
    """Return the packed merges of a folder of open_clip."""
    return FOLDERS["open_clip"](folder / "model").parent / "merges.txt.gz"


def build(path: Path) -> None:
    """Build the model of a configuration."""
    open_checkpoint(path.parent).known_architecture().build()


def encode(path: Path) -> None:
    """Make a tokenizer, and use it."""
    open_checkpoint(path.parent).tokenizer()(["ab a"])


def prepare(path: Path) -> None:
    """Make what prepares images, and use it."""
    open_checkpoint(path.parent).preprocess()(Image.new("RGB", (40, 30)))


def show(path: Path) -> None:
    """Read a picture."""
    assert read_image(path, path.name).mode == "RGB"


def picture(kind: str) -> Callable[[Path], Path]:
    """Return a function that writes a picture in a format of Pillow."""

    def write(folder: Path) -> Path:
        content = io.BytesIO()
        shades = torch.arange(3 * 24 * 24, dtype=torch.uint8).reshape(24, 24, 3)
        Image.fromarray(shades.numpy()).save(content, kind)
        (folder / "x").write_bytes(content.getvalue())
        return folder / "x"

    return write


def library(name: str) -> Callable[[Path], Path]:
    """Return a function that writes a folder of a library, and returns its configuration."""
    return lambda folder: FOLDERS[name](folder / "model")


OTHER: dict[str, tuple[int, Callable[[Path], Path], Use]] = {
    "tensors of an adapter": (500, adapter_tensors, use),
    "a configuration of open_clip": (60, library("open_clip"), build),
    "a configuration of transformers": (60, library("transformers"), build),
    "a configuration of timm": (40, library("timm"), build),
    "a tokenizer": (60, tokenizer, encode),
    "settings of a tokenizer": (60, tokenizer_config, encode),
    "settings of a processor": (60, processor_config, prepare),
    "merges": (40, merges, encode),
    **{f"{kind} picture": (150, picture(kind), show) for kind in ("PNG", "JPEG", "GIF", "BMP")},
    **{f"{kind} picture": (100, picture(kind), show) for kind in ("WEBP", "TIFF", "TGA", "PPM")},
}
"""Kind of file -> the number of its mutants, a function that writes a sound one, its use."""


@pytest.mark.parametrize("kind", OTHER)
def test_mutants(kind: str, tmp_path: Path) -> None:
    count, make, use_kind = OTHER[kind]
    path = make(tmp_path)

    def write(data: bytes) -> Path:
        path.unlink()
        path.write_bytes(data)
        return path

    fuzz(kind, count, path.read_bytes(), write, use_kind)


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_picture_of_too_many_pixels(tmp_path: Path) -> None:
    """A short file that claims very many pixels is refused before they are decoded."""
    Image.new("1", (11_000, 11_000)).save(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size < 100_000
    with pytest.raises(WeightopsError, match="x has 121,000,000 pixels, more than"):
        read_image(tmp_path / "x.png", "x")
