"""Uploads to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from weightops.errors import CheckpointError, OptionError
from weightops.hub.fetch import REPO, reason
from weightops.support.result_files import CARD

THIS_FOLDER = "in-the-folder-of-this-file"
"""What a configuration says in place of the name of the repository, until it is pushed to one."""
_ONLY_FOR_THE_RUN = re.compile(r"\.(?!eval_results$).*|__pycache__|training\.\d+.*|.*\.run")
"""Names of files and folders that only the run needed: hidden ones but for the Hub's own folder of
results, and states to resume from."""


def push(folder: Path, repo: str, *, private: bool = False, license: str | None = None) -> str:
    """Upload a folder to a repository of the Hub in one commit, and return its address.

    Args:
        folder: the folder with weights and their model card.
        repo: the repository, as ``org/name``; it is created if it doesn't exist.
        private: create a private repository.
        license: the license of the weights, as the Hub names it, such as mit or apache-2.0; by
            default the one that the model card states.

    Raises:
        OptionError: if ``repo`` isn't ``org/name``, or there is no license.
        CheckpointError: if there is no model card, or the upload fails, with the Hub's reason.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = files_to_push(folder, repo, license=license)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message="Weights computed by weightops")
    except Exception as error:  # the library raises whatever its back ends raise
        raise CheckpointError(
            f"{folder} can't be pushed to {repo}: {reason(error)}",
            hint=f"the folder is complete; `weightops push {folder} {repo}` tries again",
        ) from error
    return str(commit)


def files_to_push(
    folder: Path, repo: str, *, license: str | None = None
) -> dict[str, Path | bytes]:
    """Return name -> file, or content, of what `push` uploads; see there for the arguments.

    Card and configuration name the repository where they named the folder.
    """
    check_repo(repo)
    if not (folder / CARD).is_file():
        raise CheckpointError(
            f"{folder} has no model card",
            hint=f"write what these weights are, and what was measured, to {folder / CARD}",
        )
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and not any(_ONLY_FOR_THE_RUN.fullmatch(part) for part in inside.parts):
            files[inside.as_posix()] = path
    files[CARD] = _card_for(folder / CARD, repo, license).encode()
    for name, file in files.items():
        if name.endswith("config.json") and isinstance(file, Path):
            text = file.read_text(encoding="utf-8")
            if THIS_FOLDER in text:
                files[name] = text.replace(THIS_FOLDER, repo).encode()
    return files


def front_matter(card: str) -> dict[str, Any]:
    """Return the metadata at the top of a model card; empty if there are none."""
    match = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", card, re.DOTALL)
    try:
        content = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        content = None
    return content if isinstance(content, dict) else {}


def _card_for(path: Path, repo: str, license: str | None) -> str:
    """Return a card with the license, which loads the model from its repository."""
    text = path.read_text(encoding="utf-8")
    known = front_matter(text).get("license")
    if license is None and known is None:
        raise OptionError(
            f"{path} states no license, and people need one to use the weights",
            hint=f"`weightops push {path.parent} {repo} --license mit` states one, or another; or "
            "license: in the card's metadata",
        )
    if license is not None:
        check_license(license)
    if license is not None and license != known:
        line = f"license: {license}\n"
        if known is not None:
            text = re.sub(r"(?m)^license:.*\n", line, text, count=1)
        elif front_matter(text):
            text = re.sub(r"^---\s*\n", f"---\n{line}", text, count=1)
        else:
            text = f"---\n{line}---\n\n{text}"
    text = re.sub(r'local-dir:[^"\'\s]+', f"hf-hub:{repo}", text)
    return re.sub(r'(from_pretrained\((?:base, )?)"[^"]+"', rf'\1"{repo}"', text)


def check_repo(repo: str) -> None:
    """Check the name of a repository.

    Raises:
        OptionError: if ``repo`` isn't ``org/name``.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    fact = f"{repo} is not the name of a repository"
    if not re.fullmatch(REPO, repo, re.ASCII):
        raise OptionError(fact, hint="give ORG/NAME")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OptionError(f"{fact}: {error}", hint="give ORG/NAME") from error


def check_license(license: str) -> None:
    """Check the name of a license.

    Raises:
        OptionError: if the Hub names none so.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise OptionError(
            f"{license!r} is no license as the Hub names them", hint="such as mit or apache-2.0"
        )


def check_login() -> None:
    """Check that somebody is logged in, before any work is done for an upload.

    Raises:
        OptionError: if nobody is.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise OptionError(
            "nobody is logged in to the Hugging Face Hub",
            hint="run `hf auth login`, or set HF_TOKEN",
        )
