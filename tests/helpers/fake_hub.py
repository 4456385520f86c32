"""A local server that answers like the Hugging Face Hub, with the repository ``org/tiny``."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from helpers.hub_cache import COMMIT


class FakeHub(BaseHTTPRequestHandler):
    """The part of the Hub's API that fetching and pushing take."""

    files: ClassVar[dict[str, bytes]] = {}
    uploaded: ClassVar[dict[str, bytes]] = {}

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

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        answer: dict[str, Any] = {}
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
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": name, **modes} for name in names]}
        elif path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        content = json.dumps(answer).encode()
        self.send_response(200 if answer else 403)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def fake_hub(files: dict[str, bytes]) -> Iterator[dict[str, str]]:
    """Serve files as ``org/tiny``; give the environment that points huggingface_hub there."""
    FakeHub.files = files
    FakeHub.uploaded.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    server.shutdown()
    server.server_close()
