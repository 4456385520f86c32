"""Prepared pictures in the cache: one decoding for passes, runs and processes; kills and limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose

from weightops import ImageModel, evaluate
from weightops.cli.main import run
from weightops.errors import TaskError
from weightops.evaluation import pixels as module
from weightops.evaluation.pixels import Pixels
from weightops.support.cache import cache_dir, entries
from weightops.tasks.folder import FolderImages, folder_task
from weightops.tasks.task import ImageSubset


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTOPS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5), ("test", 6)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                waves = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
                picture = Image.fromarray(waves).resize((61, 47), Image.Resampling.BICUBIC)
                picture.save(folder / f"{i}.jpg")
    return tmp_path / "photos"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that are read from their files."""
    names: list[str] = []
    original = FolderImages.__getitem__

    def read(self: FolderImages, index: int) -> Image.Image:
        names.append(str(self.files[index]))
        return original(self, index)

    monkeypatch.setattr(FolderImages, "__getitem__", read)
    return names


def test_passes_and_models_share_one_decoding(photos: Path, decoded: list[str]) -> None:
    model = ImageModel.open("embedded", "cpu")
    fresh = torch.stack([model.preprocess(folder_task(photos).load("test")[i]) for i in range(12)])
    decoded.clear()
    for _ in range(3):
        opened = ImageModel.open("embedded", "cpu").pixels(folder_task(photos), "test")
        opened.prepare()
        order = np.array([11, 0, 3, 3])
        assert torch.equal(opened.batch(order), fresh[torch.from_numpy(order)])
        assert torch.equal(opened.batch(np.arange(12)), fresh)
        assert opened.kept_bytes == 0
    assert len(set(decoded)) == 12
    assert len(decoded) == 12 + 2  # the first one again, to see that libraries still agree


def test_another_preparation_or_file_is_another_table(photos: Path) -> None:
    first = evaluate("embedded", str(photos), device="cpu")
    assert len(entries()) == 2  # pictures, and the head
    picture = photos / "test" / "cat" / "0.jpg"
    Image.new("RGB", (61, 47), (200, 10, 10)).save(picture)
    images = folder_task(photos).load("test")
    pixels = Pixels(images, ImageModel.open("embedded", "cpu").preprocess, 0)
    place = list(images.files).index(picture)
    assert pixels.batch(np.array([place]))[0, 0].std() < 0.05
    preprocess = ImageModel.open("embedded", "cpu").preprocess
    smaller = Pixels(
        images, Compose([type(preprocess.transforms[0])(16), *preprocess.transforms]), 0
    )
    smaller.prepare()
    assert first["photos"]["n"] == 12
    subset = ImageSubset(images, np.array([3, 1]), images.labels[[3, 1]])
    assert torch.equal(
        Pixels(subset, preprocess, 0).batch(np.array([0])), pixels.batch(np.array([3]))
    )


def test_what_libraries_prepare_otherwise_is_discarded(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ImageModel.open("embedded", "cpu")
    images = folder_task(photos).load("test")
    pixels = Pixels(images, model.preprocess, 0)
    pixels.prepare()
    right = pixels.batch(np.arange(12))
    table = pixels._kept
    table.rows[0] += 1  # as if another version had written them all
    table._marks[0] = crc32(table.rows[0].tobytes())
    again = Pixels(images, model.preprocess, 0)
    assert torch.equal(again.batch(np.arange(12)), right)


def test_rows_that_are_half_written_are_prepared_again(photos: Path) -> None:
    model = ImageModel.open("embedded", "cpu")
    images = folder_task(photos).load("test")
    pixels = Pixels(images, model.preprocess, 0)
    pixels.prepare()
    right = pixels.batch(np.arange(12))
    (rows,) = cache_dir().glob("pictures/*/rows.bin")
    content = bytearray(rows.read_bytes())
    size = len(content) // 12
    content[5 * size + 7 : 6 * size] = bytes(size - 7)  # lost by a crash of the system
    with open(rows, "r+b") as file:
        file.write(content)
    assert torch.equal(Pixels(images, model.preprocess, 0).batch(np.arange(12)), right)


def test_without_room_nothing_is_kept(
    photos: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ImageModel.open("embedded", "cpu")
    images = folder_task(photos).load("test")
    expected = Pixels(images, model.preprocess, 0).batch(np.arange(12))
    for limit, name in (("0", "cache2"), ("1000", "cache3")):
        monkeypatch.setenv("WEIGHTOPS_CACHE_LIMIT", limit)
        monkeypatch.setenv("WEIGHTOPS_CACHE", str(photos.parent / name))
        pixels = Pixels(images, model.preprocess, 1 << 30)
        assert pixels.kept_bytes == 12 * 3 * 32 * 32
        assert torch.equal(pixels.batch(np.arange(12)), expected)
        assert not list((photos.parent / name).glob("pictures/*"))
    monkeypatch.setattr(module, "_on_disk", lambda shape: None)
    decoded.clear()
    unkept = Pixels(images, model.preprocess, 0)
    for _ in range(2):
        assert torch.equal(unkept.batch(np.arange(12)), expected)
    assert len(decoded) == 25


def test_the_limit_removes_what_was_used_longest_ago(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ImageModel.open("embedded", "cpu")
    task = folder_task(photos)
    for age, split in ((300, "train"), (200, "validation")):
        Pixels(task.load(split), model.preprocess, 0, split).prepare()
        newest = max(cache_dir().glob("pictures/*/about.json"), key=lambda p: p.stat().st_mtime)
        os.utime(newest, (time.time() - age,) * 2)
    sizes = {entry.about["pictures"]: entry.size for entry in entries()}
    monkeypatch.setenv("WEIGHTOPS_CACHE_LIMIT", str(sum(sizes.values())))
    Pixels(task.load("test"), model.preprocess, 0, "test").prepare()
    assert {e.about["pictures"] for e in entries()} == {"validation", "test"}
    held = Pixels(task.load("validation"), model.preprocess, 0, "validation")
    os.utime(
        next(e.path for e in entries() if e.about["pictures"] == "validation") / "about.json",
        (0, 0),
    )
    Pixels(task.load("train"), model.preprocess, 1 << 20, "train").prepare()
    left = {e.about["pictures"] for e in entries()}
    assert "validation" in left  # it is in use
    assert len(held) == 10


def test_all_faults_are_told_at_once(photos: Path, tmp_path: Path) -> None:
    for name in ("0.jpg", "3.jpg"):
        (photos / "test" / "cat" / name).write_bytes(b"no picture")
    with pytest.raises(TaskError, match=r"2 of 12 pictures of photos test can't be read: .*0\.jpg"):
        evaluate("embedded", str(photos), device="cpu")
    pixels = ImageModel.open("embedded", "cpu").pixels(folder_task(photos), "test")
    assert len(pixels.batch(np.array([1, 2]))) == 2  # the others
    with pytest.raises(TaskError, match="2 of 12"):
        pixels.batch(np.array([0, 1, 3]))


SCRIPT = """
import sys, time
from weightops import ImageModel
from weightops.tasks.folder import FolderImages, folder_task
original = FolderImages.__getitem__
count = 0
def read(self, index):
    global count
    count += 1
    if len(sys.argv) > 2:
        time.sleep(float(sys.argv[2]))
    return original(self, index)
FolderImages.__getitem__ = read
model = ImageModel.open("embedded", "cpu")
pixels = model.pixels(folder_task(__import__("pathlib").Path(sys.argv[1])), "train")
print("opened", flush=True)
pixels.prepare()
import numpy as np
print(count, float(pixels.batch(np.arange(len(pixels))).double().sum()), flush=True)
"""


def test_processes_share_and_outlive_kills(photos: Path) -> None:
    def start(*delay: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(photos), *delay]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    killed = start("0.15")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "opened\n"
    time.sleep(0.6)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    together = [start("0.05"), start("0.05")]
    outputs = [process.communicate(timeout=100)[0].split() for process in together]
    counts = [int(output[1]) for output in outputs]
    assert outputs[0][2] == outputs[1][2]
    assert sum(counts) <= 16 + 2  # one of them prepares, the other waits; each looks at the first
    assert not list(cache_dir().glob("pictures/.*"))


def test_the_cache_on_the_command_line(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "embedded", "--tasks", str(photos)]) == 0
    capsys.readouterr()
    assert run(["cache"]) == 0
    printed = capsys.readouterr().out
    assert "photos test" in printed
    assert "heads" in printed
    (name,) = [entry.name for entry in entries() if entry.about]
    assert run(["cache", "remove", name]) == 0
    assert [entry.name for entry in entries()] == ["heads"]
    assert run(["cache", "remove", "nothing"]) == 2
    assert run(["evaluate", "embedded", "--tasks", str(photos), "--cache-limit", "0GB"]) == 0
    assert [entry.name for entry in entries()] == ["heads"]
    assert run(["cache", "remove", "all"]) == 0
    assert entries() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_normalised_on_the_device(photos: Path) -> None:
    model = ImageModel.open("embedded", "cpu")
    images = folder_task(photos).load("test")
    expected = Pixels(images, model.preprocess, 0).batch(np.arange(12))
    found = Pixels(images, model.preprocess, 0, device=torch.device("cuda")).batch(np.arange(12))
    assert found.device.type == "cuda"
    assert torch.allclose(found.cpu(), expected, atol=1e-6)
