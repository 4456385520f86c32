"""Explorations: the numbers, one measurement at a time, who is let in, and the page."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.browser import browser, needs_chromium
from helpers.interrupts import heed_interrupts
from PIL import Image

from weightops import Recipe, TaskVector, evaluate
from weightops.cli.main import run
from weightops.errors import OptionError, OutputError
from weightops.workflows.explore import Explorer
from weightops.workflows.explore_server import Server, serving

NAMES = ("swapped", "turned")


def arguments(own: Path) -> tuple[Path, list[Path], list[str]]:
    vectors = [own / f"{name}.safetensors" for name in NAMES]
    return own / "model", vectors, [str(own / name) for name in (*NAMES, "plain")]


@pytest.fixture
def server(own: Path, tmp_path: Path) -> Iterator[Server]:
    out = tmp_path / "recipe.yaml"
    with serving(*arguments(own), out, device="cpu", precision="float32") as server:
        yield server


def ask(
    server: Server,
    path: str,
    body: bytes | None = None,
    *,
    token: str | None = None,
    **headers: str,
) -> tuple[int, Any]:
    """Send a request and return its status and content."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    address = f"/{server.token if token is None else token}/{path}"
    connection.request("GET" if body is None else "POST", address, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status, json.loads(content) if is_json else content


def settled(explorer: Explorer, alpha: list[float]) -> dict[str, Any]:
    """Return what is known in the end of an edit."""
    version, end = -1, time.monotonic() + 60
    while time.monotonic() < end:
        state = explorer.state(version, 5.0)
        version = state["version"]
        if state["done"] and state["alpha"] == alpha:
            return state
    raise AssertionError(state)


def test_the_numbers_are_those_of_the_edit(own: Path, server: Server) -> None:
    model, _, tasks = arguments(own)
    assert ask(server, "move", b"[0.5, -0.25]") == (200, {})
    state = settled(server.explorer, [0.5, -0.25])
    vectors = [TaskVector.load(own / f"{name}.safetensors") for name in NAMES]
    edited = (0.5 * vectors[0] - 0.25 * vectors[1]).apply(model)
    for task, told in zip(tasks, state["tasks"], strict=True):
        scores, base = (
            next(iter(evaluate(m, task, split="validation", device="cpu").values()))
            for m in (edited, model)
        )
        assert told["images"] == told["of"] == scores["n"]
        assert (told["accuracy"], told["base"]) == (scores["acc1"], base["acc1"])
        gained = round((scores["acc1"] - base["acc1"]) * scores["n"])
        assert told["fixed"] - told["broken"] == gained
        assert len(told["fixed_pictures"]) == min(told["fixed"], 6)
        for picture in told["fixed_pictures"]:
            assert picture["after"] == picture["truth"] != picture["before"]


def test_the_first_look_is_short_and_a_move_ends_it(own: Path) -> None:
    model, vectors, tasks = arguments(own)
    explorer = Explorer(model, vectors, tasks[:1], images=8, device="cpu", precision="float32")
    glimpses = explorer._glimpses
    order = glimpses.orders["swapped"]
    glimpses.orders["swapped"] = order.repeat(40)  # as if there were many images
    seen = [len(g["swapped"]) for g in glimpses.look((0.5, 0.0), lambda: True)]
    assert seen == [16, 64, 256, 320]
    before = glimpses.session.samples_measured
    assert before == 320
    turns = iter([True, True, False])
    seen = [len(g["swapped"]) for g in glimpses.look((0.3, 0.0), lambda: next(turns))]
    assert seen == [16, 64]
    assert glimpses.session.samples_measured == before + 64
    seen = [len(g["swapped"]) for g in glimpses.look((0.3, 0.0), lambda: True)]
    assert seen == [64, 256, 320]  # it goes on where it ended


def test_many_moves_measure_the_last_and_one_at_a_time(server: Server) -> None:
    explorer = server.explorer
    names = {t.name for t in threading.enumerate()}
    for i in range(200):
        assert ask(server, "move", json.dumps([i / 200, 0.0]).encode())[0] == 200
    state = settled(explorer, [199 / 200, 0.0])
    assert state["alpha"] == [199 / 200, 0.0]
    assert {t.name for t in threading.enumerate()} == names
    session = explorer._glimpses.session
    every = sum(len(order) for order in explorer._glimpses.orders.values())
    assert session.samples_measured <= 201 * every


def test_a_vector_of_another_base_is_told_once(
    own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, vectors, tasks = arguments(own)
    with serving("embedded", vectors[:1], tasks[2:], tmp_path / "r.yaml", device="cpu") as server:
        for alpha in (0.1, 0.2):
            server.explorer.move([alpha])
            settled(server.explorer, [alpha])
    told = [record for record in caplog.records if "was made from" in record.getMessage()]
    assert len(told) == 1


def test_strangers_are_refused(server: Server) -> None:
    host = server.origin.removeprefix("http://")
    other = {"Host": "evil.example", "Origin": server.origin}
    assert ask(server, "", token="")[0] == 403
    assert ask(server, "", token="x" * len(server.token))[0] == 403
    assert ask(server, "", **other)[0] == 403
    assert ask(server, "", Host=f"localhost:{server.server_address[1]}")[0] == 403
    for origin in ("http://evil.example", "null", f"http://localhost:{host}"):
        assert ask(server, "move", b"[1, 1]", Origin=origin)[0] == 403
    assert server.explorer.state()["version"] >= 0
    assert ask(server, "", Origin=server.origin)[0] == 200
    assert ask(server, "nothing")[0] == 404
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("move", b"[1]", "2 coefficients"),
        ("move", b"[1, NaN]", "2 coefficients"),
        ("move", b'["a", 1]', "could not convert"),
        ("move", b"{", "Expecting"),
        ("picture", b"no picture", "not an image"),
        ("recipe", b"", "all coefficients are 0"),
        ("picture/9/0", None, "index"),
        ("picture/0/100000", None, "100000"),
        ("state?seen=x", None, "invalid literal"),
    ],
)
def test_odd_requests_are_answered(
    server: Server, path: str, body: bytes | None, said: str
) -> None:
    status, answer = ask(server, path, body)
    assert status == 400
    assert said in answer["error"]


def test_the_recipe_makes_the_same_weights(own: Path, server: Server) -> None:
    ask(server, "move", b"[0.5, -0.25]")
    status, answer = ask(server, "recipe", b"")
    assert status == 200
    assert server.recipe.read_text() == answer["text"]
    merged = Recipe.read(server.recipe).merge().state_dict()
    vectors = [TaskVector.load(own / f"{name}.safetensors") for name in NAMES]
    expected = (0.5 * vectors[0] - 0.25 * vectors[1]).apply(own / "model").state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    ask(server, "move", b"[1, 0]")
    assert ask(server, "recipe", b"")[0] == 200  # its own file is replaced
    assert "turned" not in server.recipe.read_text()


def test_own_pictures(server: Server) -> None:
    picture = server.explorer.picture(2, 0)
    content = io.BytesIO()
    picture.save(content, "PNG")
    for i in range(8):
        assert ask(server, "picture", content.getvalue(), **{"X-Name": f"mine {i}"})[0] == 200
    state = settled(server.explorer, [0.0, 0.0])
    while len(state["own"]) < 6 or state["own"][-1]["name"] != "mine 7":
        state = server.explorer.state(state["version"], 5.0)
    assert [entry["name"] for entry in state["own"]] == [f"mine {i}" for i in range(2, 8)]
    guesses = {g["task"]: g["guess"] for g in state["own"][0]["guesses"]}
    assert guesses.keys() == {"swapped", "turned", "plain"}
    plain = server.explorer.tasks[2]
    label = plain.classes[int(plain.load("validation").labels[0])]
    assert guesses["plain"] == label  # the base is right about all of them
    status, shown = ask(server, "picture/2/0")
    assert (status, shown[:4]) == (200, b"RIFF")
    assert Image.open(io.BytesIO(shown)).format == "WEBP"


def test_what_is_refused_at_the_start(own: Path, tmp_path: Path) -> None:
    model, vectors, tasks = arguments(own)
    (tmp_path / "there.yaml").write_text("mine")
    with (
        pytest.raises(OutputError, match=r"there.yaml exists"),
        serving(model, vectors, tasks, tmp_path / "there.yaml"),
    ):
        pass
    with pytest.raises(OptionError, match="a vector and a task"), serving(model, [], tasks):
        pass
    assert run(["explore", str(model), "--tasks", tasks[0]]) == 2


def test_the_command(own: Path, tmp_path: Path) -> None:
    model, vectors, tasks = arguments(own)
    named = [str(model), "--vectors", *map(str, vectors), "--tasks", ",".join(tasks)]
    command = [sys.executable, "-m", "weightops", "explore", *named, "--device", "cpu", "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=heed_interrupts,
    )
    assert process.stdout is not None
    record = "".join(iter(process.stdout.readline, "}\n")) + "}"
    address = json.loads(record)["address"]
    _, _, host, token, _ = address.split("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", f"/{token}/")
    page = connection.getresponse().read().decode()
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert page.count('type="range"') == 2
    assert not list(tmp_path.iterdir())


@needs_chromium
def test_in_a_browser(server: Server, tmp_path: Path) -> None:
    status = "document.getElementById('status').textContent"
    with browser(tmp_path) as tab:
        tab.open(server.address)
        assert "fixed" in tab.until(f"{status}.includes('fixed') && {status}")
        tab.run("document.getElementById('a0').focus()")
        for _ in range(10):
            tab.press("ArrowRight")
        said = tab.until(f"{status}.startsWith('swapped 0.5, ') && {status}")
        told = settled(server.explorer, [0.5, 0.0])["tasks"][0]
        said = tab.until(f"{status}.includes('fixed') && {status}")
        assert f"swapped {100 * told['accuracy']:.1f} % of {told['images']} images" in said
        assert f"{told['fixed']} fixed, {told['broken']} broken" in said
        assert tab.run("document.getElementById('a0').getAttribute('aria-valuetext')") == (
            "alpha 0.5 of swapped"
        )
        shown = "[...document.querySelectorAll('#changed img')]"
        assert tab.until(f"{shown}.length && {shown}.every(i => i.naturalWidth && i.alt)")
        tab.run("document.getElementById('write').click()")
        assert "weight: 0.5" in tab.until("document.getElementById('written').innerText")
        assert "weight: 0.5" in server.recipe.read_text()
        tab.run(DROP)
        own = "document.getElementById('own').innerText"
        assert "mine é.png" in tab.until(own)
        for width, dark in ((390, True), (640, False), (1280, False)):
            tab.open(server.address, width, dark=dark)
            tab.until(f"{status}.includes('fixed')")
            assert tab.overflow <= 0
        assert tab.problems == []


DROP = """(async () => {
  const canvas = Object.assign(document.createElement('canvas'), { width: 60, height: 60 });
  canvas.getContext('2d').fillRect(10, 10, 40, 40);
  const blob = await new Promise(done => canvas.toBlob(done)), data = new DataTransfer();
  data.items.add(new File([blob], 'mine é.png', { type: 'image/png' }));
  const dropped = { dataTransfer: data, bubbles: true, cancelable: true };
  document.getElementById('drop').dispatchEvent(new DragEvent('drop', dropped));
})()"""
"""Drops a picture on the page, as a hand does."""


@pytest.mark.parametrize(
    ("kind", "fact"),
    [("text", "words.txt is a text, and"), ("program", "sums is scored by a program, and")],
)
def test_only_images_are_explored(own: Path, tmp_path: Path, kind: str, fact: str) -> None:
    (tmp_path / "words.txt").write_text("a line\n" * 200)
    task = str(tmp_path / "words.txt") if kind == "text" else "score=true:sums"
    model, vectors, _ = arguments(own)
    with pytest.raises(OptionError, match=f"{fact} images are explored"):
        Explorer(model, vectors, [task], images=8, device="cpu", precision="float32")


def test_the_recipe_has_the_name_of_one(own: Path, tmp_path: Path) -> None:
    model, vectors, tasks = arguments(own)
    with (
        pytest.raises(OptionError, match=r"bad\.txt isn't a recipe's name"),
        serving(model, vectors, tasks, tmp_path / "bad.txt"),
    ):
        pass
