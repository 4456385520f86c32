"""Installed packages that extend weightops by entry points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(folder: Path, module: str, code: str, points: Mapping[str, Mapping[str, str]]) -> Path:
    """Write a module and the metadata of its package, as pip installs them.

    Args:
        folder: the folder to write into, which Python must search for modules.
        module: the name of the module and package.
        code: the module's code.
        points: group -> name -> object in the module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(code)
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = []
    for group, objects in points.items():
        lines += [f"[{group}]", *(f"{name} = {module}:{thing}" for name, thing in objects.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder
