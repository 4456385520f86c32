"""Serve an exploration on this machine: a page, and what it asks for.

Python's own server is enough for one person at one machine, and brings no dependency. It listens on
127.0.0.1, answers only addresses that hold its token, and refuses requests from other pages
(Origin) and under other names of this machine (Host), through which a page could reach it.
"""

from __future__ import annotations

import hmac
import io
import json
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, unquote, urlsplit

from weightops.algebra.precision import Precision
from weightops.checkpoints.opening import CheckpointLike
from weightops.errors import OptionError, WeightopsError
from weightops.reports.changed_images import thumbnail
from weightops.reports.page import json_in_page, part, template
from weightops.support.arguments import check_arguments
from weightops.support.atomic import atomic_output, check_free
from weightops.support.ranges import Range
from weightops.tasks.pictures import read_image
from weightops.tasks.table import TaskList
from weightops.workflows.explore import Explorer

_MOST_BYTES = 20_000_000
"""The largest body of a request."""

_WAIT = 20.0
"""Seconds that a page waits for news before it asks again."""

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; "
    "img-src 'self' blob: data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Server(ThreadingHTTPServer):
    """The server of one exploration.

    Args:
        explorer: the exploration.
        recipe: the file that the button writes.
        port: the port; 0 for any that is free.
        overwrite: replace a recipe that exists from before.
    """

    daemon_threads = True
    request_queue_size = 32

    def __init__(
        self, explorer: Explorer, recipe: Path, *, port: int = 0, overwrite: bool = False
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.explorer, self.recipe, self.overwrite = explorer, recipe, overwrite
        self.token = secrets.token_urlsafe(16)
        self.origin = f"http://127.0.0.1:{self.server_address[1]}"
        self.page = template("explore.html").render(
            names=explorer.names,
            recipe=recipe.name,
            style=part("page.css"),
            script=part("explore.js"),
            data=json_in_page({"names": explorer.names}),
        )

    @property
    def address(self) -> str:
        """The address of the page, with the token."""
        return f"{self.origin}/{self.token}/"

    def write_recipe(self) -> dict[str, str]:
        """Write the recipe of the wanted edit; return its text and the command that runs it."""
        text = self.explorer.recipe.to_yaml()
        with atomic_output(self.recipe, overwrite=self.overwrite) as file:
            file.write_text(text, encoding="utf-8")
        self.overwrite = True  # from now on it is our own
        return {"text": text, "command": f"weightops merge {self.recipe} -o edited"}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a page that has gone."""


@contextmanager
def serving(
    model: CheckpointLike,
    vectors: Sequence[str | Path],
    tasks: TaskList,
    out: str | Path = "recipe.yaml",
    *,
    images: Annotated[int, Range(min=1)] = 512,
    port: Annotated[int, Range(min=0, max=65535)] = 0,
    device: str = "auto",
    precision: Precision = "auto",
    overwrite: bool = False,
) -> Iterator[Server]:
    """Serve a page with a slider for each vector, and measure, until the end of the block.

    Args:
        model: a path to a model with its configuration, or a ref.
        vectors: paths of task vectors, or of fine-tuned weights.
        tasks: what to measure on: validation images.
        out: the recipe that a button of the page writes.
        images: the most images of each task; the first look takes a few of them.
        port: the port on 127.0.0.1; 0 for any that is free.
        device: where to compute: auto, cpu, cuda, cuda:1, ...
        precision: what the model is run in: float32, bfloat16, or auto: bfloat16 where the
            processor computes in it, else float32.
        overwrite: replace a recipe that exists.

    Raises:
        OptionError: without vectors or tasks, or for another name than a recipe's.
        OutputError: if the recipe exists.
    """
    check_arguments(serving, images=images, port=port)
    recipe = Path(out)
    if recipe.suffix not in (".yaml", ".yml"):
        raise OptionError(f"{recipe} isn't a recipe's name", hint="it ends in .yaml")
    check_free(recipe, overwrite=overwrite)
    explorer = Explorer(model, vectors, tasks, images=images, device=device, precision=precision)
    with Server(explorer, recipe, port=port, overwrite=overwrite) as server:
        both = (explorer.work, server.serve_forever)
        threads = [threading.Thread(target=do, daemon=True) for do in both]
        for thread in threads:
            thread.start()
        try:
            yield server
        finally:
            explorer.close()
            server.shutdown()
            for thread in threads:
                thread.join()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    server_version, sys_version = "weightops", ""
    timeout = 60

    def do_GET(self) -> None:
        """Answer with the page, the news or a picture."""
        path = self._allowed_path()
        if path == "":
            self._answer(200, "text/html; charset=utf-8", self.server.page.encode())
        elif path == "state":
            seen = parse_qs(urlsplit(self.path).query).get("seen", ["-1"])[0]
            with self._told_errors():
                self._answer_json(self.server.explorer.state(int(seen), _WAIT))
        elif path is not None and path.startswith("picture/"):
            with self._told_errors():
                task, index = map(int, path.split("/")[1:])
                self._answer(
                    200, "image/webp", thumbnail(self.server.explorer.picture(task, index))
                )
        elif path is not None:
            self._answer(404, "text/plain", b"not found")

    def do_POST(self) -> None:
        """Move, take a picture, or write the recipe."""
        path = self._allowed_path()
        if path is None:
            return
        with self._told_errors():
            body = self._body()
            if path == "move":
                self.server.explorer.move(json.loads(body))
                self._answer_json({})
            elif path == "picture":
                name = unquote(self.headers.get("X-Name", "picture"))[:80]
                picture = read_image(io.BytesIO(body), name)
                self._answer_json({"id": self.server.explorer.add_picture(name, picture)})
            elif path == "recipe":
                self._answer_json(self.server.write_recipe())
            else:
                self._answer(404, "text/plain", b"not found")

    def _allowed_path(self) -> str | None:
        """Return what is asked for under the token; refuse strangers, and return None."""
        _, token, *rest = urlsplit(self.path).path.split("/")
        host = self.server.origin.removeprefix("http://")
        origin = self.headers.get("Origin", self.server.origin)
        known = hmac.compare_digest(token.encode(), self.server.token.encode())
        if known and rest and origin == self.server.origin and self.headers.get("Host") == host:
            return "/".join(rest)
        self.close_connection = True
        self._answer(403, "text/plain", b"use the address that weightops printed")
        return None

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        if not 0 <= length <= _MOST_BYTES:
            self.close_connection = True
            raise ValueError(f"more than {_MOST_BYTES / 1e6:g} MB")
        return self.rfile.read(length)

    @contextmanager
    def _told_errors(self) -> Iterator[None]:
        """Answer with what was wrong with a request."""
        try:
            yield
        except WeightopsError as error:
            self._answer_json({"error": error.fact}, 400)
        except (ValueError, TypeError, IndexError, OSError) as error:
            self._answer_json({"error": str(error)}, 400)

    def _answer_json(self, value: Any, status: int = 200) -> None:
        self._answer(status, "application/json", json.dumps(value).encode())

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        with suppress(ConnectionError):  # a page that has gone needs no answer
            self.send_response(status)
            for name, value in {"Content-Type": kind, **_HEADERS}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: addresses hold the token."""
