"""Refs: the Hub through its cache, offline and over HTTP; open_clip's and timm's pretrained models; folders of transformers."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers.hub_cache import COMMIT, python, repository
from safetensors.torch import save_file
from torch import nn

from weightops.checkpoints.refs import _wanted


def weights(state: dict[str, torch.Tensor], folder: Path) -> bytes:
    save_file({n: t.clone().contiguous() for n, t in state.items()}, folder / "w.safetensors")
    return (folder / "w.safetensors").read_bytes()


OFFLINE = """
import json, sys, torch
from weightops import TaskVector, evaluate, open_checkpoint
from weightops.cli.main import run
from weightops.errors import WeightopsError

def told(ref):
    try:
        open_checkpoint(ref)
    except WeightopsError as error:
        return str(error)

commit = sys.argv[0] or None
hub = open_checkpoint("org/tiny")
tag = open_checkpoint("open_clip:RN50/openai")
quick = open_checkpoint("open_clip:ViT-B-32/openai")
timm = open_checkpoint("timm:test_vit.r160_in1k")
with torch.no_grad():
    logits = timm.model()(timm.preprocess()(__import__("PIL.Image").Image.new("RGB", (50, 40)))[None])
timm.save("timm")
import timm as library
again = library.create_model("local-dir:timm", pretrained=True).eval()
facts = {
    "ref": hub.ref,
    "file": open_checkpoint("org/tiny:pytorch_model.bin").ref,
    "revision": open_checkpoint("org/tiny@main").ref,
    "norm": TaskVector("org/tiny", "org/tiny@main").norm(),
    "same": bool(torch.equal(hub["weight"], open_checkpoint("org/tiny:pytorch_model.bin")["weight"])),
    "sharded": list(open_checkpoint("org/sharded")),
    "quick": quick.architecture.config["model_cfg"]["quick_gelu"],
    "quick_ref": quick.ref,
    "timm": [timm.ref, list(logits.shape)],
    "timm_again": all(torch.equal(tensor, timm[name]) for name, tensor in again.state_dict().items()),
    "absent": told("org/absent"),
    "no_file": told("org/tiny:absent.bin"),
    "mistyped": told("out/model.safetensors"),
    "unknown": told("open_clip:ViT-B-32/opnai"),
    "unknown_timm": told("timm:vit_tiny_patch16_225"),
    "inspect": run(["inspect", "org/tiny", "--no-tensors"]),
}
print(json.dumps(facts))
"""


def test_offline_from_the_cache(tmp_path: Path) -> None:
    import timm

    hub = tmp_path / "home" / "hub"
    state = nn.Linear(2, 3).state_dict()
    torch.save(state, tmp_path / "w.bin")
    repository(
        hub,
        "org/tiny",
        {
            "model.safetensors": weights(state, tmp_path),
            "pytorch_model.bin": (tmp_path / "w.bin").read_bytes(),
        },
    )
    index = json.dumps(
        {"weight_map": {"weight": "pytorch_model-1.bin", "bias": "pytorch_model-2.bin"}}
    ).encode()
    shards = {}
    for i, name in enumerate(("weight", "bias")):
        torch.save({name: state[name]}, tmp_path / "shard")
        shards[f"pytorch_model-{i + 1}.bin"] = (tmp_path / "shard").read_bytes()
    repository(hub, "org/sharded", {"pytorch_model.bin.index.json": index, **shards})
    small = {"open_clip_model.safetensors": weights(state, tmp_path)}
    repository(hub, "timm/resnet50_clip.openai", small)
    repository(hub, "timm/vit_base_patch32_clip_224.openai", small)
    vit = timm.create_model("test_vit", pretrained=False)
    config = {
        "architecture": "test_vit",
        "num_classes": 1000,
        "pretrained_cfg": {
            "input_size": [3, 160, 160],
            "fixed_input_size": True,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
    }
    repository(
        hub,
        "timm/test_vit.r160_in1k",
        {
            "model.safetensors": weights(vit.state_dict(), tmp_path),
            "config.json": json.dumps(config).encode(),
        },
    )
    (tmp_path / "work").mkdir()
    code = f"import os; os.chdir({str(tmp_path / 'work')!r})\n" + OFFLINE
    facts = json.loads(
        python(code, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1").splitlines()[-1]
    )
    assert facts["ref"] == facts["revision"] == f"org/tiny@{COMMIT}"
    assert facts["file"] == f"org/tiny@{COMMIT}:pytorch_model.bin"
    assert facts["norm"] == 0
    assert facts["same"]
    assert facts["sharded"] == ["weight", "bias"]
    assert facts["quick"] is True
    assert facts["quick_ref"] == "open_clip:ViT-B-32/openai"
    assert facts["timm"] == ["timm:test_vit.r160_in1k", [1, 1000]]
    assert facts["timm_again"]
    assert facts["absent"].startswith(
        "org/absent is not a local path, and can't be fetched from the Hugging Face Hub: "
    )
    assert "\n" not in facts["absent"] + facts["no_file"]
    assert facts["mistyped"].startswith("there is no file or folder out/model.safetensors")
    assert "did you mean ViT-B-32/openai" in facts["unknown"]
    assert "or vit_tiny_patch16_224" in facts["unknown_timm"]
    assert facts["inspect"] == 0


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as fetching a file takes."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        entries = [
            {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for n, c in self.files.items()
        ]
        info = {
            "id": "org/tiny",
            "sha": COMMIT,
            "siblings": [{"rfilename": name} for name in self.files],
        }
        name = path.rpartition("/")[2]
        status, content = 404, b'{"error": "Repository not found"}'
        if path.startswith("/api/models/org/tiny/tree"):
            status, content = 200, json.dumps(entries).encode()
        elif path.startswith("/api/models/org/tiny"):
            status, content = 200, json.dumps(info).encode()
        elif path.startswith("/org/tiny/resolve") and name in self.files:
            status, content = 200, self.files[name]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if body:
            self.wfile.write(content)

    uploaded: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/mine/commit") or path == "/api/repos/create":
            answer = {
                "url": "https://huggingface.co/org/mine",
                "commitUrl": f"https://huggingface.co/org/mine/commit/{COMMIT}",
                "commitOid": COMMIT,
            }
            for line in body.splitlines() if "commit" in path else ():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.uploaded[entry["value"]["path"]] = base64.b64decode(
                        entry["value"]["content"]
                    )
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {
                "files": [
                    {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
                ]
            }  # type: ignore[dict-item]
        elif path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}  # type: ignore[dict-item]
        else:
            answer = {}
        content = json.dumps(answer).encode()
        self.send_response(200 if answer else 403)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    state = nn.Linear(2, 3).state_dict()
    torch.save(state, tmp_path / "w.bin")
    pickled = (tmp_path / "w.bin").read_bytes()
    Hub.files = {
        "model.safetensors": weights(state, tmp_path),
        "pytorch_model.bin": pickled,
        "config.json": b'{"model_type": "linear"}',
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


ONLINE = """
from weightops import open_checkpoint
from weightops.errors import WeightopsError
checkpoint = open_checkpoint("org/tiny")
print(checkpoint.ref, len(checkpoint), type(checkpoint.architecture).__name__)
try:
    open_checkpoint("org/absent")
except WeightopsError as error:
    print(error)
"""


def test_over_http(endpoint: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    told = python(
        ONLINE,
        HF_HOME=str(home),
        HF_ENDPOINT=endpoint,
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        NO_PROXY="127.0.0.1",
    ).splitlines()
    assert told[0] == f"org/tiny@{COMMIT} 2 TransformersArchitecture"
    assert told[1].startswith(
        "org/absent is not a local path, and can't be fetched from the Hugging Face Hub: "
    )
    fetched = {path.name for path in (home / "hub").rglob("snapshots/*/*")}
    assert fetched == {"model.safetensors", "config.json"}  # and not the weights a second time
    again = python(
        ONLINE, HF_HOME=str(home), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1"
    ).splitlines()
    assert again[0] == told[0]


PUSH = """
import pathlib, torch
from weightops import open_checkpoint
from weightops.cli.main import run
open_checkpoint({"w": torch.ones(2)}).save("edited")
assert run(["push", "edited", "org/mine"]) == 1  # without a card
pathlib.Path("edited/README.md").write_text("---\\ntags: [merge]\\n---\\n")
assert run(["push", "edited", "org/mine", "--dry-run"]) == 0
print("---")
assert run(["push", "edited", "org/mine"]) == 0
assert run(["push", "edited", "other/mine"]) == 1
assert run(["merge", "edited", "edited", "-o", "merged", "--push", "org/mine"]) == 0
assert run(["merge", "edited", "edited", "-o", "merged.safetensors", "--push", "org/mine"]) == 2
"""


def test_pushing(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    code = f"import os; os.chdir({str(tmp_path / 'work')!r})\n" + PUSH
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    told, _, done = python(
        code, HF_HOME=str(tmp_path / "home"), HF_TOKEN="hf_none", **settings
    ).partition("---")
    assert "would be pushed to org/mine" in told
    assert "pushed to http" in done
    assert set(Hub.uploaded) == {"README.md", "model.safetensors"}
    assert (
        Hub.uploaded["model.safetensors"]
        == (tmp_path / "work" / "merged" / "model.safetensors").read_bytes()
    )
    assert b"# linear of 2 checkpoints" in Hub.uploaded["README.md"]


def test_what_is_fetched() -> None:
    known = (
        "open_clip_model.safetensors",
        "model.safetensors.index.json",
        "model.safetensors",
        "pytorch_model.bin",
    )
    assert _wanted(["model.safetensors", "pytorch_model.bin"], known)[-1] == "model.safetensors"
    assert (
        _wanted(
            ["model.safetensors.index.json", "model-00001-of-2.safetensors", "pytorch_model.bin"],
            known,
        )[-1]
        == "model-*.safetensors"
    )
    assert "adapter_model.*" in _wanted(
        ["adapter_config.json", "adapter_model.bin"], (*known, "adapter_config.json")
    )
    assert _wanted(["a.pt", "b.onnx"], known)[-4:] == ["*.bin", "*.pt", "*.pth", "*.ckpt"]
