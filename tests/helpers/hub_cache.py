"""Repositories in a cache of the Hub, and processes that look there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def repository(hub: Path, repo: str, files: dict[str, bytes], kind: str = "models") -> None:
    """Write a repository into a cache of the Hub, in huggingface_hub's layout."""
    root = hub / f"{kind}--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "blobs").mkdir()
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = root / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def python(code: str, *arguments: str, cwd: Path | None = None, **environment: str) -> str:
    """Run a script in a process of its own, in which huggingface_hub reads the environment."""
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
