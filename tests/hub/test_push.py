"""Folders with a model card are uploaded to a local server that answers like the Hub."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.fake_hub import FakeHub, fake_hub
from helpers.hub_cache import python, repository

from weightops import TaskVector, open_checkpoint
from weightops.cli.main import run

PUSH = """
import os, pathlib, sys, torch
from weightops import open_checkpoint
from weightops.cli.main import run
os.chdir(os.environ["WORK"])
open_checkpoint({"w": torch.ones(2)}).save("edited")
assert run(["push", "edited", "org/mine"]) == 1  # without a card
pathlib.Path("edited/README.md").write_text("---\\ntags: [merge]\\n---\\n")
pathlib.Path("edited/.cache").mkdir()
pathlib.Path("edited/.cache/x").write_text("")
assert run(["push", "edited", "org/mine"]) == 2  # without a license
assert run(["push", "edited", "org/mine", "--license", "", "--dry-run"]) == 2
assert run(["push", "edited", "mine", "--license", "mit", "--dry-run"]) == 2  # not ORG/NAME
assert run(["push", "edited", "org/mine", "--license", "mit", "--dry-run"]) == 0
print("---")
assert run(["push", "edited", "org/mine", "--license", "mit"]) == 0
assert run(["push", "edited", "other/mine", "--license", "mit"]) == 1
pathlib.Path("edited/README.md").write_text("---\\ntags: [merge]\\nlicense: mit\\n---\\n")
merge = ["merge", "edited", "edited", "-o", "merged", "--push"]
assert run([*merge, "mine", "--dry-run"]) == 2  # not ORG/NAME, in a dry run, too
assert run([*merge, "org/mine", "--license", "MIT!"]) == 2
assert run([*merge[:-1], "--license", "mit"]) == 2  # for --push
pathlib.Path("edited/README.md").write_text("---\\ntags: [merge]\\n---\\n")
assert run([*merge, "org/mine"]) == 2  # before it is merged
assert not pathlib.Path("merged").exists()
assert run([*merge, "org/mine", "--license", "mit"]) == 0
assert "license: mit" not in pathlib.Path("merged/README.md").read_text()
pathlib.Path("edited/README.md").write_text("---\\ntags: [merge]\\nlicense: mit\\n---\\n")
assert run([*merge, "org/mine", "--overwrite"]) == 0
patch = ["patch", "--task", "shapes", "--model", "embedded", "--push", "org/mine"]
assert run([*patch, "--dry-run", "--license", "None of that"]) == 2
assert run(["merge", "edited", "edited", "-o", "merged.safetensors", "--push", "org/mine"]) == 2
"""


def test_pushing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with fake_hub({}) as environment:
        output = python(
            PUSH, WORK=str(work), HF_HOME=str(tmp_path / "home"), HF_TOKEN="hf_none", **environment
        )
    planned, _, done = output.partition("---")
    assert "would be pushed to org/mine" in planned
    assert "pushed to http" in done
    assert FakeHub.uploaded.keys() == {"README.md", "model.safetensors", "recipe.yaml"}
    written = (work / "merged" / "model.safetensors").read_bytes()
    assert FakeHub.uploaded["model.safetensors"] == written
    card = FakeHub.uploaded["README.md"]
    assert b"# linear of 2 checkpoints" in card
    assert b"license: mit" in card  # of both inputs


STOCK = """
import sys, torch, open_clip
place, like = sys.argv[1:]
model, _, _ = open_clip.create_model_and_transforms(place)
texts = ["the number: 3.", "HELLO, World!! it's <PAD>", "&amp; na\\u00efve \\u4e2d\\u6587"]
texts += ["", "a long text of many words that goes on and on and on and on"]
own = open_clip.tokenizer.SimpleTokenizer(like, context_length=16)
tokens = open_clip.get_tokenizer(place)(texts)
for ours, theirs in zip(tokens, own(texts)):
    stop = theirs.tolist().index(own.eot_token_id) + 1  # what follows isn't looked at
    assert torch.equal(ours[:stop], theirs[:stop]), (ours, theirs)
with torch.no_grad():
    features = model.encode_text(tokens)
    assert torch.equal(features, model.encode_text(own(texts)))
    print(features.sum().item())
assert "weightops" not in sys.modules
"""


def test_a_pushed_model_loads_in_open_clip_wherever_it_lies(tmp_path: Path) -> None:
    base = open_checkpoint("embedded")
    folder = tmp_path / "of_the_author" / "edited"
    TaskVector(base, base).apply(base).save(folder)
    moved = tmp_path / "elsewhere"
    (folder / "README.md").write_text(
        f'---\nlicense: mit\n---\n\nopen_clip.get_tokenizer("local-dir:{folder.name}")\n'
    )
    folder.rename(moved)
    merges = str(base.known_architecture().folder / "merges.txt.gz")
    for path in moved.iterdir():
        assert b"of_the_author" not in path.read_bytes(), path.name
    (tmp_path / "cwd").mkdir()
    first = _stock(f"local-dir:{moved}", merges, tmp_path / "cwd")
    with fake_hub({}) as environment:
        code = "import sys; from weightops.cli.main import run; sys.exit(run(sys.argv[1:]))"
        python(
            code,
            "push",
            str(moved),
            "org/mine",
            HF_HOME=str(tmp_path),
            HF_TOKEN="hf_x",
            **environment,
        )
    assert b'get_tokenizer("hf-hub:org/mine")' in FakeHub.uploaded["README.md"]
    repository(tmp_path / "home" / "hub", "org/mine", FakeHub.uploaded)
    again = _stock("hf-hub:org/mine", merges, tmp_path / "cwd", HF_HOME=str(tmp_path / "home"))
    assert first == again


FROM_THE_STAND_IN = """
from weightops import open_checkpoint, evaluate
model = open_checkpoint("org/tiny")
assert evaluate(model, "shapes", split="validation", device="cpu")["shapes"]["acc1"] > 0.9
print(model.fingerprint)
"""


def test_what_was_pushed_is_fetched_again(tmp_path: Path) -> None:
    """The stand-in gives what was uploaded to it, card and results included."""
    folder = tmp_path / "edited"
    base = open_checkpoint("embedded")
    TaskVector(base, base).apply(base).save(folder)
    (folder / "README.md").write_text("---\ntags: [merge]\n---\n\n# Mine\n")
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results/weightops.yaml").write_text("[]\n")
    (folder / "training.8.pt").write_bytes(b"")
    home = str(tmp_path / "home")
    code = "import sys; from weightops.cli.main import run; sys.exit(run(sys.argv[1:]))"
    line = ["push", str(folder), "org/mine", "--license", "apache-2.0"]
    with fake_hub({}) as environment:
        python(code, *line, HF_HOME=home, HF_TOKEN="hf_x", **environment)
    pushed = dict(FakeHub.uploaded)
    assert b"license: apache-2.0" in pushed["README.md"]
    assert ".eval_results/weightops.yaml" in pushed
    assert "training.8.pt" not in pushed
    with fake_hub(pushed) as environment:
        printed = python(FROM_THE_STAND_IN, HF_HOME=home, **environment)
    assert open_checkpoint(folder).fingerprint in printed


def test_names_that_the_hub_refuses(tmp_path: Path) -> None:
    folder = open_checkpoint({"w": torch.ones(2)}).save(tmp_path / "edited")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    bad = ("mine", "org/a/b", "org/a--b", "org/a..b", "org/mine.git", "org/-a", f"org/{'a' * 120}")
    for name in (*bad, "örg/name", "org/a b", ""):
        assert run(["push", str(folder), name, "--dry-run"]) == 2


def _stock(place: str, merges: str, folder: Path, **environment: str) -> str:
    """Load a model with open_clip alone, in a process in another folder."""
    return python(STOCK, place, merges, cwd=folder, HF_HUB_OFFLINE="1", **environment)
